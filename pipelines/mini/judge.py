"""A rule-based judge for mini-world clips: looks at frames alone and says what they show.

It measures the background's colour, separates the shape from it, and reads colour, shape, direction and size off
that. Whatever is not clear, such as two shapes, a smear or no motion, it reports as None rather than guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from draftdiff.errors import UserError
from draftdiff.pipelines.mini.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    radius_for,
    shape_coverage,
)

ATTRIBUTES = ("colour", "shape", "motion", "background")

# Distances in RGB with channels in 0..1. The closest two palette entries are 0.33 apart, so 0.2 still tells them apart
# in a picture that is a little off, and leaves a colour that belongs to neither unnamed.
NEAR_ENOUGH = 0.2
FAINTEST_SHAPE = 0.15
LOWEST_OVERLAP = 0.75
SHORTEST_TRAVEL = 0.08


@dataclass(frozen=True)
class Judgement:
    """What the frames show; None where that is not clear. `overlap` is how well the best shape fits, 0 to 1."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None
    size: str | None = None
    overlap: float = 0.0


def nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The colour of a palette that a value, RGB in 0..1, is near enough to."""
    distances = {name: float(np.linalg.norm(value - np.asarray(rgb) / 255)) for name, rgb in palette.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= NEAR_ENOUGH else None


def _overlaps(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """For each shape, how well one of the same area and centre of mass covers the weights (soft overlap over union)."""
    area = float(weights.sum())
    centre_x, centre_y = float((weights * x).sum() / area), float((weights * y).sum() / area)
    scores = {}
    for shape in SHAPES:
        # A triangle's area is 2.546 r^2, the others' pi r^2; its centre of mass lies 0.35 r below its box's centre.
        radius = np.sqrt(area / (2.546 if shape == "triangle" else np.pi))
        drop = 0.35 * radius if shape == "triangle" else 0.0
        template = shape_coverage(shape, radius, x - centre_x, y - centre_y + drop)
        scores[shape] = float(np.minimum(template, weights).sum() / np.maximum(template, weights).sum())
    return scores


def _direction(centres: np.ndarray, times: np.ndarray, frames: int, side: int) -> str | None:
    """The direction of a straight-line fit through the centres, if it goes far enough and mostly along one axis."""
    slopes = np.polyfit(times, centres, 1)[0] * (frames - 1)
    axis = int(np.argmax(np.abs(slopes)))
    if abs(slopes[axis]) < max(SHORTEST_TRAVEL * side, 2.0) or abs(slopes[axis]) < 2 * abs(slopes[1 - axis]):
        return None
    step = [0, 0]
    step[axis] = int(np.sign(slopes[axis]))
    return next(name for name, direction in MOTIONS.items() if direction == tuple(step))


def judge(video: np.ndarray) -> Judgement:
    """Say what a clip shows. `video` is RGB in 0..1, shape (frames, height, width, 3)."""
    video = np.asarray(video, dtype=np.float32)
    if video.ndim != 4 or video.shape[-1] != 3:
        raise UserError(f"expected frames of shape (frames, height, width, 3), got {video.shape}")
    frames, height, width, _ = video.shape
    border = np.concatenate([video[:, :2], video[:, -2:]], axis=1).reshape(-1, 3)
    sides = np.concatenate([video[:, :, :2], video[:, :, -2:]], axis=2).reshape(-1, 3)
    plain = np.median(np.concatenate([border, sides]), axis=0)
    background = nearest(plain, BACKGROUNDS)

    contrast = np.linalg.norm(video - plain, axis=-1)
    peak = float(np.percentile(contrast, 99))
    if peak < FAINTEST_SHAPE:
        return Judgement(background=background)
    weights = np.clip((contrast / peak - 0.2) / 0.6, 0.0, 1.0)
    colour = nearest(np.median(video[contrast > 0.8 * peak], axis=0), COLOURS)

    x = np.arange(width, dtype=np.float32)[None, :] + 0.5
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    areas = weights.sum(axis=(1, 2))
    visible = np.flatnonzero(areas > max(4.0, 0.25 * float(np.median(areas))))
    if len(visible) < max(1, frames // 2):
        return Judgement(colour=colour, background=background)
    totals = areas[visible]
    centres = np.stack(
        [(weights[visible] * x).sum(axis=(1, 2)) / totals, (weights[visible] * y).sum(axis=(1, 2)) / totals], axis=1
    )
    motion = _direction(centres, visible.astype(np.float64), frames, min(height, width)) if len(visible) > 1 else None

    sampled = visible[np.unique(np.linspace(0, len(visible) - 1, 8).round().astype(int))]
    scores = [_overlaps(weights[i], x, y) for i in sampled]
    means = {shape: float(np.mean([score[shape] for score in scores])) for shape in SHAPES}
    best = max(means, key=lambda shape: means[shape])
    shape = best if means[best] >= LOWEST_OVERLAP else None
    radius = float(np.sqrt(np.median(totals) / (2.546 if best == "triangle" else np.pi)))
    middle = float(np.sqrt(radius_for("small", height, width) * radius_for("large", height, width)))
    return Judgement(colour, shape, motion, background, "small" if radius < middle else "large", means[best])


def compare(judgement: Judgement, scene: Scene) -> dict[str, bool]:
    """Which of the four attributes came out as asked; one that the scene leaves open counts as right if readable."""
    result = {}
    for attribute in ATTRIBUTES:
        wanted, seen = getattr(scene, attribute), getattr(judgement, attribute)
        result[attribute] = seen is not None if wanted is None else seen == wanted
    return result
