"""The judge of mini pictures: right on clean and on blurred ones, and unsure when there is nothing to see."""

from __future__ import annotations

import numpy as np
import pytest

from draftdiff.pipelines.mini.picture_judge import Judgement, accuracy, judge
from draftdiff.pipelines.mini.pictures import CLASSES, SIDE, PictureClass, draw, random_picture, random_pictures

LABELS = list(range(len(CLASSES)))


def test_it_knows_every_class_of_the_world() -> None:
    labels = LABELS * 3
    pictures = random_pictures(labels, np.random.default_rng(0))
    assert accuracy(pictures, labels)["all"] >= 0.99


def test_blur_and_noise_do_not_confuse_it() -> None:
    rng = np.random.default_rng(1)
    pictures = random_pictures(LABELS, rng)
    pictures = sum(np.roll(pictures, shift, (1, 2)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1))) / 4
    pictures = np.clip(pictures + rng.normal(0, 0.03, pictures.shape), 0, 1)
    assert accuracy(pictures, LABELS)["all"] >= 0.97


def test_it_always_says_the_same_of_the_same_picture() -> None:
    picture = random_picture(CLASSES[3], np.random.default_rng(2))
    assert judge(picture) == judge(picture.copy())


def test_a_picture_shows_its_own_class_and_no_other() -> None:
    rng = np.random.default_rng(3)
    for label in (0, 17, 58, 119):
        seen = judge(random_picture(CLASSES[label], rng))
        assert [other for other in LABELS if seen.shows(other)] == [label]
        assert seen.shows(CLASSES[label])


def test_a_mirrored_picture_is_in_the_other_place() -> None:
    picture = random_picture(PictureClass("square", "green", "left"), np.random.default_rng(4))
    assert judge(picture).place == "left" and judge(picture[:, ::-1]).place == "right"


def test_a_triangle_upside_down_is_none_of_the_shapes() -> None:
    picture = draw(PictureClass("triangle", "red"), 11.0, (0.0, 0.0), 0.1)
    assert judge(picture).shape == "triangle" and judge(picture[::-1]).shape != "triangle"


def test_an_empty_picture_shows_nothing() -> None:
    assert judge(np.full((SIDE, SIDE, 3), 0.2)) == Judgement()


def test_noise_is_not_mistaken_for_a_shape() -> None:
    assert judge(np.random.default_rng(5).uniform(size=(SIDE, SIDE, 3))).shape is None


def test_two_shapes_at_once_are_not_taken_for_one() -> None:
    left = draw(PictureClass("circle", "red", "left"), 10.0, (0.0, 0.0), 0.1)
    right = draw(PictureClass("circle", "red", "right"), 10.0, (0.0, 0.0), 0.1)
    assert judge(np.maximum(left, right)).shape is None


def test_a_shape_between_two_places_is_in_neither() -> None:
    assert judge(draw(PictureClass("circle", "red"), 10.0, (7.5, 0.0), 0.1)).place is None
    assert judge(draw(PictureClass("circle", "red", "left"), 10.0, (0.0, -7.5), 0.1)).place is None


def test_a_shape_too_large_or_too_small_for_the_world_is_refused() -> None:
    for radius in (6.0, 15.0):
        assert judge(draw(PictureClass("circle", "red"), radius, (0.0, 0.0), 0.1)).shape is None


def test_a_colour_outside_the_palette_has_no_name() -> None:
    picture = draw(PictureClass("circle", "white"), 10.0, (0.0, 0.0), 0.1)
    assert judge(picture * np.array([0.2, 0.9, 0.9])).colour is None


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a picture of shape \(64, 64, 3\), got \(32, 64, 3\)"):
        judge(np.zeros((32, 64, 3)))
