"""Shift-tolerant LPIPS (Ghildyal and Liu 2022, arXiv 2207.13686) on AlexNet features.

The weights are those of the package `stlpips-pytorch`, whose own code is not run: it needs torchvision, and a part of
it may not be used commercially.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WEIGHTS = Path("weights", "vST0.0", "alex_shift_tolerant.pth")
# Of each layer: the names of its convolution and of its channels' weights, its padding, and whether it halves the size.
_LAYERS = (
    ("slice2.5", "lin1", 2, True),
    ("slice3.9", "lin2", 1, True),
    ("slice4.11", "lin3", 1, False),
    ("slice5.13", "lin4", 1, False),
)


class ShiftTolerantLpips(nn.Module):
    """Distance of two pictures as people see it, from 0 (alike). Raises FileNotFoundError without the weights."""

    def __init__(self) -> None:
        super().__init__()
        found = importlib.util.find_spec("stlpips_pytorch")
        places = (found.submodule_search_locations if found else None) or ()
        file = next((Path(place, _WEIGHTS) for place in places), None)
        if file is None:
            raise FileNotFoundError("stlpips-pytorch is not installed")
        self._weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: pictures in [-1, 1], [batch, 3, height, width]. Returns [batch]."""
        distances = [
            F.conv2d((a - b).square(), self._weights[f"{name}.model.1.weight"]).mean((1, 2, 3))
            for name, a, b in zip(("lin0", *(layer[1] for layer in _LAYERS)), self._features(x), self._features(y))
        ]
        return torch.stack(distances).sum(0)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Activations of the five layers, of unit length over the channels."""
        weights = self._weights
        x = (x - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
        x = self._convolution(x, "net.slice1.0", padding=2)
        activations = [_halved(x).relu()]
        for name, _, padding, halves in _LAYERS:
            x = activations[-1]
            if halves:
                x = _halved(F.max_pool2d(x, 3, stride=1))
            activations.append(self._convolution(x, f"net.{name}", padding).relu())
        return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in activations]

    def _convolution(self, x: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], padding=padding)


def _halved(x: Tensor) -> Tensor:
    """Every second pixel after a binomial blur, without which a shift by one pixel would count."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    channels = x.shape[1]
    blur = torch.outer(line, line).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), blur, stride=2, groups=channels)
