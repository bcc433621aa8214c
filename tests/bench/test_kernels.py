"""The kernel benchmark on a case of a few tokens: what it writes, its checks, and its arithmetic."""

import importlib.machinery
import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from draftdiff.bench import kernels, peers
from draftdiff.bench.kernel_bars import bars
from draftdiff.bench.runner import Absent
from draftdiff.cli import main

TINY = kernels.Case((3, 10, 20), 2, 64, "600 tokens, no axis divides")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on the tiny case; returns its status and its result."""
    monkeypatch.setattr(kernels, "CASES", {"cpu": {"tiny": TINY}, "cuda": {}})

    def run(*arguments):
        given = ["--device", "cpu", "--rounds", "2", "--densities", "0.4", "1", "-o", str(tmp_path)]
        status = main(["bench", "kernels", *given, *arguments])
        file = tmp_path / "cpu-kernels.json"
        return status, json.loads(file.read_text()) if file.exists() else None

    return run


def test_every_backend_is_timed_and_checked_or_absent_with_a_reason(bench, tmp_path):
    status, result = bench()
    assert status == 0
    assert (tmp_path / "cpu-kernels.png").stat().st_size > 10_000
    rows = result["rows"]
    assert {row["density"] for row in rows} == {0.4, 1.0}
    for row in rows:
        if row["absent"] is not None:
            assert row["absent"] and row["seconds"] is None and row["flops"] is None
        else:
            assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    timed = {row["backend"] for row in rows if row["seconds"]}
    assert {"SDPA flash", "torch", "torch + tail", "torch + tail + tokens", *kernels.BEFORE} <= timed
    dense = next(row for row in rows if row["backend"] == "SDPA flash")
    assert dense["of_dense_time"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert dense["flops"] == 4 * 600**2 * 2 * 64
    full = next(row for row in rows if row["backend"] == "torch" and row["density"] == 1)
    assert full["flops"] == dense["flops"]
    kept = next(row for row in rows if row["backend"] == "torch" and row["density"] == 0.4)
    assert 0.2 < kept["flops"] / dense["flops"] < 0.6
    assert kept["tflops"] == pytest.approx(kept["flops"] / kept["seconds"]["median"] / 1e12)


def test_a_wrong_kernel_ends_the_script_with_status_1(bench, monkeypatch, capsys):
    right = kernels.block_sparse_attention
    monkeypatch.setattr(kernels, "block_sparse_attention", lambda *a, **k: right(*a, **k) * 1.01)
    status, result = bench("--densities", "0.4")
    assert status == 1
    assert "wrong: torch in tiny at 0.4" in capsys.readouterr().err
    assert not any(row["correct"] for row in result["rows"] if row["backend"] == "torch")


@pytest.mark.parametrize("name", [*kernels.SPARSE, *kernels.CHOOSING, "flash-attn-3", "flash-attn-4", "sageattention"])
def test_a_peer_that_cannot_run_here_says_why(name):
    inputs, _, _ = kernels.make_inputs(TINY, torch.device("cpu"), torch.float32, 0.3)
    chosen = {name: prepare for name, (prepare, _) in kernels.CHOOSING.items()}
    with pytest.raises(Absent, match="runs on a GPU only"):
        (kernels.SPARSE | kernels.DENSE | chosen)[name](inputs)


@pytest.fixture
def kitchen(monkeypatch):
    """A package that does what comfy-kitchen documents of `sol_attn` with all kept, and notes how it was called."""
    monkeypatch.setattr(peers, "_needs_gpu", lambda inputs: None)
    calls = []

    def sol_attn(q, k, v, *, scale, block_len, **choice):
        calls.append(choice)
        assert q.shape[1] == 64 * len(block_len) and block_len.dtype == torch.int32
        live = torch.arange(64) < block_len[:, None]
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, live.flatten()[None], scale=scale)
        return out.transpose(1, 2).masked_fill(~live.flatten()[:, None, None], float("nan"))

    package = types.ModuleType("comfy_kitchen")
    package.__spec__ = importlib.machinery.ModuleSpec("comfy_kitchen", None)
    package.sol_attn = sol_attn
    monkeypatch.setitem(sys.modules, "comfy_kitchen", package)
    return calls


def test_a_peer_that_chooses_for_itself_is_checked_whole_and_timed_at_the_density(kitchen):
    case = kernels.Case((3, 10, 20), 2, 128, "600 tokens, no axis divides")
    inputs, _, _ = kernels.make_inputs(case, torch.device("cpu"), torch.float32, 0.3)
    run, whole = kernels.CHOOSING["comfy-kitchen sol_attn"]
    call, restore = whole(inputs)
    assert kernels.error_on_rows(restore(call()), inputs, None, dense=True) < 1e-5
    run(inputs)[0]()
    run(replace(inputs, keep=torch.ones_like(inputs.keep)))[0]()
    everything = {"tau": -1e9}  # a ratio of 1 is refused
    assert kitchen == [everything, {"topk_ratio": pytest.approx(float(inputs.keep.float().mean()))}, everything]
    with pytest.raises(Absent, match="head_dim 128 only"):
        whole(kernels.make_inputs(TINY, torch.device("cpu"), torch.float32, 0.3)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "huge"], "--cases must be among tiny, got 'huge'"),
        (["--densities", "0"], "--densities: must be above 0 and at most 1, got '0'"),
        (["--rounds", "0"], "--rounds: must be a whole number from 1 on, got '0'"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
    ],
)
def test_bad_arguments_are_named_in_one_line(bench, capsys, arguments, message):
    status, result = bench(*arguments)
    assert status == 2 and result is None
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bars_compare_what_was_measured():
    def row(backend, density, ratio):
        spread = {"median": ratio, "min": ratio, "max": ratio}
        return {"case": "cpu-64", "backend": backend, "density": density, "seconds": spread, "of_dense_time": spread}

    found = bars([row("cpu + tail + tokens", 0.1, 0.2), row("cpu + tail + tokens", 0.25, 0.2)])
    assert [(bar["measured"], bar["bar"], bar["met"]) for bar in found] == [
        (0.2, "<= 0.12", False),
        (0.2, "<= 0.28", True),
    ]
