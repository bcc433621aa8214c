"""A rule-based judge for mini pictures: looks at the pixels alone and says which class they show.

It separates the shape from the plain background and reads colour, shape and place off that. Whatever is not clear, such
as two shapes, a smear or a colour between two, it reports as None rather than guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draftdiff.errors import UserError
from draftdiff.pipelines.mini.judge import FAINTEST_SHAPE, nearest
from draftdiff.pipelines.mini.pictures import (
    CLASSES,
    COLOURS,
    LARGEST_OFFSET,
    PLACES,
    RADII,
    SHAPES,
    SIDE,
    PictureClass,
    picture_coverage,
)

# Of a shape's mask with that of an ideal one; a circle and a square of the same area overlap by 0.83.
LOWEST_OVERLAP = 0.8
# Beyond what the world draws, in pixels for the place and as a factor for the radius.
PLACE_SLACK = 1.5
RADIUS_SLACK = 1.15


@dataclass(frozen=True)
class Judgement:
    """What the picture shows; None where that is not clear. `overlap` is how well the best shape fits, 0 to 1."""

    shape: str | None = None
    colour: str | None = None
    place: str | None = None
    overlap: float = 0.0

    def shows(self, wanted: PictureClass | int) -> bool:
        """Whether that is a picture of this class, given as such or by its number."""
        if not isinstance(wanted, PictureClass):
            wanted = CLASSES[wanted]
        return (self.shape, self.colour, self.place) == (wanted.shape, wanted.colour, wanted.place)


def _unit_moments(shape: str) -> tuple[float, float]:
    """Of a shape of radius 1: its area, and how far down its centre of mass lies."""
    fine = 100
    pixels = (np.arange(4 * fine) + 0.5) - 2 * fine
    cover = picture_coverage(shape, fine, *np.meshgrid(pixels, pixels))
    return float(cover.sum()) / fine**2, float((cover * pixels[:, None]).sum() / cover.sum()) / fine


_MOMENTS = {shape: _unit_moments(shape) for shape in SHAPES}


def judge(picture: np.ndarray) -> Judgement:
    """Say what a picture shows. `picture` is RGB in 0..1, shape [64, 64, 3]."""
    picture = np.asarray(picture, dtype=np.float32)
    if picture.shape != (SIDE, SIDE, 3):
        raise UserError(f"expected a picture of shape ({SIDE}, {SIDE}, 3), got {picture.shape}")
    inner = np.zeros((SIDE, SIDE), dtype=bool)
    inner[2:-2, 2:-2] = True
    contrast = np.linalg.norm(picture - np.median(picture[~inner], axis=0), axis=-1)
    peak = float(np.percentile(contrast, 98))
    if peak < FAINTEST_SHAPE:
        return Judgement()
    weights = np.clip((contrast / peak - 0.2) / 0.6, 0.0, 1.0)
    colour = nearest(np.median(picture[contrast > 0.8 * peak], axis=0), COLOURS)

    pixels = np.arange(SIDE, dtype=np.float32) + 0.5 - SIDE / 2
    area = float(weights.sum())
    right, down = float((weights * pixels).sum()) / area, float((weights * pixels[:, None]).sum()) / area
    fits: dict[str, tuple[float, float, float]] = {}
    for shape, (unit_area, drop) in _MOMENTS.items():
        radius = float(np.sqrt(area / unit_area))
        middle = down - drop * radius
        template = picture_coverage(shape, radius, *np.meshgrid(pixels - right, pixels - middle))
        overlap = float(np.minimum(template, weights).sum() / np.maximum(template, weights).sum())
        fits[shape] = (overlap, radius, middle)
    best = max(fits, key=lambda shape: fits[shape][0])
    overlap, radius, middle = fits[best]
    if overlap < LOWEST_OVERLAP or not RADII[0] / RADIUS_SLACK <= radius <= RADII[1] * RADIUS_SLACK:
        return Judgement(colour=colour, overlap=overlap)
    return Judgement(best, colour, _place(right, middle), overlap)


def _place(right: float, down: float) -> str | None:
    """The place whose centre is as near as the world would draw it, for a point in pixels from the middle."""
    for name, (x, y) in PLACES.items():
        if max(abs(right - SIDE * x), abs(down - SIDE * y)) <= LARGEST_OFFSET + PLACE_SLACK:
            return name
    return None


def accuracy(pictures: Sequence[np.ndarray] | np.ndarray, labels: Sequence[int]) -> dict[str, float]:
    """The share of pictures [64, 64, 3] that show their class, and that are right in shape, colour and place alone."""
    seen = [judge(picture) for picture in pictures]
    wanted = [CLASSES[label] for label in labels]
    pairs = list(zip(seen, wanted, strict=True))
    result = {"all": float(np.mean([one.shows(other) for one, other in pairs]))}
    for part in ("shape", "colour", "place"):
        result[part] = float(np.mean([getattr(one, part) == getattr(other, part) for one, other in pairs]))
    return result
