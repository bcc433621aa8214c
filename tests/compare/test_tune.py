"""A profile meets its target on the prompts it was tuned with, with the least work that does, and says what it is."""

from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
import torch

from draftdiff import DraftAttentionConfig, report
from draftdiff.compare import tune as tuning
from draftdiff.compare import tune_line, tune_page
from draftdiff.compare.metrics import psnr
from draftdiff.compare.tune import Check, Target, search
from draftdiff.compare.video_run import run_setting
from draftdiff.core.allocation import Allocation
from draftdiff.errors import UserError
from draftdiff.video.sensitivity import Sensitivity
from tests.tiny_pipeline import TINY_CALL, tiny_wan_pipeline

PROMPTS = ["a red circle moves left"]
BASE = DraftAttentionConfig(selection="error", tile=(1, 4, 4), min_tokens=0)


def costs(self):
    """As on a GPU: a little for the draft, and more than dense where all is read."""
    times = 0.05 + 1.2 * torch.tensor(self.ladder, dtype=torch.float64)
    return times.expand(len(self.tokens), -1), 1.0


@pytest.fixture(scope="module")
def tuned():
    """The first head of the second layer adds nothing to the video."""
    pipeline = tiny_wan_pipeline()
    torch.nn.init.zeros_(pipeline.transformer.blocks[1].attn1.to_out[0].weight[:, :12])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sensitivity, "costs", costs)
        found = search(pipeline, PROMPTS, target="60 dB", call_kwargs=TINY_CALL, config=BASE, progress=False)
    return pipeline, found


def test_the_profile_meets_its_target_when_rendered_again_and_the_pipeline_is_left_without_draftdiff(tuned):
    pipeline, found = tuned
    with pytest.raises(UserError, match="draftdiff is not enabled"):
        report(pipeline)
    dense, sparse = (run_setting(pipeline, config, PROMPTS[0], 0, TINY_CALL) for config in (None, found.profile.config))
    assert any(one.sparse_steps for one in sparse.reports)
    assert psnr(sparse.frames, dense.frames) >= 60
    assert found.profile.measured["psnr"] == [pytest.approx(psnr(sparse.frames, dense.frames))]


def test_the_head_that_adds_nothing_gets_the_least_and_another_more(tuned):
    density = tuned[1].results[tuned[1].chosen].allocation.density
    planted, other = density[:, 1].mean(0)
    assert planted < other or other == 1  # a layer left dense is so for all its heads
    assert density[:, 1].amin() == tuning.LADDER[0] and density[:, 0].mean() > planted


def test_the_profile_says_what_it_is_for_and_with_what_it_was_found(tuned):
    profile = tuned[1].profile
    assert str(profile.config.made_for) == "WanTransformer3DModel with 2 layers of 2 heads"
    assert profile.grid == (3, 8, 8) and profile.steps == 3 and profile.target == "60 dB"
    assert profile.measured["prompts"] == PROMPTS and profile.versions["torch"]
    assert profile.config.dense_steps == 0 and profile.config.dense_layers == 0


def test_the_table_and_the_page_tell_every_check_and_where_it_computes(tuned):
    found = tuned[1]
    table, page = found.table(), tune_page.page(found)
    assert table.count("(the profile)") == 1 and "target 60 dB, on 1 prompts" in table
    assert len(found.rows()) == len(found.results) and all(0 < row["pairs"] < 1 for row in found.rows())
    assert page.count("density by ") == 5 and "What an error counts" in page and "60 dB" in page


class Line:
    """Fifty points whose loss falls tenfold over a fifth of dense attention's work."""

    def points(self):
        works = torch.linspace(0.2, 0.98, 50, dtype=torch.float64).tolist()
        return [Allocation(torch.full((1, 1, 1), work), work, 10 ** (-5 * work), 0.0) for work in works]

    def config(self, *_):
        return BASE


class Bar:
    total = n = 0

    def refresh(self):
        pass


def walk(monkeypatch, target, psnr_at, speed_at):
    def checked(config, allocation, *_):
        work = allocation.work
        return Check(allocation, config, [psnr_at(work)], [10 ** (-psnr_at(work) / 20)], [1.0], [speed_at(work)])

    monkeypatch.setattr(tuning, "_checked", checked)
    goal = Target.of(target)
    probes = {
        "psnr": [(-2.0, goal.beyond(25))],
        "lpips": [(-2.0, goal.beyond(0.06))],
        "speedup": [(1.0, goal.beyond(1.0))],
    }  # not quite right
    return tuning._walk(Line(), goal, probes[goal.kind], None, PROMPTS, [], Bar())


