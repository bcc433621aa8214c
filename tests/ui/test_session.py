"""The page's work: both clips are what the library makes, dense ones are kept, and cancel stops between steps."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from draftdiff import disable, enable
from draftdiff.errors import UserError
from draftdiff.models.frames import frames_of
from draftdiff.ui import session as module
from draftdiff.ui.session import Cancelled, Session
from tests.tiny_pipeline import TINY_CALL
from tests.ui.conftest import BASE


def made(pipeline, asked, config=None):
    disable(pipeline)
    if config is not None:
        enable(pipeline, config)
    generator = torch.Generator().manual_seed(asked.seed)
    frames = frames_of(pipeline(prompt=asked.prompt, generator=generator, output_type="np", **TINY_CALL))
    disable(pipeline)
    return frames


def test_both_clips_are_those_of_the_library(session, pipeline, asked):
    shown = session.run(asked)
    assert np.array_equal(shown.dense.frames, made(pipeline, asked))
    assert np.array_equal(shown.sparse.frames, made(pipeline, asked, replace(BASE, sparsity=0.5)))
    assert not np.array_equal(shown.dense.frames, shown.sparse.frames)
    assert 10 < shown.psnr < 100 and 0 < shown.ssim < 1
    assert shown.speedup > 0 and shown.attention_speedup > 0
    (report,) = shown.sparse.reports
    assert (report.dense_steps, report.sparse_steps) == (1, 2)
    assert not shown.notes


def test_another_sparsity_makes_the_sparse_clip_alone(session, asked):
    names = []
    first = session.run(asked, lambda now: names.append(now.what))
    assert {"dense", "sparse"} < set(names)
    names.clear()
    second = session.run(replace(asked, sparsity=0.8), lambda now: names.append(now.what))
    assert set(names) == {"sparse"}
    assert np.array_equal(first.dense.frames, second.dense.frames)
    assert second.notes == ["the dense clip is that of an earlier run, its time too"]
    names.clear()
    session.run(replace(asked, seed=4), lambda now: names.append(now.what))
    assert set(names) == {"dense", "sparse"}  # and no further warm-up


def test_arguments_of_the_command_line_hold_for_every_run(session, pipeline, asked):
    given = {**TINY_CALL, "negative_prompt": "green", "attention_kwargs": {}}  # such as an image, which has no hash
    told = Session(session.model, BASE, call=given).run(replace(asked, steps=2, frames=5))
    assert told.dense.frames.shape[0] == 5 and told.sparse.reports[0].dense_steps == 1
    given |= {"num_inference_steps": 2, "num_frames": 5}
    generator = torch.Generator().manual_seed(asked.seed)
    alone = frames_of(pipeline(prompt=asked.prompt, generator=generator, output_type="np", **given))
    assert np.array_equal(told.dense.frames, alone)


def test_dense_clips_are_kept_up_to_a_size(session, asked, monkeypatch):
    one = session.run(asked).dense.frames.nbytes
    monkeypatch.setattr(module, "_KEPT", 2 * one)
    for seed in (1, 2):
        session.run(replace(asked, seed=seed))
    assert len(session._runs) == 2
    assert session.run(replace(asked, seed=2)).notes and not session.run(asked).notes


def test_steps_and_the_time_left_are_told(session, asked):
    told = []
    session.run(asked, told.append)
    dense = [now for now in told if now.what == "dense"]
    assert [(now.step, now.steps) for now in dense] == [(0, 0), (1, 3), (2, 3), (3, 3)]
    assert dense[1].left > 0 and dense[3].left == 0
    assert str(dense[0]) == "dense" and str(dense[2]).startswith("dense: step 2 of 3, ")


def test_cancel_stops_before_the_next_step_and_the_session_goes_on(session, asked):
    steps = []

    def tell(now):
        steps.append((now.what, now.step))
        if (now.what, now.step) == ("dense", 1):
            session.cancel("me")

    with pytest.raises(Cancelled):
        session.run(asked, tell, visitor="me")
    assert steps[-1] == ("dense", 1)
    assert session.run(asked).psnr > 10
    assert "progress_bar" not in vars(session.model.pipeline)


def test_cancel_is_for_ones_own_run(session, asked):
    reached, finished = threading.Event(), threading.Event()

    def tell(now):
        if now.what == "dense" and now.step == 1:
            reached.set()

    def other():
        session.run(asked, tell, visitor="other")
        finished.set()

    thread = threading.Thread(target=other)
    thread.start()
    reached.wait(60)
    session.cancel("me")
    thread.join(60)
    assert finished.is_set()


def test_cancel_reaches_a_run_that_waits_for_another(session, asked):
    ended = []
    session._lock.acquire()

    def wait():
        with pytest.raises(Cancelled):
            session.run(asked, visitor="me")
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    while "me" not in session._asked_to_stop:
        time.sleep(0.01)
    session.cancel_all()
    session._lock.release()
    thread.join(60)
    assert ended


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 2001}, "at most 2000 letters, got 2001"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
        ({"sparsity": None}, "there is no profile: start draftdiff ui with --profile FILE"),
        ({"frames": 8}, "--frames must be a multiple of 4 plus 1 for this model, got 8"),
        ({"width": 100}, "--width must be a multiple of 16"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_made_is_told_before_anything_is(session, asked, change, told):
    with pytest.raises(UserError) as error:
        session.run(replace(asked, **change), lambda now: pytest.fail(str(now)))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_profile_is_used_as_it_is(session, asked):
    profile = replace(BASE, sparsity=0.6, dense_steps=2)
    tuned = Session(session.model, BASE, profile)
    (report,) = tuned.run(replace(asked, sparsity=None)).sparse.reports
    assert (report.dense_steps, report.sparse_steps) == (2, 1)


def test_a_run_without_a_sparse_step_says_so(session, asked):
    dense = Session(session.model, replace(BASE, dense_steps=1.0))
    shown = dense.run(asked)
    assert shown.notes == ["no step was sparse: too few steps or tokens for these settings"]
    assert shown.psnr == 100
