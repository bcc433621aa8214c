"""The embedded model draws what held-out prompts ask for, dense and sparse. Minutes: run by `make test-slow`."""

import importlib.util
from pathlib import Path

import pytest

import draftdiff
from draftdiff.pipelines.mini.video import load_mini_video, mini_video_defaults
from draftdiff.pipelines.mini.world import even_scenes

SCRIPT = Path(__file__).resolve().parents[3] / "samples" / "training" / "score_mini_video.py"
PROMPTS = 9  # each held-out combination once


@pytest.mark.slow
def test_held_out_prompts_come_out_right_dense_and_at_the_default_sparsity():
    spec = importlib.util.spec_from_file_location("score_mini_video", SCRIPT)
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    pipe = load_mini_video()
    pipe.set_progress_bar_config(disable=True)
    scenes = even_scenes(PROMPTS, held_out=True)
    call = mini_video_defaults()["generate"]
    dense = score.accuracy(score.generate(pipe, scenes, 2, 0, **call), scenes)
    draftdiff.enable(pipe)
    sparse = score.accuracy(score.generate(pipe, scenes, 2, 0, **call), scenes)
    assert dense["all"] >= 0.8
    assert sparse["all"] >= 0.75
