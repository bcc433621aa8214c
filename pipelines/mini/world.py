"""The tiny world that the mini video model knows: its words, its captions and its renderer.

A clip shows one flat shape crossing a plain background at constant speed. A `Scene` says which; `caption` puts a
scene into words, `parse_caption` reads such words back, and `render` draws the scene as anti-aliased RGB frames.
Some (colour, shape, motion) combinations, `HELD_OUT`, are never used in training: they test whether the model
composes what it has learnt.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np

from draftdiff.errors import UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (45, 195, 75),
    "blue": (65, 115, 250),
    "yellow": (245, 210, 50),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 16),
    "gray": (112, 112, 116),
    "navy": (22, 30, 100),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = ("small", "large")

# Every colour, shape, motion and every pair of them still occurs in training; only these triples never do.
HELD_OUT: tuple[tuple[str, str, str], ...] = (
    ("red", "square", "left"),
    ("red", "triangle", "up"),
    ("green", "circle", "down"),
    ("green", "triangle", "right"),
    ("blue", "circle", "left"),
    ("blue", "square", "up"),
    ("yellow", "triangle", "down"),
    ("yellow", "circle", "up"),
    ("white", "square", "right"),
)

# Other spellings; the tokenizer folds them into the model's own words, so the model need not learn them.
SYNONYMS: dict[str, str] = {
    "grey": "gray",
    "big": "large",
    "little": "small",
    "tiny": "small",
    "upward": "up",
    "upwards": "up",
    "downward": "down",
    "downwards": "down",
    "leftward": "left",
    "leftwards": "left",
    "rightward": "right",
    "rightwards": "right",
}

FUNCTION_WORDS = ("a", "the", "is", "moves", "moving", "slides", "to", "on", "over", "background", "video", "of")


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `size` and `background` may be None in a caption's reading: the caption leaves them open."""

    colour: str
    shape: str
    motion: str
    size: str | None = None
    background: str | None = None

    @property
    def combination(self) -> tuple[str, str, str]:
        return (self.colour, self.shape, self.motion)


@dataclass(frozen=True)
class Layout:
    """Where the shape is: its radius, its centre in the first frame, and its step per frame, in pixels."""

    radius: float
    start: tuple[float, float]
    step: tuple[float, float]


def vocabulary() -> list[str]:
    """Every word the model knows, in a fixed order."""
    return [*FUNCTION_WORDS, *COLOURS, *SHAPES, *MOTIONS, *SIZES, *BACKGROUNDS]


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """All (colour, shape, motion) combinations that are held out of training, or all that are not."""
    return [
        (colour, shape, motion)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        if ((colour, shape, motion) in HELD_OUT) == held_out
    ]


def even_scenes(count: int, held_out: bool, seed: int = 0) -> list[Scene]:
    """A fixed list of scenes that goes through the combinations, sizes and backgrounds as evenly as it can."""
    rng = random.Random(seed)
    chosen: list[tuple[str, str, str]] = []
    while len(chosen) < count:
        block = combinations(held_out)
        rng.shuffle(block)
        chosen += block
    looks = [(size, background) for background in BACKGROUNDS for size in SIZES]
    return [Scene(*chosen[i], *looks[i % len(looks)]) for i in range(count)]


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A fully specified scene, from the training combinations or from the held-out ones."""
    colour, shape, motion = rng.choice(combinations(held_out))
    return Scene(colour, shape, motion, rng.choice(SIZES), rng.choice(list(BACKGROUNDS)))


def plain_caption(scene: Scene) -> str:
    """The standard wording, for example "a small red circle moves right on a black background"."""
    size = f"{scene.size} " if scene.size else ""
    background = f" on a {scene.background} background" if scene.background else ""
    return f"a {size}{scene.colour} {scene.shape} moves {scene.motion}{background}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many wordings of the scene; now and then it leaves the size or the background out."""
    size = f"{scene.size} " if rng.random() < 0.7 else ""
    subject = f"{size}{scene.colour} {scene.shape}"
    if rng.random() < 0.85:
        subject = f"{rng.choices(['a', 'the', 'a video of a'], [7, 2, 1])[0]} {subject}"
    verb = rng.choices(["moves", "moving", "is moving", "slides"], [5, 3, 1, 1])[0]
    action = (
        f"{verb} {scene.motion}"
        if scene.motion in ("up", "down") or rng.random() < 0.6
        else (f"{verb} to the {scene.motion}")
    )
    if rng.random() < 0.2:
        return f"{subject} {action}"
    place = rng.choices(
        [f"on a {scene.background} background", f"over a {scene.background} background", f"on {scene.background}"],
        [6, 2, 2],
    )[0]
    return f"{place} {subject} {action}" if rng.random() < 0.1 else f"{subject} {action} {place}"


