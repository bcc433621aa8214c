"""A comparison measures in turns, reckons speed-ups and the ceiling right, and writes a whole folder or none."""

import json

import numpy as np
import pytest
import torch

from draftdiff import DraftAttentionConfig, report
from draftdiff.compare import video_page, video_run
from draftdiff.compare.timing import Timing
from draftdiff.compare.video import Clip, SettingResult, VideoComparison
from draftdiff.compare.video_run import compare_videos
from tests.tiny_pipeline import TINY_CALL, tiny_wan_pipeline

PROMPTS = ["a red circle moves left", "a green square"]
SPARSE = DraftAttentionConfig(sparsity=0.5, min_tokens=0, dense_layers=0, dense_steps=1, tile=(1, 4, 4))
EXACT = DraftAttentionConfig(selection="full", min_tokens=0, dense_layers=0, dense_steps=0)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_wan_pipeline()


@pytest.fixture(scope="module")
def comparison(pipeline):
    settings = {"half": SPARSE, "exact": EXACT}
    return compare_videos(
        pipeline,
        PROMPTS,
        settings,
        repeat=1,
        call_kwargs=TINY_CALL,
        judge=lambda prompt, frames: {"long": len(frames) == 9, "red": "red" in prompt},
        progress=False,
    )


def test_every_setting_has_all_rounds_and_clips(comparison):
    assert [result.name for result in comparison.results] == ["dense", "half", "exact"]
    for result in comparison.results:
        assert [len(row) for row in result.timings] == [2]
        assert [clip.frames.shape for clip in result.clips] == [(9, 128, 128, 3)] * 2
    assert [len(row) for row in comparison.baseline.clocked] == [2]


def test_exact_attention_gives_the_dense_video_and_sparse_another(comparison):
    _, half, exact = comparison.rows()
    assert exact["psnr"] > 60 and exact["latent_l2"] < 1e-4 and exact["density"] == 1
    assert 0 < half["latent_l2"] < 1 and half["psnr"] < exact["psnr"] and half["density"] < 0.6
    assert 0 < half["missed_mass"] < 1


def test_prompts_have_clips_and_verdicts_of_their_own(comparison):
    first, second = comparison.baseline.clips
    assert not np.array_equal(first.frames, second.frames)
    assert [row["accuracy"] for row in comparison.rows()] == [0.5] * 3


def test_the_breakdown_adds_up_to_the_call(comparison):
    for result in comparison.results:
        for timing in [timing for row in result.clocked or result.timings for timing in row]:
            assert sum(timing.breakdown().values()) == pytest.approx(timing.seconds, rel=1e-3)
    assert comparison.results[1].breakdown()["kernel"] > 0
    assert comparison.baseline.breakdown()["kernel"] == 0 < comparison.baseline.breakdown()["dense attention"]


def test_the_pipeline_is_left_without_draftdiff(comparison, pipeline):
    with pytest.raises(ValueError, match="draftdiff is not enabled on this WanPipeline"):
        report(pipeline)


def test_the_pipeline_is_left_without_draftdiff_after_an_error_too():
    pipeline = tiny_wan_pipeline()
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_argument'"):
        compare_videos(
            pipeline, ["a"], {"half": SPARSE}, call_kwargs={**TINY_CALL, "no_such_argument": 1}, progress=False
        )
    with pytest.raises(ValueError, match="draftdiff is not enabled on this WanPipeline"):
        report(pipeline)


def test_rounds_run_the_settings_in_turns(pipeline, monkeypatch):
    calls = []

    def fake(pipeline, prompt, _seed, call):
        try:
            report(pipeline)
            how = "hooked"
        except ValueError:
            how = "stock"
        calls.append((prompt, how, call["num_inference_steps"]))
        return np.zeros((1, 32, 32, 3), np.uint8), None, 1.0

    monkeypatch.setattr(video_run, "_timed_call", fake)
    compare_videos(pipeline, ["one", "two"], {"half": SPARSE}, repeat=2, call_kwargs=TINY_CALL, progress=False)
    warm_up = [("one", "stock", 2), ("one", "hooked", 2)]
    one_round = [(prompt, how, 3) for prompt in ("one", "two") for how in ("hooked", "stock", "hooked")]
    assert calls == warm_up + one_round * 2


