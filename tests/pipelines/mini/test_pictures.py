"""The world of mini pictures: names, ranges and a renderer that draws what the class says."""

from __future__ import annotations

import numpy as np
import pytest

from draftdiff.pipelines.mini.pictures import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PLACES,
    SHAPES,
    SIDE,
    PictureClass,
    class_names,
    draw,
    random_picture,
    random_pictures,
)


def test_every_shape_colour_and_place_is_a_class_with_its_own_name() -> None:
    names = class_names()
    assert len(CLASSES) == len(SHAPES) * len(COLOURS) * len(PLACES) == len(set(names.values())) == 120
    assert list(names) == list(range(120))
    assert {"red circle", "white cross bottom", "purple triangle left"} <= set(names.values())


def test_the_middle_needs_no_word() -> None:
    assert PictureClass("circle", "red").name == "red circle"
    assert PictureClass("circle", "red", "top").name == "red circle top"


def test_pictures_lie_in_range_and_keep_the_shape_inside() -> None:
    pictures = random_pictures(list(range(len(CLASSES))) * 3, np.random.default_rng(0))
    assert pictures.shape == (360, SIDE, SIDE, 3) and pictures.dtype == np.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    for edge in (pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]):
        assert np.allclose(edge, pictures[:, :1, 0], atol=1e-6)


def test_pictures_of_a_class_differ_and_a_seed_repeats_them() -> None:
    first, second = random_pictures([7, 7], np.random.default_rng(1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, random_picture(CLASSES[7], np.random.default_rng(1)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_where_its_place_says_in_its_colour(shape: str, place: str) -> None:
    picture = draw(PictureClass(shape, "white", place), 10.0, (0.0, 0.0), BACKGROUNDS[0])
    rows, columns = np.nonzero(picture[..., 0] > 0.5)
    x, y = (SIDE / 2 + SIDE * part for part in PLACES[place])
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(x, abs=1)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(y, abs=1)
    assert picture[int(y), int(x)] == pytest.approx(np.asarray(COLOURS["white"]) / 255)


def test_edges_are_smooth() -> None:
    picture = draw(PictureClass("circle", "white"), 10.3, (0.2, -0.3), 0.0)[..., 0]
    assert ((picture > 0.02) & (picture < 0.9)).sum() > 30


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        draw(PictureClass("star", "red"), 10.0, (0.0, 0.0), 0.1)
