"""The command line makes whole files, says what it did, and turns a user's mistakes into one line."""

import errno
import json
from importlib.util import find_spec

import pytest
import torch

from draftdiff import DraftAttentionConfig
from draftdiff.cli import main
from tests.cli.one_line import fails_in_one_line

SIZE = ["--frames", "9", "--height", "128", "--width", "128", "--steps", "3", "--min-tokens", "0"]


def test_compare_prints_a_table_and_writes_one_folder(model, tmp_path, capsys):
    out = tmp_path / "results"
    argv = ["compare", "--model", model, "--prompt", "a red circle", "-o", str(out), *SIZE, "--repeat", "1"]
    settings = ["--sparsity", "0.4,0.6", "--setting", "paper=selection:upstream,tail:false,tile:1x8x8"]
    others = ["--start-percent", "0.5", "--dense-blocks", "0-1", "--setting", "late=dense_steps:0,end_percent:0.5"]
    assert main([*argv, *settings, *others]) == 0
    table = capsys.readouterr().out
    assert all(
        name in table for name in ("dense", "sparsity 0.4,0.6", "paper", "speed-up", "PSNR", "no sparse attention")
    )
    results = json.loads((out / "results.json").read_text())
    assert [setting["setting"] for setting in results["settings"]] == ["dense", "sparsity 0.4,0.6", "paper", "late"]
    steps, paper, late = (setting["config"] for setting in results["settings"][1:])
    assert steps["sparsity"] == [0.4, 0.6]
    assert paper["tile"] == [1, 8, 8]
    assert [(config["dense_steps"], config["dense_end"]) for config in (paper, late)] == [(0.5, 0), (0, 0.5)]
    assert paper["dense_layers"] == late["dense_layers"] == [0, 1]
    assert "--setting paper=" in results["about"]["command"] and results["about"]["versions"]["torch"]
    assert {file.name for file in out.iterdir()} == {"results.json", "report.html", "videos"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("cache", ["first-block:threshold=0.5", "dbcache:Fn_compute_blocks=1,Bn_compute_blocks=0"])
def test_compare_shows_a_cache_alone_and_with_each_setting(model, tmp_path, capsys, cache):
    if cache.startswith("dbcache") and find_spec("cache_dit") is None:
        pytest.skip("cache-dit is not here")
    argv = ["compare", "--model", model, "--prompt", "a", "-o", str(tmp_path / "out"), *SIZE, "--repeat", "1"]
    assert main([*argv, "--sparsity", "0.5", "--cache", cache, "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [row["setting"] for row in settings] == ["dense", "cache", "sparsity 0.5", "sparsity 0.5 + cache"]
    assert settings[0]["speedup"] is None and all(row["speedup"]["median"] > 0 for row in settings[1:])
    assert [row["config"] is None for row in settings] == [True, True, False, False]


def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("draftdiff.models.video.load", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    reasons = {"out.avi": ".mp4", "notes.txt/out.mp4": "cannot be written: ", "folder.mp4": "is a folder"}
    for name, reason in reasons.items():
        assert reason in fails_in_one_line(capsys, "generate", "--prompt", "a", "-o", tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "holds other files" in fails_in_one_line(capsys, "compare", "--prompt", "a", "-o", tmp_path / "mine")


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("nothing", ["nothing", "NAME=KEY:VALUE"]),
        ("mine=speed:11", ["mine", "speed", "selection"]),
        ("mine=tail:perhaps", ["mine", "tail:perhaps"]),
        ("mine=end_percent:late", ["mine", "end_percent:late"]),
        ("mine=dense_steps:1,start_percent:0.5", ["dense_steps", "twice"]),
        ("dense=sparsity:0.5", ["dense"]),
        ("sparsity-0.5=tail:false", ["differ"]),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(model, tmp_path, capsys, setting, names):
    argv = ["compare", "--prompt", "a", "--model", model, "-o", tmp_path / "out", "--sparsity", "0.5"]
    line = fails_in_one_line(capsys, *argv, "--setting", setting)
    assert all(name in line for name in names), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["mine=dense_layers:,", "mine=tile:", "mine=sparsity:2"])
def test_a_setting_with_a_wrong_value_is_named_too(setting, tmp_path, capsys):
    line = fails_in_one_line(capsys, "compare", "--prompt", "a", "-o", tmp_path / "out", "--setting", setting)
    assert "cannot read" in line or "sparsity must be at least 0 and below 1, got 2.0" in line, line


def test_a_full_disk_is_one_line_and_leaves_the_earlier_file(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"an earlier video")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["generate", "--model", str(model), "--prompt", "a", *SIZE, "-o", str(out)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"draftdiff: error: {str(out)!r} cannot be written: No space left on device"
    assert out.read_bytes() == b"an earlier video" and list(tmp_path.iterdir()) == [out]
    argv = ["compare", "--model", model, "--prompt", "a", *SIZE, "--sparsity", "0.5", "--repeat", "1"]
    assert main([*argv, "-o", str(tmp_path / "results")]) == 1
    printed = capsys.readouterr()
    assert "sparsity 0.5" in printed.out  # hours of runs are not lost
    assert printed.err.splitlines()[-1].endswith("results' cannot be written: No space left on device")
    assert list(tmp_path.iterdir()) == [out]


def test_what_the_pipeline_itself_refuses_is_one_line(model, tmp_path, capsys, monkeypatch):
    def check_inputs(_self, *_args, **_kwargs):
        raise ValueError("`prompt` is not to its taste")

    monkeypatch.setattr("diffusers.WanPipeline.check_inputs", check_inputs)
    argv = ["--model", model, "--prompt", "a", *SIZE, "-o"]
    assert "not to its taste" in fails_in_one_line(capsys, "generate", *argv, tmp_path / "out.mp4")
    assert "not to its taste" in fails_in_one_line(capsys, "compare", *argv, tmp_path / "out")


def test_ctrl_c_while_writing_leaves_nothing_behind(model, tmp_path, capsys, monkeypatch):
    def encode(path, *_args):
        path.write_bytes(b"half a video")
        raise KeyboardInterrupt

    monkeypatch.setattr("draftdiff.models.frames._write_video", encode)
    argv = ["--model", model, "--prompt", "a", *SIZE]
    assert main(["generate", *argv, "-o", str(tmp_path / "out.mp4")]) == 130
    assert main(["compare", *argv, "--sparsity", "0.5", "--repeat", "1", "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "draftdiff: interrupted"
    assert not list(tmp_path.iterdir())


def cheap(self):
    """As on a GPU: a little for the draft, and more than dense attention where all is read."""
    times = 0.05 + 1.2 * torch.tensor(self.ladder, dtype=torch.float64)
    return times.expand(len(self.tokens), -1), 1.0


@pytest.fixture(scope="session")
def profile(model, tmp_path_factory):
    """The folder of a profile that the command wrote, with its page."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("draftdiff.video.sensitivity.Sensitivity.costs", cheap)
        patch.setattr("draftdiff.compare.tune.BASE", DraftAttentionConfig(selection="error", tile=(1, 4, 4)))
        argv = ["--model", model, "--prompt", "a red circle", *SIZE[:-2], "-o", str(folder / "tuned.json")]
        with pytest.warns(UserWarning, match="fewer than min_tokens"):
            assert main(["tune", "--target", "40 dB", *argv]) == 2
        assert not list(folder.iterdir())
        patch.setattr("draftdiff.compare.tune.BASE", DraftAttentionConfig(selection="error", tile=(1, 4, 4)))
        patch.setattr("draftdiff.video.hook._MIN_TOKENS", {"cpu": 0})
        assert main(["tune", "--target", "40 dB", *argv]) == 0
    return folder


def test_tune_writes_a_profile_and_a_page_that_generate_and_compare_take(model, profile, tmp_path, capsys):
    assert {path.name for path in profile.iterdir()} == {"tuned.json", "tuned.html"}
    file = str(profile / "tuned.json")
    given = ["--model", model, "--prompt", "a red circle", *SIZE]
    capsys.readouterr()
    assert main(["generate", *given, "--profile", file, "--json", "-o", str(tmp_path / "x.mp4")]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["made_for"] == "WanTransformer3DModel with 2 layers of 2 heads" and config["tile"] == [1, 4, 4]
    assert config["min_tokens"] == 0  # what is given besides comes before it
    setting = ["--setting", f"own=profile:{file},dense_steps:1"]
    assert main(["compare", *given, "--profile", file, *setting, "--repeat", "1", "-o", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert [one["setting"] for one in results] == ["dense", "profile", "own"]
    assert [one["config"]["dense_steps"] for one in results[1:]] == [0, 1]
    assert results[1]["psnr"] > 30


def test_a_profile_that_cannot_be_used_is_one_line(model, profile, tmp_path, capsys):
    given = ["generate", "--model", model, "--prompt", "a", "-o", tmp_path / "x.mp4", "--profile"]
    assert "no profile at" in fails_in_one_line(capsys, *given, tmp_path / "nothing.json")
    content = json.loads((profile / "tuned.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(content | {"layers": 30}))
    line = fails_in_one_line(capsys, *given, tmp_path / "other.json")
    assert "was tuned for WanTransformer3DModel with 30 layers of 2 heads, not for WanTransformer3DModel with 2" in line
    (tmp_path / "newer.json").write_text(json.dumps(content | {"draftdiff_profile": 2}))
    assert "is a profile of format 2" in fails_in_one_line(capsys, *given, tmp_path / "newer.json")
    line = fails_in_one_line(capsys, *given, tmp_path / "newer.json", "--sparsity", "0.5")
    assert "--sparsity" in line and "--profile" in line
    setting = ["--setting", f"x=profile:{tmp_path / 'newer.json'}"]
    line = fails_in_one_line(capsys, "compare", "--model", model, "--prompt", "a", "-o", tmp_path / "out", *setting)
    assert "is a profile of format 2" in line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--target", "fast"], "target must be like '35 dB', 'lpips 0.05' or '1.8x', got 'fast'"),
        (["--target", "35 dB", "-o", "x.txt"], "must end in .json"),
        (["--target", "35 dB", "--prompt", "a", "--height", "100"], "--height must be a multiple of 16"),
        (["--target", "35 dB"], "--prompt is needed with --model"),
        ([], "--target"),
    ],
)
def test_what_tune_cannot_use_is_one_line_and_no_file(model, tmp_path, capsys, argv, told):
    argv = ["tune", "--model", model, *([] if "-o" in argv else ["-o", tmp_path / "profile.json"]), *argv]
    assert told in fails_in_one_line(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_tuning_leaves_nothing_behind(model, tmp_path, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("draftdiff.compare.tune._walk", interrupted)
    monkeypatch.setattr("draftdiff.video.hook._MIN_TOKENS", {"cpu": 0})
    argv = ["tune", "--model", model, "--prompt", "a", *SIZE[:-2], "--target", "40 dB"]
    assert main([*argv, "-o", str(tmp_path / "profile.json")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "draftdiff: interrupted"
    assert not list(tmp_path.iterdir())