@pytest.fixture
def reckoned():
    """Two rounds, the machine twice as slow in the second. Dense: half of it attention, which sparse makes twice as
    fast; the rest of the sparse run has 0.5 s of overhead."""
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    dense, sparse = SettingResult("dense", None), SettingResult("sparse", SPARSE)
    for slow in (1, 2):
        dense.timings.append([Timing(10.0 * slow)])
        dense.clocked.append([Timing(10.5 * slow, {"dense attention": 5.25 * slow, "dense forward": 9.0 * slow})])
        parts = {"draft": 0.5, "select": 0.125, "kernel": 2.0, "sparse forward": 7.0}
        sparse.timings.append([Timing(8.0 * slow, {name: value * slow for name, value in parts.items()})])
    dense.clips.append(Clip(frames, []))
    sparse.clips.append(Clip(frames, []))
    return VideoComparison("Pipeline", ["a prompt"], 0, {}, [dense, sparse])


def test_amdahls_law(reckoned):
    assert reckoned.attention_share == pytest.approx(0.5) and reckoned.ceiling == pytest.approx(2)
    row = reckoned.rows()[1]
    assert row["speedup"] == pytest.approx({"median": 1.25, "min": 1.25, "max": 1.25})
    assert row["attention_speedup"]["median"] == pytest.approx(2)
    assert row["predicted_speedup"] == pytest.approx(1 / (0.5 + 0.5 / 2))
    assert row["seconds"] == {"median": 12, "min": 8, "max": 16}
    assert reckoned.rows()[0]["speedup"] is None


def test_the_table_names_every_setting_and_the_ceiling(reckoned):
    table = reckoned.table()
    lines = table.splitlines()
    assert lines[2].startswith("dense") and lines[3].startswith("sparse") and "1.25x" in lines[3]
    assert "50% of the dense run" in table and "2.00x" in table
    assert "PSNR" not in table  # nobody measured it
    assert "sparse ran dense throughout" in table


def test_the_folder_holds_results_videos_and_a_page(comparison, tmp_path):
    folder = video_page.write(comparison, tmp_path / "out")
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"][1]["clips"][0]["quality"]["psnr"] == comparison.results[1].clips[0].quality.psnr
    assert np.shape(results["settings"][1]["timings"]) == (1, 2)
    videos = {file.name for file in (folder / "videos").iterdir()}
    names = ("dense", "half", "exact", "side-by-side")
    pictures = {"01-side-by-side.png", "02-side-by-side.png"}
    assert videos == {f"{prompt}-{name}.mp4" for prompt in ("01", "02") for name in names} | pictures
    assert list(tmp_path.iterdir()) == [folder]


def test_an_earlier_comparison_is_replaced_and_other_files_are_not(reckoned, tmp_path):
    folder = tmp_path / "out"
    video_page.write(reckoned, folder)
    reckoned.results[1].name = "other"
    video_page.write(reckoned, folder)
    assert {file.stem for file in (folder / "videos").iterdir()} == {"01-dense", "01-other", "01-side-by-side"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text('{"made_by": "someone else"}')
    with pytest.raises(ValueError, match="holds other files"):
        video_page.write(reckoned, tmp_path / "mine")
    assert (tmp_path / "mine" / "results.json").read_text() == '{"made_by": "someone else"}'


def test_an_interrupted_write_leaves_the_old_folder_as_it_was(reckoned, tmp_path, monkeypatch):
    folder = video_page.write(reckoned, tmp_path / "out")
    before = (folder / "report.html").read_bytes()

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(video_page, "page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video_page.write(reckoned, folder)
    assert (folder / "report.html").read_bytes() == before and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("prompts", "settings", "repeat", "message"),
    [
        ([], {"half": SPARSE}, 1, "at least one prompt"),
        (["a"], {}, 1, "at least one prompt and one setting"),
        (["a"], {"dense": SPARSE}, 1, "cannot be called 'dense'"),
        (["a"], {"a b": SPARSE, "a-b": SPARSE}, 1, "must differ"),
        (["a"], {"half": SPARSE}, 0, "repeat must be at least 1, got 0"),
    ],
)
def test_a_comparison_of_nothing_is_refused(pipeline, prompts, settings, repeat, message):
    with pytest.raises(ValueError, match=message):
        compare_videos(pipeline, prompts, settings, repeat=repeat, progress=False)


def test_latents_are_those_of_the_last_step(pipeline):
    _, latents, _ = video_run._timed_call(pipeline, "a red circle", 0, dict(TINY_CALL))
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(prompt="a red circle", generator=generator, output_type="latent", **TINY_CALL).frames
    torch.testing.assert_close(latents, expected)
