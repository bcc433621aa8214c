"""The shipped mini image pair: it loads offline, draws what is asked, alone and with CoDe, and names damaged files."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open

from draftdiff.pipelines.mini.image import WEIGHTS, load_mini_image, load_mini_refiner, mini_image_defaults
from draftdiff.pipelines.mini.picture_judge import accuracy
from draftdiff.pipelines.mini.pictures import CLASSES, COLOURS, PLACES, SHAPES, SIDE, class_names, random_pictures
from draftdiff.pipelines.var import VARPipeline
from tests.rounding import rounded

SCRIPT = Path(__file__).resolve().parents[3] / "samples" / "training" / "score_mini_image.py"
PARTS = ("transformer", "refiner", "vae")


@pytest.fixture(scope="module")
def pipe() -> VARPipeline:
    loaded = load_mini_image()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def score() -> ModuleType:
    spec = importlib.util.spec_from_file_location("score_mini_image", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_plain_var_in_full_precision_until_a_refiner_is_asked_for(pipe: VARPipeline) -> None:
    assert type(pipe) is VARPipeline and pipe.refiner is None and pipe.config.draft_scales is None
    assert {p.dtype for part in (pipe.transformer, pipe.vae) for p in part.parameters()} == {torch.float32}
    assert not pipe.transformer.training and not pipe.vae.training
    together = load_mini_image(draft_scales=4)
    assert together.refiner is not None and together.config.draft_scales == 4


def test_another_precision_can_be_asked_for() -> None:
    assert {p.dtype for p in load_mini_refiner(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_drafter_is_about_four_times_the_refiner(pipe: VARPipeline) -> None:
    ratio = sum(p.numel() for p in pipe.transformer.parameters()) / sum(
        p.numel() for p in load_mini_refiner().parameters()
    )
    assert 3.5 <= ratio <= 4.5


def test_it_knows_the_classes_of_the_world_by_name(pipe: VARPipeline) -> None:
    assert {int(number): name for number, name in pipe.config.id2label.items()} == class_names()
    assert pipe.get_label_ids(["red circle", CLASSES[-1].name]) == [0, len(CLASSES) - 1]
    with pytest.raises(ValueError, match="unknown class 'pink circle'"):
        pipe("pink circle")


def test_the_settings_file_agrees_with_the_world_and_the_call(pipe: VARPipeline) -> None:
    settings = mini_image_defaults()
    assert settings["words"] == {"shapes": list(SHAPES), "colours": list(COLOURS), "places": list(PLACES)}
    assert settings["class_example"] in class_names().values()
    assert 1 <= settings["draft_scales"] < len(pipe.scheduler)
    call = settings["generate"]
    assert (pipe.scheduler.config.top_k, pipe.scheduler.config.top_p) == (call["top_k"], call["top_p"])


def test_loading_prints_warns_and_logs_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mini_image(draft_scales=1)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == "" and caplog.messages == []


def test_the_weights_are_half_precision_and_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 15_000_000
    for part in PARTS:
        with safe_open(WEIGHTS / part / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_pictures_survive_the_codes(pipe: VARPipeline) -> None:
    labels = list(range(0, len(CLASSES), 3))
    pictures = random_pictures(labels, np.random.default_rng(0))
    with torch.no_grad():
        restored = pipe.vae(torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1).sample
    restored = (restored.clamp(-1, 1).permute(0, 2, 3, 1) + 1) / 2
    assert accuracy(restored.numpy(), labels)["all"] >= 0.95


@pytest.mark.parametrize("draft_scales", [None, 5])
def test_a_handful_of_classes_comes_out_right(score: ModuleType, draft_scales: int | None) -> None:
    labels = list(range(3, len(CLASSES), 10))  # every shape, colour and two places
    pipe = load_mini_image(draft_scales)
    pipe.set_progress_bar_config(disable=True)
    pictures = score.generate(pipe, labels, batch=len(labels), seed=0, **mini_image_defaults()["generate"])
    assert pictures.shape == (len(labels), SIDE, SIDE, 3)
    assert accuracy(pictures, labels)["all"] >= 0.75


def test_a_picture_does_not_depend_on_its_batch(score: ModuleType, pipe: VARPipeline) -> None:
    call = mini_image_defaults()["generate"]

    def pictures(batch: int) -> torch.Tensor:
        return torch.from_numpy(score.generate(pipe, [0, 61, 119], batch, seed=3, **call))

    rounded(lambda: pictures(3)).check(pictures(1))


def test_the_confidence_interval_is_wilsons(score: ModuleType) -> None:
    low, high = score.wilson_interval(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert score.wilson_interval(1.0, 240)[1] == pytest.approx(1.0)


@pytest.mark.slow
def test_all_classes_come_out_right_alone_and_with_code(score: ModuleType) -> None:
    labels, settings = list(range(len(CLASSES))) * 4, mini_image_defaults()
    shares = {}
    for draft_scales in (None, settings["draft_scales"]):
        pipe = load_mini_image(draft_scales)
        pipe.set_progress_bar_config(disable=True)
        pictures = score.generate(pipe, labels, batch=20, seed=0, **settings["generate"])
        shares[draft_scales] = accuracy(pictures, labels)["all"]
    plain, collaborative = shares.values()
    assert plain >= 0.9
    assert collaborative >= plain - 0.04  # two points, and the noise of 480 pictures


def test_a_number_of_drafted_scales_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="draft_scales must be a whole number from 1 to 6, got 7"):
        load_mini_image(draft_scales=7)
