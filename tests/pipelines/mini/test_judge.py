"""The judge: right on clean renders, still right on noisy ones, and unsure when there is nothing to see."""

from __future__ import annotations

import random

import numpy as np
import pytest

from draftdiff.pipelines.mini.judge import ATTRIBUTES, Judgement, compare, judge
from draftdiff.pipelines.mini.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    random_clip,
    random_scene,
)


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 64, 64), (9, 64, 64), (29, 96, 96), (13, 96, 160)])
def test_every_attribute_is_read_right_from_clean_renders(frames: int, height: int, width: int) -> None:
    rng = random.Random(0)
    for _ in range(25):
        scene = random_scene(rng, held_out=rng.random() < 0.3)
        judgement = judge(random_clip(scene, frames, height, width, rng))
        assert compare(judgement, scene) == dict.fromkeys(ATTRIBUTES, True), (scene, judgement)
        assert judgement.size == scene.size


def test_every_colour_shape_motion_and_background_is_told_apart() -> None:
    rng = random.Random(1)
    scenes = [
        Scene(colour, shape, motion, rng.choice(SIZES), background)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for background in BACKGROUNDS
    ]
    for scene in scenes:
        judgement = judge(random_clip(scene, 9, 64, 64, rng))
        assert all(compare(judgement, scene).values()), (scene, judgement)


def test_noise_and_blur_do_not_confuse_it() -> None:
    rng, noise = random.Random(2), np.random.default_rng(2)
    for _ in range(20):
        scene = random_scene(rng)
        clip = random_clip(scene, 17, 96, 96, rng)
        clip = (clip + np.roll(clip, 1, axis=1) + np.roll(clip, 1, axis=2)) / 3
        clip = np.clip(clip + noise.normal(0, 0.03, clip.shape), 0, 1)
        judgement = judge(clip)
        assert all(compare(judgement, scene).values()), (scene, judgement)


def test_a_clip_played_backwards_moves_the_other_way() -> None:
    clip = random_clip(Scene("red", "square", "left", "small", "black"), 17, 64, 64, random.Random(3))
    assert judge(clip).motion == "left"
    assert judge(clip[::-1]).motion == "right"


def test_a_still_clip_has_no_motion() -> None:
    clip = random_clip(Scene("red", "circle", "up", "large", "gray"), 9, 64, 64, random.Random(4))
    still = np.repeat(clip[:1], 9, axis=0)
    assert judge(still).motion is None
    assert judge(still).shape == "circle"


def test_an_empty_background_shows_nothing_else() -> None:
    plain = np.broadcast_to(np.asarray(BACKGROUNDS["navy"]) / 255, (9, 64, 64, 3))
    assert judge(plain) == Judgement(background="navy")


def test_pure_noise_is_not_mistaken_for_a_clip() -> None:
    video = np.random.default_rng(5).uniform(size=(9, 64, 64, 3))
    judgement = judge(video)
    assert judgement.shape is None and judgement.motion is None


def test_two_shapes_at_once_are_not_taken_for_one() -> None:
    clip = random_clip(Scene("red", "circle", "up", "small", "black"), 9, 64, 64, random.Random(6))
    assert judge(np.concatenate([clip, clip], axis=2)).shape is None


def test_a_colour_outside_the_palette_has_no_name() -> None:
    clip = random_clip(Scene("white", "circle", "up", "large", "black"), 9, 64, 64, random.Random(7))
    assert judge(clip * np.array([0.9, 0.2, 0.9])).colour is None


def test_an_open_background_counts_as_right_when_it_is_readable() -> None:
    scene = Scene("red", "circle", "up")
    assert compare(Judgement("red", "circle", "up", "gray"), scene)["background"]
    assert not compare(Judgement("red", "circle", "up", None), scene)["background"]


def test_frames_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected frames of shape"):
        judge(np.zeros((3, 9, 64, 64)))