def parse_caption(text: str) -> Scene | None:
    """Read a caption back into a scene, or None if it names no colour, shape or motion of this world."""
    words = [SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]

    def first(choices: object) -> str | None:
        return next((word for word in words if word in choices), None)  # type: ignore[operator]

    colour, shape, motion = first(COLOURS), first(SHAPES), first(MOTIONS)
    if colour is None or shape is None or motion is None:
        return None
    return Scene(colour, shape, motion, first(SIZES), first(BACKGROUNDS))


def radius_for(size: str, height: int, width: int) -> float:
    """The nominal radius of a shape. It grows more slowly than the frame, so small clips look like close-ups."""
    side = min(height, width)
    return 4.5 + 0.094 * side if size == "small" else 6.0 + 0.14 * side


def random_layout(scene: Scene, frames: int, height: int, width: int, rng: random.Random) -> Layout:
    """A path through the middle part of the frame, along which the shape stays wholly inside."""
    side = min(height, width)
    radius = radius_for(scene.size or "large", height, width) * rng.uniform(0.94, 1.06)
    dx, dy = MOTIONS[scene.motion]
    length, across = (width, height) if dx else (height, width)
    reach = 1.25 * radius
    room = max(length - 2 * reach - 2.0, 0.0)
    travel = min((0.8 + 0.011 * side) * rng.uniform(0.92, 1.08) * (frames - 1), room)
    along_slack = min((room - travel) / 2, 0.09 * length)
    across_slack = min(max(across / 2 - reach - 1.0, 0.0), 0.16 * across)
    middle = length / 2 + rng.uniform(-1, 1) * along_slack
    cross = across / 2 + rng.uniform(-1, 1) * across_slack
    speed = travel / max(frames - 1, 1)
    if dx:
        return Layout(radius, (middle - dx * travel / 2, cross), (dx * speed, 0.0))
    return Layout(radius, (cross, middle - dy * travel / 2), (0.0, dy * speed))


def shape_coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1; `x` and `y` are the pixels' offsets from its centre."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        half = 0.886 * radius
        distance = np.maximum(np.abs(x), np.abs(y)) - half
    elif shape == "triangle":
        # An equilateral triangle pointing up, its bounding box centred: three half-planes.
        outer = 1.4 * radius
        down = y - 0.25 * outer - outer / 2
        slanted = 0.5 * np.sqrt(3.0) * np.abs(x) - 0.5 * (y - 0.25 * outer) - outer / 2
        distance = np.maximum(down, slanted)
    else:
        raise UserError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, layout: Layout, frames: int, height: int, width: int) -> np.ndarray:
    """Draw the scene: float32 RGB in 0..1, shape (frames, height, width, 3)."""
    if scene.background is None:
        raise UserError("a scene needs a background to be rendered")
    time = np.arange(frames, dtype=np.float32)[:, None, None]
    x = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - layout.start[0] - layout.step[0] * time
    y = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - layout.start[1] - layout.step[1] * time
    shape = (frames, height, width)
    cover = shape_coverage(scene.shape, layout.radius, np.broadcast_to(x, shape), np.broadcast_to(y, shape))
    cover = cover.astype(np.float32)[..., None]
    back = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255
    front = np.asarray(COLOURS[scene.colour], np.float32) / 255
    return back + cover * (front - back)


def random_clip(scene: Scene, frames: int, height: int, width: int, rng: random.Random) -> np.ndarray:
    """Render the scene along a random path."""
    return render(scene, random_layout(scene, frames, height, width, rng), frames, height, width)
