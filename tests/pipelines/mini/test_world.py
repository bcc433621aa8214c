"""The mini world: what is held out stays out, captions read back, and the renderer draws what the scene says."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from draftdiff.pipelines.mini import world
from draftdiff.pipelines.mini.world import HELD_OUT, Scene, caption, parse_caption, plain_caption, random_scene


def test_training_scenes_never_use_a_held_out_combination() -> None:
    rng = random.Random(0)
    seen = {random_scene(rng).combination for _ in range(3000)}
    assert not seen & set(HELD_OUT)
    assert seen == set(world.combinations(held_out=False))


def test_held_out_scenes_use_only_held_out_combinations() -> None:
    rng = random.Random(0)
    assert {random_scene(rng, held_out=True).combination for _ in range(500)} == set(HELD_OUT)


def test_about_fifteen_percent_are_held_out_and_every_pair_of_attributes_is_still_trained() -> None:
    total = len(world.COLOURS) * len(world.SHAPES) * len(world.MOTIONS)
    assert 0.12 <= len(set(HELD_OUT)) / total <= 0.18
    trained = world.combinations(held_out=False)
    for first, second in itertools.combinations(range(3), 2):
        every = {(c[first], c[second]) for c in trained + list(HELD_OUT)}
        assert {(c[first], c[second]) for c in trained} == every


def test_every_wording_reads_back_as_its_scene() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        scene = random_scene(rng, held_out=rng.random() < 0.2)
        text = caption(scene, rng)
        read = parse_caption(text)
        assert read is not None, text
        assert read.combination == scene.combination, text
        assert read.size in (None, scene.size) and read.background in (None, scene.background), text


def test_the_plain_caption_reads_back_exactly() -> None:
    rng = random.Random(2)
    for _ in range(200):
        scene = random_scene(rng)
        assert parse_caption(plain_caption(scene)) == scene


def test_captions_vary_and_use_known_words_only() -> None:
    rng = random.Random(3)
    scene = random_scene(rng)
    texts = {caption(scene, rng) for _ in range(200)}
    assert len(texts) > 20
    assert {word for text in texts for word in text.split()} <= set(world.vocabulary())


def test_synonyms_and_capitals_are_understood_and_other_text_is_not() -> None:
    read = parse_caption("A BIG Red circle, moving rightwards on a grey background.")
    assert read == Scene("red", "circle", "right", "large", "gray")
    assert parse_caption("a cat plays the piano") is None


@pytest.mark.parametrize(("frames", "height", "width"), [(29, 128, 128), (17, 64, 64), (9, 96, 160), (1, 64, 64)])
def test_clips_have_the_asked_size_and_keep_the_shape_inside(frames: int, height: int, width: int) -> None:
    rng = random.Random(4)
    for _ in range(20):
        scene = random_scene(rng)
        clip = world.random_clip(scene, frames, height, width, rng)
        assert clip.shape == (frames, height, width, 3)
        assert clip.dtype == np.float32 and clip.min() >= 0 and clip.max() <= 1
        assert scene.background is not None
        plain = np.asarray(world.BACKGROUNDS[scene.background], np.float32) / 255
        edges = [clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]]
        assert all(np.allclose(edge, plain, atol=1e-6) for edge in edges), scene


def test_the_shape_moves_the_way_the_scene_says() -> None:
    rng = random.Random(5)
    for motion, (dx, dy) in world.MOTIONS.items():
        clip = world.random_clip(Scene("white", "circle", motion, "small", "black"), 9, 64, 64, rng).mean(-1)
        rows, columns = np.mgrid[:64, :64]
        weights = clip - clip.min()
        first, last = weights[0] / weights[0].sum(), weights[-1] / weights[-1].sum()
        moved = (float(((last - first) * columns).sum()), float(((last - first) * rows).sum()))
        assert moved[0] * dx + moved[1] * dy > 5
        assert abs(moved[0] * dy) + abs(moved[1] * dx) < 0.1


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        world.random_clip(Scene("red", "star", "up", "small", "black"), 5, 64, 64, random.Random(0))
