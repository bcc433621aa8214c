"""The file of a profile: a config that was tuned for one kind of transformer, and what was measured of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draftdiff.core.budget import Budget
from draftdiff.core.values import is_whole
from draftdiff.errors import UserError
from draftdiff.files import replacing
from draftdiff.stored import read_json
from draftdiff.video.config import DraftAttentionConfig, MadeFor

_FORMAT = "draftdiff_profile"
_NEWEST = 1
_KINDS: dict[str, type] = {
    "transformer": str,
    "layers": int,
    "heads": int,
    "grid": list,
    "steps": int,
    "target": str,
    "config": dict,
    "measured": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Profile:
    """A tuned config. grid, steps: of the video tokens and runs that it was tuned on; others may be made with it.

    target: as it was asked for.  measured: of the renders that were checked.  versions: of what it was made with.
    """

    config: DraftAttentionConfig
    grid: tuple[int, int, int]
    steps: int
    target: str
    measured: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        assert self.config.made_for is not None
        config = {name: value for name, value in asdict(self.config).items() if name != "made_for"}
        return {
            _FORMAT: _NEWEST,
            **asdict(self.config.made_for),
            "grid": list(self.grid),
            "steps": self.steps,
            "target": self.target,
            "config": config,
            "measured": self.measured,
            "versions": self.versions,
        }

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises NotWritten."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        with replacing(Path(path)) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Read a file. Raises UserError, in one line, for one that is no profile, damaged, or of a newer draftdiff."""
        try:
            content = read_json(path, "profile")
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        version = content.get(_FORMAT)
        if type(version) is int and version > _NEWEST:
            raise UserError(f"{path} is a profile of format {version}; this draftdiff reads formats up to {_NEWEST}")
        if version != _NEWEST or type(version) is not int:
            raise UserError(f"{path} is not a readable profile: {_FORMAT} is not {_NEWEST}")
        for name, kind in _KINDS.items():
            if type(content.get(name)) is not kind:
                raise UserError(f"{path} is not a readable profile: {name} is missing or no {kind.__name__}")
        grid = tuple(content["grid"])
        if len(grid) != 3 or not all(map(is_whole, grid)):
            raise UserError(f"{path} is not a readable profile: grid is not three whole numbers")
        try:
            config = _config(content["config"])
        except UserError as error:
            raise UserError(f"{path} is not a readable profile: {error}") from None
        shape = MadeFor(content["transformer"], content["layers"], content["heads"])
        return cls(
            replace(config, made_for=shape),
            grid,
            *(content[name] for name in ("steps", "target", "measured", "versions")),
        )


def _config(fields: dict[str, Any]) -> DraftAttentionConfig:
    spread = fields.get("sparsity")
    if not isinstance(spread, dict):
        return DraftAttentionConfig.of(fields)
    known = ("sparsity", "steps", "layers", "heads")
    unknown = [name for name in spread if name not in known]
    if unknown:
        raise UserError(f"its budget has no {', '.join(unknown)}")
    return DraftAttentionConfig.of({**fields, "sparsity": Budget(**spread)})
