"""The golden data of DRAFTDIFF_GOLDEN (default tests/golden) and, of language models, DRAFTDIFF_GOLDEN_LLM (default
tests/golden_llm): cases by kind, their weights, and the comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("DRAFTDIFF_GOLDEN", Path(__file__).parent / "golden"))
LLM_FOLDER = Path(os.environ.get("DRAFTDIFF_GOLDEN_LLM", Path(__file__).parent / "golden_llm"))
INPUTS = ("text", "negative_text")  # tensors that a case gives, and not results


@dataclass
class Case:
    """One JSON file and the tensors beside it, none if it has no such file."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path
    name: str = ""

    def weights(self, part: str) -> dict[str, Tensor]:
        """Weights of a part by their original names, widened to fp32."""
        return widened(load_file(self.folder / self.info.get("state_dicts", self.info.get("checkpoint_files"))[part]))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def has_pictures(self) -> bool:
        return any("image_" in name for name in self.tensors)

    def same(self, ours: Tensor, expected: Tensor | str, kind: str) -> None:
        """Hold one result to the case's, given or by its name, at the tolerance of a kind, one of the words of a key of
        the table, such as "hidden" of "hidden, logits"; integers and booleans are exact."""
        name, theirs = (expected, self[expected]) if isinstance(expected, str) else (kind, expected)
        assert ours.shape == theirs.shape, f"{name}: {list(ours.shape)} against {list(theirs.shape)}"
        if not theirs.is_floating_point():
            assert torch.equal(ours.to(torch.int64), theirs.to(torch.int64)), name
            return
        (row,) = [row for key, row in self.info["tolerance"].items() if kind in key.split(", ")]
        bound, way = row.split()
        absolute = way == "abs"
        allowed = {"atol": float(bound) if absolute else 0.0, "rtol": 0.0 if absolute else float(bound)}
        torch.testing.assert_close(ours.float(), theirs, **allowed, msg=lambda text: f"{name}: {text}")

    def compare(self, ours: Mapping[str, Tensor], *needed: str, prefix: str = "") -> None:
        """Hold every result of the case to ours, by the tolerance of the longest name that it begins with; a case may
        leave out results that are not `needed`."""
        theirs = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        theirs = {name: t for name, t in theirs.items() if name not in INPUTS}
        assert set(needed) <= set(theirs), f"the case lacks {sorted(set(needed) - set(theirs))}"
        assert set(theirs) <= set(ours), f"unknown results: {sorted(set(theirs) - set(ours))}"
        table = self.info["tolerance"]
        table = table.get(prefix.removesuffix("."), table)
        for name, expected in theirs.items():
            kind = max((key for key in table if name.startswith(key)), key=len)
            assert ours[name].shape == expected.shape, name
            message = lambda text, name=name: f"{prefix}{name}: {text}"  # noqa: E731
            if table[kind] == "exact":
                assert torch.equal(ours[name].to(expected.dtype), expected), name
            else:
                allowed = 1.0 if table[kind] == "off by at most 1" else tolerances(table)[kind]
                torch.testing.assert_close(ours[name].float(), expected.float(), atol=allowed, rtol=0, msg=message)


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def kinds(folder: Path = FOLDER) -> dict[str, str]:
    """The kind of every case, by name; of language models the method, of which formulas alone have none but a name."""
    cases = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = {name: info.get("kind", info.get("method", info.get("case"))) for name, info in cases.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def load(name: str, folder: Path = FOLDER) -> Case:
    info = json.loads((folder / f"{name}.json").read_text())
    tensors = folder / info.get("file", f"{name}.safetensors")
    return Case(info, load_file(tensors) if tensors.exists() else {}, folder, name)


def tolerances(table: dict[str, str]) -> dict[str, float]:
    """Absolute tolerance per name; exact ones are left out."""
    return {name: float(text.split()[0]) for name, text in table.items() if text.endswith(" abs")}


def digests(image: Tensor) -> dict[str, Tensor]:
    """What a case keeps of a picture [batch, 3, height, width] in [0, 1]."""
    height, width = image.shape[-2:]
    rows, columns = slice(height // 2 - 16, height // 2 + 16), slice(width // 2 - 16, width // 2 + 16)
    return {
        "image_down4": torch.nn.functional.avg_pool2d(image, 4),
        "image_crop": image[..., rows, columns],
        "image_mean_std": torch.stack([image.mean((-2, -1)), image.std((-2, -1), correction=0)], dim=-1),
    }
