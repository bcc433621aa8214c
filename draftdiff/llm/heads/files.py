"""Head files: those that draftdiff writes, and published ones, read without trust.

Hydra (zankner/Hydra) has `hydra_lm_head.pt`, Medusa (FasterDecoding/Medusa) `medusa_lm_head.pt`, EAGLE-3 (SafeAILab)
`pytorch_model.bin` or `model.safetensors`, speculators (vllm-project) and
LongSpec (sail-sg) `model.safetensors`; each beside a `config.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from draftdiff.errors import UserError, user_errors
from draftdiff.files import new_folder
from draftdiff.llm.checks import require
from draftdiff.llm.static_tree import StaticTree
from draftdiff.stored import read_json, read_weights

Heads = TypeVar("Heads", bound=nn.Module)

KIND = "draftdiff_heads"  # field of config.json that says which heads a folder of ours holds
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def save(heads: Any, folder: str | Path, kind: str, paths: Sequence[Sequence[int]] | None = None) -> None:
    """Write heads to a new folder, whole or not at all. paths: nodes of their tree, if it is a static one.

    Raises FileExistsError.
    """
    with new_folder(Path(folder)) as partial:
        config = {KIND: kind, **asdict(heads.settings)}
        if paths is not None:
            config["tree"] = [list(path) for path in paths]
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({name: x.contiguous() for name, x in heads.state_dict().items()}, partial / WEIGHTS[0])


def own_config(config: Mapping[str, Any], kind: str, folder: Path) -> dict[str, Any] | None:
    """The fields of heads that draftdiff wrote; None if another program did. Raises ValueError for other heads."""
    if KIND not in config:
        return None
    require(config[KIND] == kind, f"{folder} holds heads of {config[KIND]!r}, not of {kind!r}")
    return {name: value for name, value in config.items() if name not in (KIND, "tree")}


def saved_tree(folder: str | Path) -> StaticTree | None:
    """The tree that was saved with heads of ours; None of other folders."""
    paths = read_json(Path(folder) / "config.json", "config of heads").get("tree")
    if paths is None:
        return None
    with user_errors(TypeError):
        return StaticTree(paths)


def open_folder(folder: str | Path, *names: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of a folder and the weights of the first of these files that is there.

    Raises FileNotFoundError if there is none, and ValueError for what is unreadable or is not a table of weights.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "config of heads")
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(f"no weights of heads in {folder}: {' or '.join(names)}")
    weights = read_weights(found[0], "file of weights")
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise UserError(f"{found[0]} holds no table of weights")
    return config, weights


def fill(heads: nn.Module, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Load weights that must be just those of the heads. Raises ValueError that names the first that is not."""
    own = heads.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{folder} {'lacks' if name in own else 'has an unknown'} weight {name}")
    for name, x in weights.items():
        require(
            x.shape == own[name].shape,
            f"{folder} has weight {name} of shape {list(x.shape)}, its config wants {list(own[name].shape)}",
        )
    heads.load_state_dict(weights)


def built(make: Callable[[], Heads], folder: str | Path) -> Heads:
    """What `make` makes of a config and weights. What is missing there or of a wrong kind is the file's fault, in one
    line."""
    try:
        with user_errors(TypeError, ValueError):
            return make()
    except KeyError as error:
        raise UserError(f"{folder} lacks {error.args[0]}") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str], dropped: str) -> dict[str, Tensor]:
    """Weights by our names: of each name the patterns of `names` are replaced; those that match `dropped` are left out.

    Weights that come to the same name, which the original shares, must be equal. Raises ValueError if they are not.
    """
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        if re.fullmatch(dropped, name):
            continue
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        known = found.setdefault(name, x)
        if known is not x and not (known.shape == x.shape and bool((known == x).all())):
            raise UserError(f"weights that are to be shared differ: {name}")
    return found
