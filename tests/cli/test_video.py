"""The command line makes whole files, says what it did, and turns a user's mistakes into one line."""

import errno
import json

import imageio
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel, WanVideoToVideoPipeline

from draftdiff import DraftAttentionConfig
from draftdiff.cli import main
from draftdiff.models.frames import write_frames
from tests.cli.one_line import fails_in_one_line
from tests.tiny_pipeline import tiny_wan_pipeline

SIZE = ["--frames", "9", "--height", "128", "--width", "128", "--steps", "3", "--min-tokens", "0"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_wan_pipeline().save_pretrained(folder)
    return str(folder)


def test_generate_writes_every_frame_in_the_asked_size_and_reports_the_run(model, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    assert main(["generate", "--model", model, "--prompt", "a red circle", "-o", str(out), *SIZE]) == 0
    frames = imageio.mimread(out, memtest=False)
    assert len(frames) == 9 and frames[0].shape == (128, 128, 3)
    printed = capsys.readouterr().out
    assert "sparse and 1 dense steps" in printed and str(out) in printed
    assert list(tmp_path.iterdir()) == [out]


def test_json_is_the_only_thing_on_standard_output(model, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    argv = ["generate", "--model", model, "--prompt", "a red circle", "-o", str(out), *SIZE, "--json"]
    assert main([*argv, "--sparsity", "0.5", "--tile", "1,4,4", "--no-tail", "--dense-steps", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(out) and result["shape"] == [9, 128, 128, 3]
    assert result["config"]["sparsity"] == 0.5 and result["config"]["tail"] is False
    assert result["report"]["transformers"][0]["tile"] == [1, 4, 4]
    assert result["report"]["transformers"][0]["sparse_steps"] == 2


def test_dense_steps_are_a_number_or_a_share(model, tmp_path, capsys):
    for text, dense_steps in (("2", 2), ("0.0", 0), ("1.0", 3)):
        argv = ["generate", "--model", model, "--prompt", "a", "-o", str(tmp_path / "x.mp4"), *SIZE, "--json"]
        assert main([*argv, "--dense-steps", text]) == 0
        assert json.loads(capsys.readouterr().out)["report"]["transformers"][0]["dense_steps"] == dense_steps


def test_the_dense_run_has_no_report_and_differs_from_the_sparse_one(model, tmp_path, capsys):
    argv = ["generate", "--model", model, "--prompt", "a red circle", *SIZE]
    for name, how in (("dense", ["--dense"]), ("again", ["--dense"]), ("sparse", ["--sparsity", "0.9", "--no-tail"])):
        assert main([*argv, *how, "-o", str(tmp_path / f"{name}.mp4")]) == 0
    assert "draftdiff was not enabled" in capsys.readouterr().out
    dense, again, sparse = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("dense", "again", "sparse"))
    assert dense == again and dense != sparse


def test_the_embedded_model_is_the_default(tmp_path, capsys):
    out = tmp_path / "out.mp4"
    argv = ["generate", "--prompt", "a red circle moves right", "-o", str(out), "--json"]
    assert main([*argv, "--steps", "2", "--frames", "5", "--height", "64", "--width", "64"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "mini-video" and result["shape"] == [5, 64, 64, 3]
    assert result["report"]["transformers"][0]["sparse_steps"] == 2  # few tokens, sparse all the same


def test_a_prompt_outside_the_embedded_models_world_is_noted(tmp_path, capsys):
    argv = ["generate", "--prompt", "a cat", "-o", str(tmp_path / "out.mp4"), "--steps", "1", "--frames", "1"]
    assert main([*argv, "--height", "32", "--width", "32"]) == 0
    assert "'a cat' lacks one of them" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--sparsity", "1.0"], ["sparsity", "1.0", "below 1"]),
        (["--sparsity", "-0.1"], ["sparsity", "-0.1"]),
        (["--selection", "best"], ["best", "draft", "upstream", "full"]),
        (["--backend", "warp"], ["warp", "torch", "reference"]),
        (["--tile", "9,9,9"], ["tile", "(9, 9, 9)", "128"]),
        (["--tile", "wide"], ["--tile", "cannot read 'wide'"]),
        (["--tile", ""], ["--tile", "cannot read ''"]),
        (["--tile", "1,8"], ["tile must be (frames, rows, columns)", "(1, 8)"]),
        (["--dense-layers", ","], ["--dense-layers", "cannot read ','"]),
        (["--dense-steps", "1.5"], ["dense_steps", "1.5"]),
        (["--block-size", "32"], ["32", "64", "128"]),
        (["--frames", "10"], ["--frames", "10", "multiple of 4 plus 1", "nearest: 9"]),
        (["--height", "100"], ["--height", "100", "multiple of 16", "nearest: 96"]),
        (["--width", "0"], ["--width", "0"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--fps", "0"], ["--fps", "0"]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--device", "abacus"], ["abacus"]),
        (["--image", "none.png"], ["none.png"]),
        (["--dense", "--sparsity", "0.5"], ["--dense", "--sparsity"]),
        (["--frames", "many"], ["--frames", "many"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(model, tmp_path, capsys, argv, names):
    line = fails_in_one_line(capsys, "generate", "--prompt", "a", "--model", model, "-o", tmp_path / "out.mp4", *argv)
    assert all(name in line for name in names), line
    assert not list(tmp_path.iterdir())


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


def test_a_video_model_does_not_write_an_image(model, tmp_path, capsys):
    line = fails_in_one_line(capsys, "generate", "--prompt", "a", "--model", model, "-o", tmp_path / "x.png")
    assert "must end in .mp4" in line


@pytest.mark.parametrize("name", ["nothing-here", "./nothing/here", "a/b/c"])
def test_a_model_that_is_neither_folder_nor_hub_id_is_named(name, tmp_path, capsys):
    line = fails_in_one_line(capsys, "generate", "--prompt", "a", "--model", name, "-o", tmp_path / "x.mp4")
    assert f"model {name!r} is neither a folder nor a Hub id (owner/name)" in line


def test_a_hub_model_that_cannot_be_had_offline_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    line = fails_in_one_line(
        capsys, "generate", "--prompt", "a", "--model", "no-one/no-model", "-o", tmp_path / "x.mp4"
    )
    assert "model 'no-one/no-model' cannot be loaded: " in line


def test_a_folder_without_a_pipeline_and_one_with_damaged_weights_are_named(model, tmp_path, capsys):
    line = fails_in_one_line(capsys, "generate", "--prompt", "a", "--model", tmp_path, "-o", tmp_path / "x.mp4")
    assert "holds no diffusers pipeline (model_index.json)" in line
    pipeline = tmp_path / "damaged"
    tiny_wan_pipeline().save_pretrained(pipeline)
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    line = fails_in_one_line(capsys, "generate", "--prompt", "a", "--model", pipeline, "-o", tmp_path / "x.mp4")
    assert f"model {str(pipeline)!r} cannot be loaded: " in line


def test_a_pipeline_without_a_known_transformer_is_named(tmp_path, capsys):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    line = fails_in_one_line(
        capsys, "generate", "--prompt", "a", "--model", tmp_path / "ddpm", "-o", tmp_path / "x.mp4"
    )
    assert "DDPMPipeline has no supported transformer" in line


def test_nan_weights_end_in_one_line_and_no_file(tmp_path, capsys):
    pipeline = tiny_wan_pipeline()
    torch.nn.init.constant_(pipeline.transformer.blocks[1].attn1.to_q.weight, float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    argv = ["generate", "--prompt", "a", "--model", tmp_path / "nan", "-o", tmp_path / "x.mp4", *SIZE]
    assert "hold NaN or inf at step" in fails_in_one_line(capsys, *argv)
    assert not (tmp_path / "x.mp4").exists()


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

    monkeypatch.setattr("draftdiff.models.frames._write_mp4", encode)
    argv = ["--model", model, "--prompt", "a", *SIZE]
    assert main(["generate", *argv, "-o", str(tmp_path / "out.mp4")]) == 130
    assert main(["compare", *argv, "--sparsity", "0.5", "--repeat", "1", "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "draftdiff: interrupted"
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(model, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        return {}["no such key"]

    monkeypatch.setattr("draftdiff.models.frames.frames_of", broken)
    with pytest.raises(KeyError, match="no such key"):
        main(["generate", "--model", model, "--prompt", "a", *SIZE, "-o", str(tmp_path / "out.mp4")])


def test_a_value_error_from_elsewhere_is_a_bug_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr("draftdiff.models.frames.frames_of", lambda _output: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["generate", "--model", model, "--prompt", "a", *SIZE, "-o", str(tmp_path / "out.mp4")])


def test_a_prompt_given_twice_is_told_rather_than_dropped(tmp_path, capsys):
    argv = ["generate", "--prompt", "a", "--prompt", "b", "-o", tmp_path / "x.mp4"]
    assert "argument --prompt: given twice; draftdiff compare takes several" in fails_in_one_line(capsys, *argv)


def test_a_video_to_video_pipeline_starts_from_a_clip(tmp_path, capsys):
    pipe = tiny_wan_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name not in ("transformer_2", "boundary_ratio")}
    WanVideoToVideoPipeline(**parts).save_pretrained(tmp_path / "model")
    clip = np.random.RandomState(0).randint(0, 256, (9, 128, 128, 3), np.uint8)
    write_frames(tmp_path / "clip.mp4", clip, 8)
    given = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a", "--height", "128", "--width", "128"]
    out = tmp_path / "out.mp4"
    assert main([*given, "--steps", "2", "--video", str(tmp_path / "clip.mp4"), "-o", str(out)]) == 0
    assert len(imageio.mimread(out, memtest=False)) == 9
    capsys.readouterr()
    line = fails_in_one_line(capsys, *given, "-o", out)
    assert "WanVideoToVideoPipeline needs a --video to start from" in line
    (tmp_path / "notes.txt").write_text("no clip")
    for name in ("nothing.mp4", "notes.txt"):
        line = fails_in_one_line(capsys, *given, "--video", tmp_path / name, "-o", out)
        assert f"video '{tmp_path / name}' cannot be read" in line


def test_a_folder_of_a_variant_alone_is_read_by_its_name(tmp_path, capsys):
    tiny_wan_pipeline().save_pretrained(tmp_path / "model", variant="fp16")
    given = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a", *SIZE]
    assert main([*given, "--variant", "fp16", "-o", str(tmp_path / "out.mp4")]) == 0
    capsys.readouterr()
    assert "--variant is for --model" in fails_in_one_line(
        capsys, "generate", "--prompt", "a", "--variant", "fp16", "-o", tmp_path / "out.mp4"
    )


def test_seed_minus_one_draws_a_seed_and_tells_it(model, tmp_path, capsys):
    seeds = set()
    for _ in range(2):
        argv = ["generate", "--model", model, "--prompt", "a", *SIZE, "--seed", "-1", "--json"]
        assert main([*argv, "-o", str(tmp_path / "out.mp4")]) == 0
        printed = capsys.readouterr()
        seed = json.loads(printed.out)["seed"]
        assert f"draftdiff: note: seed {seed}\n" in printed.err
        seeds.add(seed)
    assert len(seeds) == 2 and min(seeds) >= 0
    line = fails_in_one_line(capsys, "generate", "--prompt", "a", "--seed", "-2", "-o", "x.mp4")
    assert "must be a whole number from -1" in line


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
