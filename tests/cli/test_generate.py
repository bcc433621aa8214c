"""`draftdiff generate` makes whole files, says what it did, and turns a user's mistakes into one line."""

import json

import imageio
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel, WanVideoToVideoPipeline

from draftdiff.cli import main
from draftdiff.models.frames import write_frames
from tests.cli.one_line import fails_in_one_line
from tests.tiny_pipeline import tiny_wan_pipeline

SIZE = ["--frames", "9", "--height", "128", "--width", "128", "--steps", "3", "--min-tokens", "0"]


def test_generate_writes_every_frame_in_the_asked_size_and_reports_the_run(model, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    assert main(["generate", "--model", model, "--prompt", "a red circle", "-o", str(out), *SIZE]) == 0
    frames = imageio.mimread(out, memtest=False)
    assert len(frames) == 9 and frames[0].shape == (128, 128, 3)
    printed = capsys.readouterr().out
    assert "sparse and 1 dense steps" in printed and str(out) in printed
    assert sorted(tmp_path.iterdir()) == [out.with_suffix(".json"), out]


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


def test_several_clips_need_a_folder_and_a_clip_a_prompt(tmp_path, capsys):
    argv = ["generate", "-o", tmp_path / "x.mp4"]
    line = fails_in_one_line(capsys, *argv, "--prompt", "a", "--prompt", "b", "--steps", "1")
    assert "2 clips need a folder: -o FOLDER --format NAME" in line
    assert "--prompt, --prompt-file or --from is needed" in fails_in_one_line(capsys, *argv)


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


def test_many_prompts_and_seeds_go_to_a_folder_where_what_is_there_is_left(model, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("# two\na red circle\na green square\n")
    argv = ["generate", "--model", model, "--prompt-file", str(prompts), "--seed", "3", "4", "--json", *SIZE]
    argv += ["-o", str(out), "--format", "webm", "--steps", "1"]
    assert main(argv) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(result["prompt"], result["seed"]) for result in results] == [
        ("a red circle", 3), ("a red circle", 4), ("a green square", 3), ("a green square", 4)
    ]  # fmt: skip
    names = {file.name for file in out.glob("*.webm")}
    assert len(names) == 4 and "001-a-red-circle-3.webm" in names
    (out / "002-a-green-square-4.webm").unlink()
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["seed"] for line in printed.out.splitlines()] == [4]
    assert printed.err.count("is there already") == 3
    assert {file.suffix for file in out.iterdir()} == {".webm", ".json"}


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "webm"])
def test_a_clip_is_written_in_every_format(model, tmp_path, ending):
    out = tmp_path / f"new/folder/out.{ending}"
    assert main(["generate", "--model", model, "--prompt", "a", *SIZE, "--steps", "1", "-o", str(out)]) == 0
    frames = imageio.v3.imread(out)
    assert frames.shape[-3:-1] == (128, 128) and len(frames) >= 8  # a webp or gif may join frames that are alike


def test_each_frame_may_be_a_picture_of_its_own(model, tmp_path):
    argv = ["generate", "--model", model, "--prompt", "a", *SIZE, "--steps", "1"]
    assert main([*argv, "-o", str(tmp_path / "frames/f-%03d.png")]) == 0
    names = sorted(file.name for file in (tmp_path / "frames").iterdir())
    assert names == ["f.json", *(f"f-{number:03d}.png" for number in range(1, 10))] or names == [
        *(f"f-{number:03d}.png" for number in range(1, 10)), "f.json"
    ]  # fmt: skip


def test_a_clip_is_made_again_from_the_file_beside_it(model, tmp_path, capsys):
    argv = ["generate", "--model", model, "--prompt", "a red circle", *SIZE, "--json", "--seed", "7"]
    argv += ["--no-tail", "--tile", "1,4,4", "--dense-steps", "0", "--sparsity", "0.5,0.6", "--flow-shift", "2"]
    first, second, third = (tmp_path / f"{name}.mp4" for name in ("first", "second", "third"))
    assert main([*argv, "-o", str(first)]) == 0
    again = ["generate", "--from", str(first.with_suffix(".json")), "--json", "-o"]
    assert main([*again, str(second)]) == 0
    assert main([*again, str(third), "--seed", "8", "--dense"]) == 0
    one, two, other = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    assert one["config"] == two["config"] and two["seed"] == 7
    assert (other["seed"], other["config"], other["prompt"]) == (8, None, "a red circle")
    sidecars = [json.loads(file.with_suffix(".json").read_text())["settings"] for file in (first, second)]
    assert sidecars[0] == sidecars[1]


def test_spellings_of_diffusers_are_known(model, tmp_path, capsys):
    argv = ["generate", "--model", model, "--prompt", "a", "--min-tokens", "0", "--num-frames", "5", "--json"]
    argv += ["--size", "96x64", "--num-inference-steps", "2", "--guidance-scale", "1.5", "-o", str(tmp_path / "x.mp4")]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [5, 64, 96, 3]


