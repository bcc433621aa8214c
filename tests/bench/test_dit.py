"""The benchmark of whole denoising steps, on models small enough for a test."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch

from draftdiff.bench import dit, models
from draftdiff.bench.dit_rows import Cell, Mode, Row, Step
from draftdiff.cli import main
from draftdiff.video.layouts import layout_for


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command, with models of two or three thin layers over 1,280 tokens."""
    small = {}
    for name in ("wan-1.3b", "hunyuan-13b", "cogvideox-5b"):
        model = models.MODELS[name]
        config = model.small.config | {"num_attention_heads": 1, "text_embed_dim": 32}
        if "text_dim" in config:
            config = {key: value for key, value in config.items() if key != "text_embed_dim"} | {"text_dim": 32}
        if "max_text_seq_length" in config:
            config["max_text_seq_length"] = 16
        small[name] = replace(model, small=models.Size(config, 5, 320, 512, text=16), batch=1)
    monkeypatch.setattr(dit, "MODELS", small)
    monkeypatch.setattr(dit, "CHECK_FRAMES", 1)
    return lambda *arguments: main(["bench", "dit", "-o", str(tmp_path), *arguments])


def test_the_results_hold_every_setting_with_figures_that_follow_from_the_raw_times(bench, tmp_path, capsys):
    code = bench("--device", "cpu", "--sparsity", "0.75", "--rounds", "2", "--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads((tmp_path / "cpu-dit.json").read_text())
    assert json.loads(printed.out) == result
    assert result["complete"]
    assert "CPU" in result["measured_on"]
    assert [model["name"] for model in result["models"]] == ["wan-1.3b", "hunyuan-13b", "cogvideox-5b"]
    for model in result["models"]:
        assert model["check"]["passed"]
        assert model["tokens"] == 1280
        for mode in ("eager", "eager, first block cache"):
            rows = {row["setting"]: row for row in model["rows"] if row["mode"] == mode}
            assert list(rows) == ["dense", "dense, hooked", "sparsity 0.75"]
            dense, hooked = rows["dense"], rows["dense, hooked"]
            assert hooked["relative_l2"] <= dense["relative_l2"] + 1e-6
            assert dense["attention_share"] > 0
            row = rows["sparsity 0.75"]
            assert 1e-3 < row["relative_l2"] < 1
            assert row["finite"]
            assert row["density"] == pytest.approx(0.25, abs=0.06)
            ratios = [d / s for d, s in zip(dense["seconds_per_step_rounds"], row["seconds_per_step_rounds"])]
            assert row["speedup"]["median"] == pytest.approx(median(ratios))
            parts = row["parts_seconds"]
            assert parts["draft"] + parts["select"] > 0
            assert 0 < parts["kernel"] < row["seconds_per_step"]["max"]
            assert 0 < row["hook_seconds"] < row["seconds_per_step"]["max"]
            rounds = zip(
                dense["seconds_per_step_rounds"],
                hooked["seconds_per_step_rounds"],
                row["seconds_per_step_rounds"],
            )
            gains = [50 * stock / (10 * warm_up + 40 * sparse) for stock, warm_up, sparse in rounds]
            assert row["run"]["speedup"] == pytest.approx(median(gains))
    assert (tmp_path / "cpu-dit.png").stat().st_size > 10_000
    assert {file.name for file in tmp_path.iterdir()} == {"cpu-dit.json", "cpu-dit.png"}


def test_amdahls_law_gives_the_time_of_the_parts_put_together():
    # 10 s, of them 6 of attention; the sparse step: 1.5 s of attention, 4 s of the rest, 0.5 s that it should not cost.
    parts = {"draft": 0.1, "select": 0.2, "kernel": 1.0, "dense attention": 0.2, "sparse forward": 5.8}
    cells = [Cell(Mode(), name) for name in ("dense", "dense, hooked", "sparsity 0.8")]
    hooked = Step(10.2, {"dense attention": 6.0, "dense forward": 10.1})
    steps = dict(zip(cells, ([Step(10.0)], [hooked], [Step(6.0, parts)])))
    dense, sparse = Row.of(cells[0]), Row.of(cells[2], 0.8)
    sparse.fill(steps, cells[2], depth=2.0)
    assert sparse.attention_speedup == pytest.approx(4.0)
    assert sparse.predicted_speedup == pytest.approx(10 / (4 + 1.5))
    assert sparse.off_prediction == pytest.approx((10 / 6) / (10 / 5.5) - 1)
    assert sparse.draft_select_seconds == pytest.approx(0.3)
    assert sparse.hook_seconds == pytest.approx(0.2)
    assert sparse.run["seconds"] == pytest.approx(2 * (10 * 10.2 + 40 * 6.0))
    dense.fill(steps, cells[0], depth=1.0)
    assert dense.attention_share == pytest.approx(0.6)


def test_each_step_counts_its_own_seconds_alone():
    """The hook's clocks add up over all calls of a run."""
    model = models.MODELS["wan-1.3b"]
    size = models.Size(model.small.config | {"num_attention_heads": 1, "num_layers": 2}, 5, 160, 256, text=16)
    device = torch.device("cpu")
    transformer = models.build(model, size, device, torch.float32)
    inputs = models.make_inputs(model, size, device, torch.float32)
    config = dit.DraftAttentionConfig(0.5, dense_steps=0, dense_layers=0, min_tokens=0, dense_above=1.0)
    prepared = dit.prepared(transformer, config, Mode())
    plain = dit._call(transformer, inputs, 1)
    given = {"inputs": inputs, "plain": plain, "calls_per_step": 1}
    steps = [dit.time_step(prepared, config, Mode(), device, **given) for _ in range(4)]
    for step in steps:
        assert 0 < step.parts["sparse forward"] < step.seconds
        assert step.density == pytest.approx(steps[0].density)


def test_what_does_not_fit_in_memory_is_a_row_with_its_reason_and_the_rest_goes_on(
    bench, tmp_path, capsys, monkeypatch
):
    stock = dit.prepared

    def starved(transformer, config, mode):
        if config is not None and config.sparsity == 0.5:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return stock(transformer, config, mode)

    monkeypatch.setattr(dit, "prepared", starved)
    arguments = ["--device", "cpu", "--models", "wan-1.3b", "--sparsity", "0.5", "0.9", "--rounds", "1", "--no-cache"]
    assert bench(*arguments, "--layers", "2") == 0
    (model,) = json.loads((tmp_path / "cpu-dit.json").read_text())["models"]
    by_setting = {row["setting"]: row for row in model["rows"]}
    assert by_setting["sparsity 0.5"]["skipped"] == "not enough memory on this device: tried to allocate 80 GiB"
    assert by_setting["sparsity 0.9"]["speedup"]["median"] > 0
    assert model["layers"] == 2
    assert "extrapolated to 3 layers" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_fails_the_benchmark(bench, tmp_path, capsys, monkeypatch):
    from draftdiff.kernels import cpu, torch_backend

    for module in (cpu, torch_backend):
        right = module.run
        monkeypatch.setattr(
            module, "run", lambda *call, right=right: tuple(x if x is None else 1.02 * x for x in right(*call))
        )
    arguments = ["--device", "cpu", "--models", "wan-1.3b", "--sparsity", "0.9", "--rounds", "1", "--no-cache"]
    assert bench(*arguments) == 1
    assert "full selection differs from dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparsity", "1.5"], "1.5"),
        (["--models", "wan-2b"], "wan-2b"),
        (["--layers", "1"], "from 2 on, got '1'"),
        (["--rounds", "0"], "from 1 on, got '0'"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "cpu", "--dense-attention", "cudnn"], "--dense-attention"),
        (["-o", "/proc/self/comm/at/all"], "/proc/self/comm/at/all"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(bench, capsys, arguments, said):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_minimax_inputs_are_packed_as_its_layout_reads_them():
    model = models.MODELS.get("minimax-h3")
    if model is None:
        pytest.skip("this version of diffusers has no MiniMax-H3")
    assert model.full.tokens == 37_296
    size = replace(model.small, frames=22, height=128, width=192, text=30)
    transformer = models.build(model, size, torch.device("cpu"), torch.float32)
    inputs = models.make_inputs(model, size, torch.device("cpu"), torch.float32)
    layout = layout_for(transformer)
    assert layout.grid(transformer, inputs).shape == size.grid == (7, 4, 6)
    assert layout.lead(transformer, inputs) == 30
    with torch.no_grad():
        assert transformer(**inputs)[0].isfinite().all()