@pytest.mark.parametrize("curve", [lambda w: 10 + 50 * w, lambda w: 60 * w**0.3, lambda w: 15 + 60 * w**4])
@pytest.mark.parametrize("target", ["22 dB", "35 dB", "lpips 0.02", "1.2x", "1.5x"])
def test_the_chosen_point_meets_the_target_with_few_checks_and_hardly_more_work_than_needed(monkeypatch, curve, target):
    goal, speed = Target.of(target), lambda work: 1 / (0.4 + 0.6 * work)
    values = {"psnr": curve, "lpips": lambda w: 10 ** (-curve(w) / 20), "speedup": speed}
    checks, chosen = walk(monkeypatch, target, curve, speed)
    assert goal.met(checks[chosen].value(goal.kind)) and len(checks) <= 6
    works = [one.allocation.work for one in checks]
    assert len(set(works)) == len(works)
    meeting = [one.work for one in Line().points() if goal.met(values[goal.kind](one.work))]
    best = max(meeting) if goal.kind == "speedup" else min(meeting)
    assert abs(works[chosen] - best) <= 0.08, (works, best)


@pytest.mark.parametrize(
    ("target", "told"),
    [("99 dB", "target 99 dB was not met: the best of"), ("3x", "target 3x was not met: the best of")],
)
def test_a_target_out_of_reach_is_told_with_the_best_there_is(monkeypatch, target, told):
    with pytest.raises(UserError, match=told):
        walk(monkeypatch, target, lambda work: 20 + 20 * work, lambda work: 1 / (0.5 + 0.5 * work))


def test_where_dense_attention_is_the_fastest_nothing_is_tuned(monkeypatch):
    monkeypatch.setattr(Line, "points", lambda _self: [Allocation(torch.ones(1, 1, 1), 1.0, 0.0, 0.0)])
    with pytest.raises(UserError, match="nothing can be tuned: dense attention is the fastest here"):
        walk(monkeypatch, "30 dB", lambda _: 30, lambda _: 1.0)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("35 dB", "psnr", 35), ("35.5dB", "psnr", 35.5), ("lpips 0.05", "lpips", 0.05), ("1.8x", "speedup", 1.8)],
)
def test_a_target_is_read_and_told_as_it_is_written(text, kind, value):
    target = Target.of(text)
    assert (target.kind, target.value) == (kind, value) and Target.of(str(target)) == target
    better = [value * 2, value / 2] if kind != "lpips" else [value / 2, value * 2]
    assert target.met(better[0]) and target.met(value) and not target.met(better[1])
    assert target.beyond(better[0]) > 0 == target.beyond(value) > target.beyond(better[1])


@pytest.mark.parametrize("text", ["", "35", "dB", "-3 dB", "0x", "0 dB", "lpips", "nan dB", "1e400x", "fast"])
def test_a_target_that_cannot_be_read_is_named(text):
    with pytest.raises(UserError, match=r"target must be like '35 dB', 'lpips 0\.05' or '1\.8x', got "):
        Target.of(text)


@pytest.mark.parametrize("layers", [1, 2, 6, 7, 40])
def test_bands_hold_every_layer_once(layers):
    bands = tune_line.bands_of(layers)
    assert [layer for band in bands for layer in band] == list(range(layers))
    assert len(bands) == min(tune_line._BANDS, layers)
    assert all(one.stop == after.start for one, after in pairwise(bands)) and len(bands[0]) == 1


@pytest.mark.parametrize("sparsity", [0.5, (0.3, 0.6, 0.6)])
def test_a_point_of_as_many_pairs_as_another_config_computes_as_many(sparsity):
    pipeline = tiny_wan_pipeline()
    other = replace(BASE, sparsity=sparsity, tokens=0, dense_steps=1)
    tuned = tuning.of_as_many_pairs(pipeline, PROMPTS, other, call_kwargs=TINY_CALL, config=BASE)
    with pytest.raises(UserError, match="draftdiff is not enabled"):
        report(pipeline)
    shares = []
    for config in (other, tuned):
        (of_run,) = run_setting(pipeline, config, PROMPTS[0], 0, TINY_CALL).reports
        shares.append(float(of_run.density.mean()))
    # One head in one step is a twelfth of all work, and the line's points are at most so far apart.
    assert shares[1] == pytest.approx(shares[0], abs=1 / 12)


def test_the_share_of_pairs_is_that_of_all_layers_and_steps():
    plain = DraftAttentionConfig(0.75)
    assert tuning._share_of_pairs(plain, 10, 6, 4) == pytest.approx((1 + 5 * 0.4) / 6)
    assert tuning._share_of_pairs(replace(plain, dense_steps=0, dense_layers=0), 10, 6, 4) == pytest.approx(0.25)


def test_no_prompts_are_refused():
    with pytest.raises(UserError, match="tune needs at least one prompt"):
        search(tiny_wan_pipeline(), [], target="30 dB")


def test_a_check_is_judged_by_the_mean_of_the_prompts_and_its_median_speed():
    check = Check(Allocation(torch.ones(1, 1, 1), 0.5, 0.1, 0.0), BASE, [30.0, 40.0], [0.1, None], [1.0], [1.5, 1.7])
    assert check.value("psnr") == fmean([30, 40]) and check.value("lpips") == 0.1
    assert check.value("speedup") == pytest.approx(1.6)
