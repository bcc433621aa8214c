"""The measurement of smaller caches, on models small enough for a test."""

import json

import pytest

from draftdiff.bench import var_caches, var_models
from draftdiff.cli import main


@pytest.fixture
def bench(monkeypatch, tmp_path):
    text = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16, "text_dim": 128, "size": "0.06M"}
    shape = var_models.BenchModel(text | {"bits": 8}, text | {"bits": 8})
    monkeypatch.setattr(var_caches, "SHAPES", {"infinity-2b": shape})
    monkeypatch.setattr(var_caches, "CALIBRATION", 2)
    argv = ["--device", "cpu", "--budgets", "0.2", "--unguided", "2", "--pictures", "2"]
    return lambda *more: main(["bench", "var", "caches", "-o", str(tmp_path), *argv, *more])


def test_budgets_per_layer_and_per_head_are_led_along_the_plain_picture_at_equal_bytes(bench, tmp_path, capsys):
    assert bench("--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "cpu-var-caches.json").read_text()) == payload
    embedded, shaped = payload["results"]
    assert embedded["model"] == "mini-image" and embedded["pictures"] == 2 and shaped["pictures"] == 1
    for result in payload["results"]:
        names = ["plain", "ScaleKV 20% per layer", "ScaleKV 20% per layer, calibrated", "ScaleKV 20% per head"]
        assert [row["setting"] for row in result["rows"]] == [*names, "last 2 unguided"]
        plain, layer, calibrated, head, unguided = result["rows"]
        assert plain["logits_error"] == 0 and plain["predicted_speedup"] is None
        assert 0.98 * layer["cache"] <= head["cache"] <= 0.2 * plain["cache"]
        rivals = [min(pair) for pair in zip(layer["errors"], calibrated["errors"])]
        assert head["lower"] == sum(own < rival for own, rival in zip(head["errors"], rivals)) / len(rivals)
        for row in (layer, calibrated, head, unguided):
            assert 0 < row["logits_error"] < 1 and row["predicted_speedup"] > 1
        assert unguided["cache"] < plain["cache"]
    assert all(row["psnr"] > 20 for row in embedded["rows"][1:]) and shaped["rows"][1]["latents_error"] > 0


def test_a_cache_above_its_budget_fails_the_benchmark(bench, monkeypatch, capsys):
    apply = var_caches.ImageModel.apply
    monkeypatch.setattr(var_caches.ImageModel, "apply", lambda model, _setting: apply(model, var_caches.PLAIN))
    assert bench("--models", "infinity-2b") == 1
    assert "infinity-2b, ScaleKV 20% per head: the cache is 100.0% of the plain one" in capsys.readouterr().err


def test_a_wrong_argument_is_one_line(bench, capsys):
    assert bench("--budgets", "1.5") == 2
    assert "budget must be above 0 and at most 1, got 1.5" in capsys.readouterr().err
    assert bench("--models", "infinity-3b") == 2
    assert "mini-image, infinity-2b" in capsys.readouterr().err
