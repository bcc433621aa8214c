"""The benchmark of next-scale models, on models small enough for a test."""

import json
from statistics import median

import pytest
import torch

from draftdiff.bench import var, var_models
from draftdiff.cli import main


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command, with a VAR pair and an Infinity of one or two thin layers."""
    heads = {"num_attention_heads": 1, "attention_head_dim": 32, "vocab_size": 64, "patch_nums": (1, 2, 3, 4, 6, 8)}
    pair = {"num_layers": 6, **heads, "refiner": {"num_layers": 1, **heads}}
    text = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 32, "text_dim": 128, "size": "0.06M"}
    small = {
        "var-d20": var_models.BenchModel(pair, pair, (2,)),
        "infinity-2b": var_models.BenchModel(text | {"bits": 8}, text | {"bits": 8}, (1,)),
        "infinity-8b": var_models.BenchModel(text | {"bits": 56}, text | {"bits": 56}, (1,)),
    }
    monkeypatch.setattr(var, "MODELS", small)
    return lambda *arguments: main(["bench", "var", "models", "-o", str(tmp_path), *arguments])


def test_the_results_hold_every_setting_with_figures_that_follow_from_the_raw_times(bench, tmp_path, capsys):
    argv = ["--device", "cpu", "--draft-scales", "3", "4", "--budgets", "0.2", "--rounds", "2"]
    code = bench(*argv, "--models", "var-d20", "infinity-2b", "--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    payload = json.loads((tmp_path / "cpu-var.json").read_text())
    assert json.loads(printed.out) == payload and payload["complete"] and "CPU" in payload["measured_on"]
    pair, two = payload["results"]
    both = ["plain", "CoDe N=3", "CoDe N=4", "ScaleKV 20%", "CoDe N=4 + ScaleKV 20%"]
    assert [row["setting"] for row in pair["rows"]] == both
    assert [row["setting"] for row in two["rows"]] == ["plain", "ScaleKV 20%"]
    assert pair["batch"] == 2 and pair["tokens"] == [1, 4, 9, 16, 36, 64]
    for result in payload["results"]:
        plain = result["rows"][0]
        assert plain["speedup"] is None and plain["skipped"] is None
        for row in result["rows"][1:]:
            ratios = [p / s for p, s in zip(plain["seconds"], row["seconds"])]
            assert row["speedup"]["median"] == pytest.approx(median(ratios))
            assert row["predicted_speedup"] == pytest.approx(plain["flops"] / row["flops"])
            assert row["cache_share"] == pytest.approx(row["cache"] / plain["cache"])
            if row["budget"]:
                assert row["cache_share"] <= 0.2 * 1.02
    plain, three, four = pair["rows"][:3]
    assert 1 < four["predicted_speedup"] < three["predicted_speedup"]
    assert three["weights"] > plain["weights"] and plain["memory_total"] == plain["memory"] + plain["weights"]
    # All scales but the last of six layers of width 32, for keys and values, in fp32, of twice the batch.
    assert plain["cache"] == (1 + 4 + 9 + 16 + 36) * 6 * 32 * 2 * 4 * 2 * 2
    assert (tmp_path / "cpu-var.png").stat().st_size > 10_000
    assert {file.name for file in tmp_path.iterdir()} == {"cpu-var.json", "cpu-var.png"}


def test_a_setting_without_memory_is_a_row_with_its_reason(bench, tmp_path, capsys, monkeypatch):
    apply = var_models.RandomModel.apply

    def narrow(model, setting):
        if setting.budget is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return apply(model, setting)

    monkeypatch.setattr(var_models.RandomModel, "apply", narrow)
    assert bench("--models", "infinity-2b", "--device", "cpu", "--rounds", "1") == 0
    assert "not enough memory" in capsys.readouterr().out
    rows = json.loads((tmp_path / "cpu-var.json").read_text())["results"][0]["rows"]
    assert [bool(row["skipped"]) for row in rows] == [False, True, True, True] and rows[1]["seconds"] is None


def test_a_round_that_makes_something_else_fails_the_benchmark(bench, capsys, monkeypatch):
    latents = var_models.RandomModel.latents

    def restless(model, subjects, seed, **call):
        return latents(model, subjects, seed, **call) + torch.rand(())

    monkeypatch.setattr(var_models.RandomModel, "latents", restless)
    assert bench("--models", "infinity-2b", "--device", "cpu", "--rounds", "1", "--budgets", "0.2") == 1
    assert "infinity-2b, batch 1, plain: a round made other latents" in capsys.readouterr().err


def test_half_precision_runs(bench):
    argv = ["--device", "cpu", "--dtype", "bfloat16", "--budgets", "0.2", "--draft-scales", "3", "--rounds", "1"]
    assert bench(*argv, "--models", "var-d20", "infinity-8b") == 0


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--budgets", "1.5"], ["1.5", "at most 1"]),
        (["--draft-scales", "10"], ["'10'", "1 to 9"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["--rounds", "0"], ["--rounds", "0"]),
        (["--device", "abacus"], ["'abacus' cannot be used"]),
        (["--models", "var-d17"], ["var-d17", "var-d20"]),
    ],
)
def test_a_wrong_argument_is_one_line(bench, tmp_path, capsys, argv, names):
    assert bench(*argv) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(name in error for name in names)
    assert not list(tmp_path.iterdir())


def test_the_released_sizes_are_those_of_the_papers():
    from draftdiff.var.transformer_infinity import InfinityTransformer2DModel
    from draftdiff.var.transformer_var import VARTransformer2DModel

    millions = {"var-d16": 310, "var-d20": 601, "var-d24": 1033, "var-d30": 2010, "var-d36": 2354, "infinity-2b": 2205}
    for name, expected in {**millions, "infinity-8b": 8376}.items():
        config = {key: value for key, value in var_models.MODELS[name].full.items() if key not in ("size", "refiner")}
        with torch.device("meta"):
            kind = InfinityTransformer2DModel if "bits" in config else VARTransformer2DModel
            parameters = sum(p.numel() for p in kind(**config).parameters())
        assert parameters / 1e6 == pytest.approx(expected, rel=2e-3), name
