"""The shipped mini video pipeline: it loads offline, makes clips of the asked size, and reports damage in one line."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from draftdiff.pipelines.mini import world
from draftdiff.pipelines.mini.video import WEIGHTS, load_mini_video, mini_video_defaults


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    loaded = load_mini_video()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_a_stock_wan_pipeline_in_the_asked_precision(pipe: WanPipeline) -> None:
    assert type(pipe) is WanPipeline
    assert type(pipe.transformer) is WanTransformer3DModel and type(pipe.vae) is AutoencoderKLWan
    assert {p.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.vae) for p in part.parameters()} == {
        torch.float32
    }
    assert pipe.transformer.config.attention_head_dim == 64


def test_loading_prints_and_warns_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mini_video()
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_two_steps_give_a_clip_of_the_asked_size(pipe: WanPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    call = mini_video_defaults()["generate"] | {"num_frames": 5, "height": 64, "width": 80, "num_inference_steps": 2}
    frames = pipe("a red circle moves right", generator=generator, output_type="np", **call).frames
    assert frames.shape == (1, 5, 64, 80, 3)
    assert np.isfinite(frames).all() and frames.std() > 0


def test_the_default_clip_has_at_least_two_thousand_video_tokens(pipe: WanPipeline) -> None:
    call = mini_video_defaults()["generate"]
    steps, rows, columns = pipe.transformer.config.patch_size
    latent_frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    tokens = (latent_frames // steps) * (call["height"] // (pipe.vae_scale_factor_spatial * rows))
    assert tokens * (call["width"] // (pipe.vae_scale_factor_spatial * columns)) >= 2000


def test_the_tokenizer_knows_every_caption_and_fits_it_in(pipe: WanPipeline) -> None:
    rng = random.Random(0)
    limit = mini_video_defaults()["generate"]["max_sequence_length"]
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(500)]
    for ids in pipe.tokenizer(captions).input_ids:
        assert pipe.tokenizer.unk_token_id not in ids and len(ids) <= limit
    synonyms = pipe.tokenizer("A BIG red circle, moving rightwards!").input_ids
    assert synonyms == pipe.tokenizer("a large red circle moving right").input_ids
    assert pipe.tokenizer.unk_token_id in pipe.tokenizer("a purple circle").input_ids


def test_the_settings_file_agrees_with_the_mini_world() -> None:
    settings = mini_video_defaults()
    assert settings["words"]["colours"] == list(world.COLOURS)
    assert settings["words"]["backgrounds"] == list(world.BACKGROUNDS)
    assert {tuple(c) for c in settings["held_out_combinations"]} == set(world.HELD_OUT)
    assert settings["fps"] > 0


def test_the_weights_stay_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 25_000_000
