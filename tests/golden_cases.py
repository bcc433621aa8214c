"""The golden data of DRAFTDIFF_GOLDEN (default tests/golden): cases by kind, their weights and tolerances."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("DRAFTDIFF_GOLDEN", Path(__file__).parent / "golden"))


@dataclass
class Case:
    """One JSON file and the tensors beside it."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self, part: str) -> dict[str, Tensor]:
        """Weights of a part by their original names, widened to fp32."""
        return widened(load_file(FOLDER / self.info["state_dicts"][part]))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def kinds() -> dict[str, str]:
    """The kind of every case, by name."""
    cases = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    return {name: info["kind"] for name, info in cases.items() if "kind" in info}


def load(name: str) -> Case:
    info = json.loads((FOLDER / f"{name}.json").read_text())
    return Case(info, load_file(FOLDER / info["file"]))


def tolerances(table: dict[str, str]) -> dict[str, float]:
    """Absolute tolerance per name; exact ones are left out."""
    return {name: float(text.split()[0]) for name, text in table.items() if text.endswith(" abs")}


def assert_image(image: Tensor, case: Case, prefix: str, tolerance: float) -> None:
    """Compare a picture [batch, 3, height, width] in [0, 1] with a case's three digests of it."""
    height, width = image.shape[-2:]
    rows, columns = slice(height // 2 - 16, height // 2 + 16), slice(width // 2 - 16, width // 2 + 16)
    digests = {
        "image_down4": torch.nn.functional.avg_pool2d(image, 4),
        "image_crop": image[..., rows, columns],
        "image_mean_std": torch.stack([image.mean((-2, -1)), image.std((-2, -1), correction=0)], dim=-1),
    }
    for name, digest in digests.items():
        torch.testing.assert_close(digest, case[prefix + name], atol=tolerance, rtol=0)
