"""The world that the mini image model knows: its classes, their names and their renderer.

A picture shows one flat shape on a plain dark background. Its class is what the shape is, its colour and its place:
"red circle left", or "red circle" for one in the middle. Size, exact position and background shade vary freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draftdiff.pipelines.mini.world import shape_coverage

SIDE = 64  # pixels

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (45, 195, 75),
    "blue": (65, 115, 250),
    "yellow": (245, 210, 50),
    "purple": (185, 70, 215),
    "white": (245, 245, 245),
}
# Where the shape's centre is, as a part of the side right and down from the middle.
PLACES: dict[str, tuple[float, float]] = {
    "centre": (0.0, 0.0),
    "left": (-0.225, 0.0),
    "right": (0.225, 0.0),
    "top": (0.0, -0.225),
    "bottom": (0.0, 0.225),
}
# Ranges that a picture's free choices are drawn from: radius and offset in pixels, background as a grey level 0 to 1.
RADII = (9.0, 11.5)
LARGEST_OFFSET = 2.5
BACKGROUNDS = (0.04, 0.3)


@dataclass(frozen=True)
class PictureClass:
    """What a picture shows."""

    shape: str
    colour: str
    place: str = "centre"

    @property
    def name(self) -> str:
        """For example "red circle left"; the middle needs no word."""
        return f"{self.colour} {self.shape}" + ("" if self.place == "centre" else f" {self.place}")


# A class's number is its place in this tuple.
CLASSES: tuple[PictureClass, ...] = tuple(
    PictureClass(shape, colour, place) for shape in SHAPES for colour in COLOURS for place in PLACES
)


def class_names() -> dict[int, str]:
    """Names of the classes by number, as a pipeline's id2label."""
    return {number: wanted.name for number, wanted in enumerate(CLASSES)}


def picture_coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1; `x` and `y` are the pixels' offsets from its centre."""
    if shape != "cross":
        return shape_coverage(shape, radius, x, y)
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.clip(0.5 - np.maximum(near - 0.34 * radius, far - 1.1 * radius), 0.0, 1.0)


def draw(wanted: PictureClass, radius: float, offset: tuple[float, float], background: float) -> np.ndarray:
    """One anti-aliased picture, float32 RGB in 0..1, [64, 64, 3].

    radius: of the shape, in pixels.  offset: of its centre from the place's, right and down, in pixels.
    background: grey level, 0 to 1.
    """
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5 - SIDE / 2
    right, down = (SIDE * part + shift for part, shift in zip(PLACES[wanted.place], offset))
    x, y = np.broadcast_arrays(pixels[None, :] - right, pixels[:, None] - down)
    cover = picture_coverage(wanted.shape, radius, x, y).astype(np.float32)[..., None]
    back = np.float32(background)
    return back + cover * (np.asarray(COLOURS[wanted.colour], np.float32) / 255 - back)


def random_picture(wanted: PictureClass, rng: np.random.Generator) -> np.ndarray:
    """One picture of a class with random size, position and background, float32 RGB in 0..1, [64, 64, 3]."""
    offset = rng.uniform(-LARGEST_OFFSET, LARGEST_OFFSET, 2)
    return draw(wanted, rng.uniform(*RADII), (float(offset[0]), float(offset[1])), rng.uniform(*BACKGROUNDS))


def random_pictures(labels: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A random picture of each class number, float32 RGB in 0..1, [batch, 64, 64, 3]."""
    return np.stack([random_picture(CLASSES[label], rng) for label in labels])
