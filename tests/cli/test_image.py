"""`draftdiff image`, its comparison and calibration, and `draftdiff convert`: whole files and one-line errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from draftdiff.cli import main
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.vq_model import VQModel
from tests.cli.one_line import fails_in_one_line
from tests.var import tiny, tiny_infinity

NAMES = {0: "red circle", 1: "green square", 2: "blue star", 3: "white cross", 4: "red square"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    """A folder with a drafter, a refiner, and four drafted scales of six."""
    folder = tmp_path_factory.mktemp("pair")
    drafter, refiner = tiny.transformer(0, num_layers=4), tiny.transformer(3, num_layers=1, num_attention_heads=1)
    scheduler = VARScheduler(tiny.PATCH_NUMS, top_k=20, top_p=0.95)
    VARPipeline(drafter, tiny.vq_model(), scheduler, refiner, 4, NAMES).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("alone")
    tiny.var_pipeline(num_layers=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def infinity(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("infinity")
    tiny_infinity.infinity_pipeline().save_pretrained(folder)
    return str(folder)


def run(capsys, *argv: object) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_picture_is_that_of_the_pipeline_with_its_saved_pair(pair, tmp_path, capsys):
    out = tmp_path / "out.png"
    result = run(capsys, "image", "--model", pair, "--class", "green square", "--seed", 5, "-o", out)
    assert result["setting"] == "CoDe N=4" and result["outputs"] == [str(out)] and result["seeds"] == [5]
    pipe = VARPipeline.from_pretrained(pair)
    expected = pipe([1], generator=torch.Generator().manual_seed(5), output_type="np").images[0]
    assert np.array_equal(np.asarray(Image.open(out)), (expected * 255).round().astype(np.uint8))
    assert list(tmp_path.iterdir()) == [out]


def test_several_pictures_are_numbered_and_each_has_a_seed_of_its_own(pair, tmp_path, capsys):
    argv = ["image", "--model", pair, "--class", "red circle", "--class", 3]
    result = run(capsys, *argv, "--count", 2, "-o", tmp_path / "out.png")
    assert result["subjects"] == ["red circle", "red circle", 3, 3] and result["seeds"] == [0, 1, 2, 3]
    assert result["outputs"] == [str(tmp_path / f"out-{i}.png") for i in (1, 2, 3, 4)]
    run(capsys, "image", "--model", pair, "--class", 3, "--seed", 2, "-o", tmp_path / "third.png")
    assert (tmp_path / "third.png").read_bytes() == (tmp_path / "out-3.png").read_bytes()


def test_options_switch_code_and_scale_kv_on(alone, tmp_path, capsys):
    out, made, small = tmp_path / "out.png", {}, tmp_path / "small"
    tiny.var_pipeline(seed=7, num_layers=1).save_pretrained(small)
    for options in ([], ["--draft-scales", 2], ["--scale-kv", 0.1], ["--draft-scales", 2, "--scale-kv", 0.1]):
        argv = ["image", "--model", alone, "--refiner", small, "--class", 1, "-o", out, *options]
        result = run(capsys, *argv)
        made[result["setting"]] = out.read_bytes()
    assert list(made) == ["plain", "CoDe N=2", "ScaleKV 10%", "CoDe N=2 + ScaleKV 10%"]
    assert len(set(made.values())) == 4


def test_guidance_reaches_the_pipeline(alone, tmp_path, capsys):
    made = set()
    for scale in (0, 8):
        out = tmp_path / f"{scale}.png"
        run(capsys, "image", "--model", alone, "--class", 1, "--guidance-scale", scale, "-o", out)
        made.add(out.read_bytes())
    assert len(made) == 2


def test_infinity_takes_prompts_sizes_and_aspect_ratios(infinity, tmp_path, capsys):
    argv = ["image", "--model", infinity, "--prompt", "a red circle", "--size", "0.06M", "--aspect-ratio", 0.5]
    result = run(capsys, *argv, "--scale-kv", 0.1, "-o", tmp_path / "out.jpg")
    assert result["size"] == [176, 352] and result["setting"] == "ScaleKV 10%"
    assert Image.open(tmp_path / "out.jpg").size == (352, 176)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--class", "purple cow"], ["purple cow", "red circle", "green square"]),
        (["--class", "7"], ["7", "0 to 4"]),
        ([], ["--class is needed", "red circle"]),
        (["--class", "1", "--draft-scales", "6"], ["6", "1 to 5"]),
        (["--class", "1", "--draft-scales", "0"], ["0", "1 to 5"]),
        (["--class", "1", "--scale-kv", "0"], ["budget", "0.0", "above 0 and at most 1"]),
        (["--class", "1", "--scale-kv", "1.5"], ["budget", "1.5", "above 0 and at most 1"]),
        (["--class", "1", "--scale-kv", "0.1", "0.2"], ["--scale-kv", "one value"]),
        (["--class", "1", "--count", "0"], ["--count", "0"]),
        (["--class", "1", "--prompt", "a"], ["--class", "--prompt"]),
        (["--prompt", "a"], ["VARPipeline", "--class"]),
        (["--class", "1", "--size", "1M"], ["--size", "VARPipeline"]),
        (["--class", "1", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["--class", "1", "--guidance-scale", "nan"], ["guidance_scale must be from", "nan"]),
        (["--class", "1", "--device", "abacus"], ["abacus"]),
        (["--class", "1", "--scale-kv-drafters", "none.json"], ["--scale-kv"]),
        (["--class", "1", "--scale-kv", "0.1", "--scale-kv-drafters", "none.json"], ["none.json"]),
        (["--class", "1", "--repeat", "2"], ["--repeat", "--compare"]),
        (["--class", "1", "--refiner", "nowhere"], ["nowhere"]),
        (["--class", "1", "--compare", "--repeat", "0"], ["repeat", "0"]),
        (["--class", "1", "--compare", "--draft-scales", "2", "9"], ["9", "1 to 5"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(pair, tmp_path, capsys, argv, names):
    output = tmp_path / ("folder" if "--compare" in argv else "out.png")
    line = fails_in_one_line(capsys, "image", "--model", pair, "-o", output, *argv)
    assert all(name in line for name in names), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--prompt", " "], ["--prompt is empty"]),
        (["--prompt", "a", "--aspect-ratio", "1.1"], ["1.1", "1.25"]),
        (["--prompt", "a", "--aspect-ratio", "nan"], ["height / width", "nan"]),
        (["--prompt", "a", "--size", "2M"], ["2M", "0.06M"]),
        (["--prompt", "a", "--draft-scales", "3"], ["--draft-scales", "VAR"]),
        (["--class", "1"], ["InfinityPipeline", "--prompt"]),
        ([], ["--prompt is needed"]),
    ],
)
def test_infinitys_wrong_values_are_named_too(infinity, tmp_path, capsys, argv, names):
    line = fails_in_one_line(capsys, "image", "--model", infinity, "-o", tmp_path / "out.png", *argv)
    assert all(name in line for name in names), line
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit_are_named(pair, alone, tmp_path, capsys):
    out = tmp_path / "out.png"
    argv = ["image", "--class", 1, "-o", out]
    assert "no such" not in fails_in_one_line(capsys, *argv, "--model", "a/b/c")
    assert "--refiner" in fails_in_one_line(capsys, *argv, "--model", alone, "--draft-scales", 2)
    other = tmp_path / "other"
    scheduler = VARScheduler(tiny.PATCH_NUMS)
    VARPipeline(tiny.transformer(vocab_size=16), tiny.vq_model(num_vq_embeddings=16), scheduler).save_pretrained(other)
    line = fails_in_one_line(capsys, *argv, "--model", alone, "--refiner", other, "--draft-scales", 2)
    assert "vocab_size" in line and "32 and 16" in line
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert f"model {str(other)!r} cannot be loaded: " in fails_in_one_line(capsys, *argv, "--model", other)
    (other / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    line = fails_in_one_line(capsys, *argv, "--model", other)
    assert "WanPipeline" in line and "VARPipeline" in line
    checkpoint = tmp_path / "var_d16.pth"
    torch.save({}, checkpoint)
    assert "draftdiff convert" in fails_in_one_line(capsys, *argv, "--model", checkpoint)
    assert not out.exists()


def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("draftdiff.models.image.load", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    (tmp_path / "notes.txt").write_text("keep")
    for name, reason in (("out.mp4", ".png"), ("notes.txt/out.png", "cannot be written: ")):
        assert reason in fails_in_one_line(capsys, "image", "--class", "1", "-o", tmp_path / name)
    assert "-o FILE is needed" in fails_in_one_line(capsys, "image", "--class", "1")
    assert "other files" in fails_in_one_line(capsys, "image", "--compare", "--class", "1", "-o", tmp_path)


def test_ctrl_c_while_writing_leaves_whole_pictures_alone(pair, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def interrupted(path, content):
        write_bytes(path, content[:100])
        if path.name == "out-2.png":
            raise KeyboardInterrupt
        write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    argv = ["image", "--model", pair, "--class", "1", "--count", "3", "-o", str(tmp_path / "new" / "out.png")]
    assert main(argv) == 130
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "out-1.png"]
    Image.open(tmp_path / "new" / "out-1.png").load()


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(pair, tmp_path):
    for size in (1, 2, 5):
        argv = ["image", "--model", pair, "--class", "1", "--class", "2", "--count", "3", "--batch-size", str(size)]
        assert main([*argv, "-o", str(tmp_path / str(size) / "out.png")]) == 0
    at_once = {path.name: path.read_bytes() for path in (tmp_path / "5").iterdir()}
    assert len(at_once) == 6 and len(set(at_once.values())) > 1
    for size in (1, 2):
        assert {path.name: path.read_bytes() for path in (tmp_path / str(size)).iterdir()} == at_once


def test_a_comparison_takes_no_batch_size(pair, tmp_path, capsys):
    argv = ["image", "--compare", "--model", pair, "--class", "1", "--batch-size", 2, "-o", tmp_path / "out"]
    assert "--batch-size is not for --compare" in fails_in_one_line(capsys, *argv)


def test_a_name_that_one_of_several_pictures_cannot_have_is_told_before_the_work(pair, tmp_path, capsys):
    (tmp_path / "out-2.png").mkdir()
    argv = ["image", "--model", pair, "--class", "1", "--count", "3", "-o", tmp_path / "out.png"]
    assert "out-2.png' is a folder" in fails_in_one_line(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["out-2.png"]


def test_compare_measures_every_setting_and_writes_one_folder(pair, tmp_path, capsys):
    out = tmp_path / "results"
    argv = ["image", "--compare", "--model", pair, "--class", "red circle", "--count", 2, "--repeat", 2, "-o", out]
    result = run(capsys, *argv, "--draft-scales", 3, 4, "--scale-kv", 0.1)
    assert json.loads((out / "results.json").read_text()) == result
    rows = {row["setting"]: row for row in result["settings"]}
    assert list(rows) == ["plain", "CoDe N=3", "CoDe N=4", "ScaleKV 10%", "CoDe N=4 + ScaleKV 10%"]
    assert result["subjects"] == ["red circle"] * 2
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["repeat_error"] == 0 and row["accuracy"] is None
    assert rows["CoDe N=3"]["predicted_speedup"] > rows["CoDe N=4"]["predicted_speedup"] > 1
    assert rows["ScaleKV 10%"]["cache_share"] < 0.15 and 0 < rows["ScaleKV 10%"]["psnr"] < 100
    assert {file.name for file in out.iterdir()} == {"results.json", "contact-sheet.png", "report.html"}
    page = (out / "report.html").read_text()
    assert "CoDe N=4 + ScaleKV 10%" in page and "http" not in page and 'src="data:' in page
    sheet = Image.open(out / "contact-sheet.png")
    assert sheet.size[0] == 5 * 256
    assert main([*map(str, argv), "--scale-kv", "0.5"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("images/s", "speed-up", "predicted", "cache", "ScaleKV 50%", "report.html"))


def test_calibration_makes_a_file_that_scale_kv_takes(pair, alone, infinity, tmp_path, capsys):
    file = tmp_path / "drafters.json"
    content = run(capsys, "image", "calibrate", "--model", pair, "--share", 0.3, "-o", file)
    assert json.loads(file.read_text()) == content
    assert content["layers"] == 4 and any(content["drafters"].values())
    assert np.shape(content["index"]) == (4, 6) and np.shape(content["refiner_index"]) == (1, 6)
    for options in ([], ["--draft-scales", 3]):
        argv = ["image", "--model", pair, "--class", 1, "--scale-kv", 0.2, "--scale-kv-drafters", file, *options]
        run(capsys, *argv, "-o", tmp_path / "out.png")
    argv = ["image", "--model", infinity, "--prompt", "a", "--scale-kv", 0.2, "--scale-kv-drafters", file]
    line = fails_in_one_line(capsys, *argv, "-o", tmp_path / "x.png")
    assert "4 layers" in line and "has 2" in line
    file.write_text('{"layers": 4}')
    argv = ["image", "--model", alone, "--class", 1, "--scale-kv", 0.2, "--scale-kv-drafters", file]
    assert "was not made by draftdiff image calibrate" in fails_in_one_line(capsys, *argv, "-o", tmp_path / "x.png")
    assert "--share" in fails_in_one_line(capsys, "image", "calibrate", "--model", alone, "--share", 1, "-o", file)
    assert ".json" in fails_in_one_line(capsys, "image", "calibrate", "--model", alone, "-o", tmp_path / "x.png")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\x01",
        '{"layers": 4, "drafters": []}',
        '{"layers": 4, "drafters": {"first": [0]}}',
        '{"layers": 4, "drafters": {"-1": [0]}}',
        '{"layers": 4, "drafters": {"0": 1}}',
        '{"layers": 4, "drafters": {"0": [-1]}}',
        '{"layers": 4, "drafters": {"0": [0.5]}}',
        '{"layers": 4, "drafters": {"0": [true]}}',
        '{"layers": 4, "drafters": {"0": ["0"]}}',
        '{"layers": 4, "drafters": {"0": [NaN]}}',
        '{"layers": 4, "drafters": {"0": [9]}}',
        '{"layers": "4", "drafters": {"0": [0]}}',
        '{"drafters": {"0": [0]}}',
    ],
)
def test_a_file_of_drafters_that_is_none_is_named(alone, tmp_path, capsys, content):
    file = tmp_path / "drafters.json"
    file.write_text(content)
    argv = ["image", "--model", alone, "--class", 1, "--scale-kv", 0.2, "-o", tmp_path / "x.png", "--scale-kv-drafters"]
    assert str(file) in fails_in_one_line(capsys, *argv, file)


def test_a_file_of_drafters_that_is_nowhere_or_a_folder_is_named(alone, tmp_path, capsys):
    argv = ["image", "--model", alone, "--class", 1, "--scale-kv", 0.2, "-o", tmp_path / "x.png", "--scale-kv-drafters"]
    assert f"{tmp_path} is a folder" in fails_in_one_line(capsys, *argv, tmp_path)
    assert "at nowhere" in fails_in_one_line(capsys, *argv, "nowhere")


def test_convert_makes_a_folder_that_image_reads(tmp_path, capsys):
    tensors = tiny.to_original(tiny.transformer())
    tensors["pos_1LC"] = tensors["pos_1LC"][None]
    tensors["lvl_1L"] = torch.repeat_interleave(torch.arange(6), torch.tensor([side**2 for side in tiny.PATCH_NUMS]))
    torch.save(tensors, tmp_path / "var.pth")
    vae = VQModel((32, 32), 1, latent_channels=4, num_vq_embeddings=32, patch_nums=tiny.PATCH_NUMS)
    torch.save(tiny.to_original(vae), tmp_path / "vae.pth")
    argv = ["convert", tmp_path / "var.pth", tmp_path / "vae.pth"]
    result = run(capsys, *argv, tmp_path / "model")
    assert result["class"] == "VARPipeline"
    run(capsys, "image", "--model", tmp_path / "model", "--class", 1, "-o", tmp_path / "out.png", "--dtype", "bf16")
    assert "exists: convert writes to a new folder" in fails_in_one_line(capsys, *argv, tmp_path / "model")
    assert "no checkpoint at " in fails_in_one_line(capsys, "convert", tmp_path / "nothing.pth", tmp_path / "new")
    whole = (tmp_path / "var.pth").read_bytes()
    (tmp_path / "var.pth").write_bytes(whole[: len(whole) // 2])
    line = fails_in_one_line(capsys, *argv, tmp_path / "new")
    assert "var.pth is not a readable checkpoint (damaged, truncated" in line
    assert "dtype must be one of" in fails_in_one_line(capsys, *argv, tmp_path / "new", "--dtype", "int8")
    (tmp_path / "var.pth").write_bytes(whole)
    line = fails_in_one_line(capsys, *argv, tmp_path / "new", "--text-encoder", tmp_path)
    assert "text_encoder is for an InfinityPipeline only" in line
    assert not (tmp_path / "new").exists()


def test_a_model_without_its_text_encoder_is_named_before_it_works(tmp_path, capsys):
    pipeline = tiny_infinity.infinity_pipeline()
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path / "model")
    argv = ["image", "--model", tmp_path / "model", "--prompt", "a", "-o", tmp_path / "out.png"]
    assert "holds no text encoder: convert it with --text-encoder" in fails_in_one_line(capsys, *argv)


def test_the_embedded_pair_is_the_default_and_its_pictures_are_judged(tmp_path, capsys):
    pytest.importorskip("draftdiff.pipelines.mini.image")
    out = tmp_path / "out.png"
    result = run(capsys, "image", "--class", "red circle", "-o", out)
    assert result["model"] == "mini-image" and result["setting"] == "plain" and result["right"] == [True]
    assert Image.open(out).size == (64, 64)
    line = fails_in_one_line(capsys, "image", "--class", "red cow", "-o", out)
    assert "red cow" in line and "red circle" in line
    assert "--class" in fails_in_one_line(capsys, "image", "--prompt", "a", "-o", out)
    argv = ["image", "--compare", "--count", 1, "--repeat", 1, "--draft-scales", 5, "--scale-kv", 0.2]
    compared = run(capsys, *argv, "-o", tmp_path / "folder")
    assert [row["setting"] for row in compared["settings"]] == [
        "plain",
        "CoDe N=5",
        "ScaleKV 20%",
        "CoDe N=5 + ScaleKV 20%",
    ]
    assert len(compared["subjects"]) == 8 and compared["settings"][0]["accuracy"] >= 0.5


def test_a_calibration_serves_budgets_per_head_too(pair, tmp_path, capsys):
    file, out = tmp_path / "drafters.json", tmp_path / "out.png"
    content = run(capsys, "image", "calibrate", "--model", pair, "-o", file)
    assert np.shape(content["missed"]) == (4, 6, 2, 12) and np.shape(content["refiner_missed"]) == (1, 6, 1, 12)
    argv = ["image", "--model", pair, "--class", 1, "--scale-kv", 0.2, "-o", out]
    result = run(capsys, *argv, "--scale-kv-per", "head", "--scale-kv-drafters", file)
    assert result["per"] == "head" and result["setting"] == "CoDe N=4 + ScaleKV 20% per head"
    missing = "--scale-kv-per head needs --scale-kv-drafters FILE: draftdiff image calibrate makes one"
    assert missing in fails_in_one_line(capsys, *argv, "--scale-kv-per", "head")
    del content["refiner_missed"]  # as files from before there were budgets per head
    file.write_text(json.dumps(content))
    of_heads = [*argv, "--scale-kv-per", "head", "--scale-kv-drafters", file]
    assert missing in fails_in_one_line(capsys, *of_heads)
    for wrong in ([1.0], content["missed"][0], "heads", {"0": []}, [[[["a"]]]]):
        file.write_text(json.dumps(content | {"missed": wrong}))
        assert f"drafters file {str(file)!r} does not fit this model" in fails_in_one_line(capsys, *of_heads)
    argv = ["image", "--model", pair, "--class", 1, "--scale-kv-per", "head", "-o", out]
    assert "--scale-kv-per needs --scale-kv BUDGET" in fails_in_one_line(capsys, *argv)


def test_late_scales_without_guidance_are_an_option(alone, tmp_path, capsys):
    argv = ["image", "--model", alone, "--class", 1, "-o", tmp_path / "out.png"]
    plain, late = run(capsys, *argv), run(capsys, *argv, "--unguided-scales", 2)
    assert plain["setting"] == "plain" and late["setting"] == "last 2 unguided" and late["unguided"] == 2
    assert "--unguided-scales must be from 1 to 5, got 6" in fails_in_one_line(capsys, *argv, "--unguided-scales", 6)
    assert "one value, or several with" in fails_in_one_line(capsys, *argv, "--unguided-scales", 1, 2)


def test_a_comparison_tries_budgets_of_layers_and_of_heads_and_unguided_scales(alone, tmp_path, capsys):
    file = tmp_path / "drafters.json"
    run(capsys, "image", "calibrate", "--model", alone, "-o", file)
    argv = ["image", "--compare", "--model", alone, "--class", 1, "--count", 1, "--repeat", 1, "--scale-kv", 0.2]
    argv += ["--scale-kv-per", "layer", "head", "--scale-kv-drafters", file, "--unguided-scales", 1, 2]
    rows = {row["setting"]: row for row in run(capsys, *argv, "-o", tmp_path / "folder")["settings"]}
    assert list(rows) == ["plain", "ScaleKV 20%", "ScaleKV 20% per head", "last 1 unguided", "last 2 unguided"]
    assert 0.9 * rows["ScaleKV 20%"]["cache"] <= rows["ScaleKV 20% per head"]["cache"] <= rows["ScaleKV 20%"]["cache"]
    assert rows["ScaleKV 20%"]["psnr"] != rows["ScaleKV 20% per head"]["psnr"]
    assert rows["last 2 unguided"]["predicted_speedup"] > rows["last 1 unguided"]["predicted_speedup"] > 1