@pytest.mark.usefixtures("own_attention_backend")
def test_a_pipeline_is_set_up_as_asked(model, tmp_path, capsys, monkeypatch):
    from draftdiff.models import video

    kept, load = [], video.load
    monkeypatch.setattr(video, "load", lambda *args, **kwargs: kept.append(load(*args, **kwargs)) or kept[-1])
    argv = ["generate", "--model", model, "--prompt", "a", *SIZE, "-o", str(tmp_path / "x.mp4"), "--json"]
    argv += ["--scheduler", "FlowMatchEulerDiscrete", "--flow-shift", "4", "--vae-tiling"]
    assert main([*argv, "--attention-backend", "_native_math", "--cache", "first-block:threshold=0.3"]) == 0
    pipe = kept[0].pipeline
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipe.scheduler.config.shift == 4
    assert pipe.vae.use_tiling and pipe.transformer.is_cache_enabled
    assert pipe.transformer.blocks[0].attn2.processor._attention_backend == "_native_math"


def test_several_adapters_are_loaded_with_their_weights(model, tmp_path, capsys):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for number in (1, 2):
        pipe = tiny_wan_pipeline()
        torch.manual_seed(number)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers = get_peft_model_state_dict(pipe.transformer)
        type(pipe).save_lora_weights(tmp_path / f"lora{number}", layers)
    argv = ["generate", "--model", model, "--prompt", "a", *SIZE, "-o"]
    one, two = (str(tmp_path / f"lora{number}") for number in (1, 2))
    ways = {"none": [], "both": ["--lora", one, "--lora", f"{two}:0.5"], "off": ["--lora", f"{one}:0"]}
    clips = {}
    for name, given in ways.items():
        assert main([*argv, str(tmp_path / f"{name}.mp4"), *given]) == 0
        clips[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert clips["none"] == clips["off"] != clips["both"]
    assert main(["generate", "--from", str(tmp_path / "both.json"), "-o", str(tmp_path / "again.mp4")]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == clips["both"]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--lora", "nowhere"], ["--lora 'nowhere'"]),
        (["--scheduler", "UniPC"], ["--scheduler 'UniPC'", "UniPCMultistep"]),
        (["--scheduler", "DDIM", "--flow-shift", "3"], ["DDIMScheduler takes no --flow-shift"]),
        (["--attention-backend", "warp"], ["--attention-backend 'warp'"]),
        (["--cache", "all"], ["--cache must be one of first-block", "'all'"]),
        (["--cache", "first-block:speed=2"], ["--cache 'first-block:speed=2'", "speed"]),
        (["--cache", "first-block:0.2"], ["'0.2' must be FIELD=VALUE"]),
        (["--quantize", "int3"], ["--quantize must be one of bnb-4bit", "'int3'"]),
        (["--size", "96"], ["--size", "must be WIDTHxHEIGHT, got '96'"]),
        (["--size", "96x64"], ["--size says width 96, --width says 128"]),
        (["--strength", "0.5"], ["WanPipeline takes no --strength"]),
        (["--ulysses", "2"], ["--ulysses 2 --ring 1 needs 2 processes, got 1: torchrun --nproc-per-node 2"]),
        (["--ring", "0"], ["--ring must be at least 1, got 0"]),
        (["--from", "none.json"], ["--from 'none.json' cannot be read"]),
        (["--prompt-file", "none.txt"], ["--prompt-file 'none.txt' cannot be read"]),
    ],
)
def test_what_cannot_be_set_up_is_one_line(model, tmp_path, capsys, argv, names):
    given = ["--prompt", "a", "--model", model, "-o", tmp_path / "x.mp4", *SIZE]
    line = fails_in_one_line(capsys, "generate", *given, *argv)
    assert all(name in line for name in names), line
    assert not list(tmp_path.iterdir())


def test_the_progress_bar_tells_what_sparse_attention_saved(model, tmp_path, capsys, monkeypatch):
    from draftdiff.cli import progress

    told, said = [], "sparse attention saved 3 s"
    monkeypatch.setattr(progress, "saved", lambda pipe: told.append(type(pipe).__name__) or said)
    assert main(["generate", "--model", model, "--prompt", "a", *SIZE, "-o", str(tmp_path / "x.mp4")]) == 0
    assert told == ["WanPipeline"] * 3
    assert said in capsys.readouterr().err


def test_what_was_saved_is_reckoned_by_the_dense_steps_of_the_run(model):
    import draftdiff
    from draftdiff.cli.progress import saved

    pipe = draftdiff.enable(tiny_wan_pipeline(), {"dense_steps": 1, "min_tokens": 0})
    pipe(
        prompt="a", num_frames=9, height=128, width=128, num_inference_steps=3, guidance_scale=1.0, output_type="latent"
    )
    log = next(iter(pipe.transformer._forward_pre_hooks.values())).__self__.log
    log.clock._seconds |= {"dense forward": 4.0, "sparse forward": 5.0}
    assert saved(pipe) == "sparse attention saved 3.0 s"
    log.clock._seconds["sparse forward"] = 9.0
    assert saved(pipe) == ""
