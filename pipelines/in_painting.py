"""Pictures and masks of any kind that PIL, numpy and torch give, as 8-bit pictures of PIL: one form to work on.

A number stands for a share of white by its dtype: uint8 of 255, uint16 of 65535, bool and floating-point numbers of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from draftdiff.errors import UserError

# By dtype what is white.
_WHITE = {"uint8": 255, "uint16": 65535, "bool": 1}
_SHAPES = {
    "array": "[height, width], [height, width, channels] or [pictures, height, width, channels]",
    "tensor": "[height, width], [channels, height, width] or [pictures, channels, height, width]",
}


def pictures(value: Any, name: str) -> list[PIL.Image.Image]:
    """RGB pictures of one or of several. Raises ValueError, with the argument's name, for what is no picture."""
    return [picture.convert("RGB") for picture in _pictures(value, name)]


def masks(value: Any, name: str) -> list[PIL.Image.Image]:
    """Masks, 0 or 255 in mode L, of one or of several pictures: what is at least half white is white.

    Raises ValueError like `pictures`, and for whole numbers 0 and 1, of which 1 would be as good as black.
    """
    found = [picture.convert("L") for picture in _pictures(value, name)]
    if any(picture.getextrema()[1] == 1 for picture in found):
        raise UserError(f"{name} holds whole numbers up to 1, where white is 255: give it as bool")
    return [picture.point(lambda level: 255 if level >= 128 else 0) for picture in found]


def _pictures(value: Any, name: str) -> list[PIL.Image.Image]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise UserError(f"{name} is empty: give at least one picture")
        return [picture for one in value for picture in _one_or_more(one, name)]
    return _one_or_more(value, name)


def _one_or_more(value: Any, name: str) -> list[PIL.Image.Image]:
    if isinstance(value, PIL.Image.Image):
        if 0 in value.size:
            raise UserError(f"{name} is empty: {value.width} x {value.height} pixels")
        deep = value.mode.startswith("I") or value.mode == "F"  # PIL would cut these at 255
        return _of_array(_deep(value, name), name, "array") if deep else [_common(value, name)]
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # numpy does not know all of them
        return _of_array(value.numpy(), name, "tensor")
    if isinstance(value, np.ndarray):
        return _of_array(value, name, "array")
    raise UserError(f"{name} must be of PIL, numpy or torch, or a list of these, got a {type(value).__name__}")


def _common(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """In a mode that becomes both RGB and L. Palettes may have transparency: PIL warns unless they become RGBA."""
    if picture.mode in ("1", "L", "LA", "RGB", "RGBA"):
        return picture
    try:
        return picture.convert("RGBA" if picture.mode in ("P", "PA") else "RGB")
    except ValueError:
        raise UserError(f"{name} has mode {picture.mode}: convert it to RGB") from None


def _deep(picture: PIL.Image.Image, name: str) -> np.ndarray:
    """Of a 16-bit or floating-point picture the numbers; PIL gives the former as int32 too."""
    numbers = np.asarray(picture)
    if numbers.dtype == np.int32:
        if numbers.min() < 0 or numbers.max() > 65535:
            raise UserError(f"{name} must be from 0 to 65535 in mode {picture.mode}, got up to {numbers.max()}")
        numbers = numbers.astype(np.uint16)
    return numbers


def _of_array(numbers: np.ndarray, name: str, kind: str) -> list[PIL.Image.Image]:
    """Pictures of numbers in one of the shapes of a kind."""
    dtype = numbers.dtype.name
    if dtype not in _WHITE and numbers.dtype.kind != "f":
        raise UserError(f"{name} must be of uint8, uint16, bool or floating-point numbers, got {dtype}")
    if numbers.ndim not in (2, 3, 4) or 0 in numbers.shape:
        raise UserError(f"{name} must be {_SHAPES[kind]}, got {numbers.shape}")
    batch = numbers[None, ..., None] if numbers.ndim == 2 else numbers[None] if numbers.ndim == 3 else numbers
    if kind == "tensor" and numbers.ndim > 2:
        batch = batch.transpose(0, 2, 3, 1)
    if batch.shape[-1] not in (1, 3, 4):
        raise UserError(f"{name} must be {_SHAPES[kind]} with 1, 3 or 4 channels, got {numbers.shape}")
    shares = batch.astype(np.float64) / _WHITE.get(dtype, 1)
    if not (shares.min() >= 0 and shares.max() <= 1):
        raise UserError(f"{name} must be from 0 to 1 in {dtype}, got {batch.min():g} to {batch.max():g}")
    levels = np.rint(shares * 255).astype(np.uint8)
    return [_picture(one) for one in levels]


def _picture(levels: np.ndarray) -> PIL.Image.Image:
    """Of uint8 [height, width, channels]."""
    grey = levels.shape[-1] == 1
    return PIL.Image.fromarray(np.ascontiguousarray(levels[..., 0] if grey else levels))
