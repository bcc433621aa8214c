"""What the cases of all families are made of: tiny lively models, and inputs of a forward from a table of shapes."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
Inputs = dict[str, Any]

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
ROPE_AXES = (8, 12, 12)
TEXT = 10
TEXT_PADDED = 7
TEXT_WIDTH = 16
CHANNELS = 4


@dataclass(frozen=True)
class Asked:
    """The call that inputs are made for."""

    model: Any
    grid: Grid
    batch: int

    def times(self, scale: float = 1.0) -> Tensor:
        """Timesteps that differ between batch items, [batch]."""
        return torch.tensor([700.0, 400.0]).repeat(self.batch)[: self.batch] * scale

    def text_mask(self) -> Tensor:
        """[batch, TEXT] int64: the text of odd batch items is padded."""
        lengths = torch.tensor([TEXT, TEXT_PADDED]).repeat(self.batch)[: self.batch]
        return (torch.arange(TEXT) < lengths[:, None]).long()

    def times_per_frame(self, scale: float = 1.0) -> Tensor:
        """[batch, frames]"""
        return self.times(scale)[:, None] * torch.linspace(0.2, 1.0, self.grid[0])


@dataclass(frozen=True)
class ModelCase:
    """One transformer in one mode.

    build: a seeded model in eval mode.  pixels: (inputs, token grid, token as (frame, row, column)) -> view of the
    input values that token is made of.  layers: number of video self-attentions.  text: tokens outside the grid in one
    attention call, for even and odd batch items; in modules whose name matches one of `apart`, those that it says.
    absent: keys without queries.  per_item: the model attends once per batch item.  batched: it takes several items, in
    inputs that can be cut.  fits: a grid -> one like it that the model takes.
    spec: argument of the forward -> what stands there. A string is the shape of noise, in words of arithmetic over
    B(atch), F(rames), H(eight), W(idth), N = F * H * W and C(hannels); a function gets the `Asked`; a list is of such;
    all else is itself.
    """

    name: str
    build: Callable[[], nn.Module]
    spec: dict[str, Any]
    pixels: Callable[[Inputs, Grid, Grid], Tensor]
    grid: Grid = (5, 6, 9)
    layers: int = 2
    text: tuple[int, int] = (0, 0)
    absent: int = 0
    apart: dict[str, int] = field(default_factory=dict)
    per_item: bool = False
    batched: bool = True
    fits: Callable[[Grid], Grid] = lambda grid: grid

    def __str__(self) -> str:
        return self.name

    def inputs(self, model: Any, grid: Grid, batch: int) -> Inputs:
        """Keyword arguments of the model's forward for so many tokens and items: the same at every call."""
        noise = torch.Generator().manual_seed(1)
        frames, height, width = grid
        channels = getattr(model.config, "in_channels", CHANNELS)
        batch = batch if self.batched else 1
        letters = {"B": batch, "F": frames, "H": height, "W": width, "N": frames * height * width, "C": channels}

        def value(entry: Any) -> Any:
            if isinstance(entry, str):
                return torch.randn([eval(word, {}, letters) for word in entry.split()], generator=noise)
            if isinstance(entry, list):
                return [value(part) for part in entry]
            return entry(Asked(model, grid, batch)) if callable(entry) else entry

        return {name: value(entry) for name, entry in self.spec.items()} | {"return_dict": False}


def bound_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of a forward call by name, defaults included; None for what this version does not have."""
    bound = inspect.signature(type(model).forward).bind(model, **inputs)
    bound.apply_defaults()
    return defaultdict(lambda: None, bound.arguments)


def output_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The denoised video of a forward call (Kandinsky 5 returns it bare, the others in a tuple, some as a list)."""
    with torch.no_grad():
        output = model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    return output if isinstance(output, Tensor) else torch.stack(output)


def lively_(model: nn.Module) -> nn.Module:
    """Re-draw weights so that attention matters: spread logits, no gate or output layer that starts at zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2] if "." in name else ""
        if owner in ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm"):
            if name.endswith("weight"):
                nn.init.uniform_(parameter, 0.8, 1.8)
        elif parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def takes(model_class: type[nn.Module], spec: dict[str, Any]) -> bool:
    """Whether the installed version's forward has all these arguments."""
    return set(spec) <= set(inspect.signature(model_class.forward).parameters)


def tiny(model_class: type[nn.Module], **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.no_grad():
            return lively_(model_class(**config)).eval().requires_grad_(False)

    return build


def patch(
    axes: tuple[int, int, int] = (2, 3, 4), sizes: tuple[int, int, int] = (1, 2, 2), name: str = "hidden_states"
) -> Callable[[Inputs, Grid, Grid], Tensor]:
    """Pixels of a token: those of its patch. axes: the input's frame, row and column dimensions."""

    def pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
        view = inputs[name]
        for axis, size, place in zip(axes, sizes, token):
            view = view.narrow(axis, size * place, size)
        return view

    return pixels


def packed(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    """Pixels of a token that the pipeline has made one row of."""
    frame, row, column = token
    return inputs["hidden_states"][:, (frame * grid[1] + row) * grid[2] + column]


def last_packed(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    """Of rows that end with those of the grid."""
    frame, row, column = token
    return inputs["hidden_states"][:, (frame * grid[1] + row) * grid[2] + column - math.prod(grid)]
