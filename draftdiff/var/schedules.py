"""Infinity's scales per aspect ratio (arXiv 2412.04431, section 3.4): height x width in tokens of 16 pixels."""

from __future__ import annotations

import math
from numbers import Real

from draftdiff.errors import UserError

Scales = tuple[tuple[int, int], ...]

PIXELS_PER_TOKEN = 16
# How many scales make a picture of about so many pixels.
SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}


def _pairs(text: str) -> Scales:
    return tuple((int(h), int(w)) for h, w in (pair.split("x") for pair in text.split()))


_PORTRAIT = {
    1.0: _pairs("1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64"),
    1.25: _pairs("1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56"),
    1.333: _pairs("1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54"),
    1.5: _pairs("1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52"),
    1.75: _pairs("1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48"),
    2.0: _pairs("1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45"),
    2.5: _pairs("1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40"),
    3.0: _pairs("1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37"),
}
# By height / width; landscape transposes portrait.
SCHEDULES: dict[float, Scales] = _PORTRAIT | {
    int(1000 / ratio) / 1000: tuple((w, h) for h, w in scales) for ratio, scales in _PORTRAIT.items() if ratio != 1
}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def scales_for(aspect_ratio: float, size: str) -> Scales:
    """The scales of an aspect ratio (height / width) and size. Raises ValueError if either is unknown."""
    if not isinstance(size, str) or size not in SIZES:
        raise UserError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if not _is_number(aspect_ratio):
        raise UserError(f"aspect_ratio must be one number, height / width, so 9 / 16 for 16:9, got {aspect_ratio!r}")
    nearest = min(SCHEDULES, key=lambda ratio: abs(ratio - aspect_ratio))
    if abs(nearest - aspect_ratio) > 0.02 * nearest:
        known = ", ".join(f"{ratio:g}" for ratio in sorted(SCHEDULES))
        raise UserError(f"unknown aspect ratio (height / width) {aspect_ratio:g}; known are {known}")
    return SCHEDULES[nearest][: SIZES[size]]


def scales_for_pixels(height: int, width: int) -> Scales:
    """The scales that end at this size in pixels. Raises ValueError if none do, naming those of the nearest ratio."""
    if not (_is_number(height) and _is_number(width) and height >= 1 and width >= 1):
        raise UserError(f"height and width must be positive numbers of pixels, got {height!r} x {width!r}")
    ends = {}
    for scales in SCHEDULES.values():
        for count in SIZES.values():
            h, w = scales[count - 1]
            ends[h * PIXELS_PER_TOKEN, w * PIXELS_PER_TOKEN] = scales[:count]
    if (height, width) not in ends:
        nearest = min(SCHEDULES, key=lambda ratio: abs(ratio - height / width))
        sizes = (SCHEDULES[nearest][count - 1] for count in SIZES.values())
        known = ", ".join(f"{h * PIXELS_PER_TOKEN}x{w * PIXELS_PER_TOKEN}" for h, w in sizes)
        ratios = ", ".join(f"{ratio:g}" for ratio in sorted(SCHEDULES))
        raise UserError(
            f"no schedule ends at {height}x{width} pixels; near it: {known}; aspect ratios (height / width): {ratios}"
        )
    return ends[height, width]


def reference_grid(scales: Scales) -> tuple[int, int]:
    """The grid that rotary positions refer to: the last scale of the 1M schedule of the same aspect ratio, whatever the
    size that is generated. Raises ValueError for scales that begin no schedule."""
    for whole in SCHEDULES.values():
        if len(scales) > 1 and whole[: len(scales)] == tuple(scales):
            return whole[-1]
    raise UserError(f"these scales begin none of Infinity's schedules: {' '.join(f'{h}x{w}' for h, w in scales)}")
