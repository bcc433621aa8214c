"""The compiled CPU kernel: found, built, refused and called as it should be."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftdiff.kernels import block_sparse, cpu
from draftdiff.kernels.block_sparse import block_sparse_attention, block_sparse_attention_lse, resolve
from tests.kernels.cases import KERNEL_CASES, assert_attends, make

HERE = (torch.device("cpu"), torch.float32, 64)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has never built the kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("CXX", "DRAFTDIFF_CPU_MARCH"):
        monkeypatch.delenv(name, raising=False)
    cpu._load.cache_clear()
    resolve.cache_clear()
    yield tmp_path / "draftdiff"
    cpu._load.cache_clear()
    resolve.cache_clear()


def test_without_a_compiler_the_torch_backend_serves_and_one_warning_says_why(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=r"uses the 'torch' backend: cpu needs a C\+\+ compiler"):
        assert resolve("auto", *HERE) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto", *HERE) == "torch"
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run here: needs a C\+\+ compiler"):
        resolve("cpu", *HERE)


def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(fresh, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    reason = block_sparse.unavailable("cpu", *HERE)
    assert reason is not None
    assert "could not be compiled with" in reason
    assert "\n" not in reason
    assert list(fresh.iterdir()) == []


needs_compiler = pytest.mark.skipif(bool(cpu.unavailable(*HERE)), reason="no C++ compiler")


@needs_compiler
def test_it_is_built_once_into_the_users_cache_and_says_so_once(fresh, caplog):
    assert block_sparse.unavailable("cpu", *HERE) is None
    (built,) = fresh.iterdir()
    said = f"compiling the CPU kernel, once, into {fresh}"
    assert [record.getMessage() for record in caplog.records] == [said]
    cpu._load.cache_clear()
    time = built.stat().st_mtime_ns
    assert block_sparse.unavailable("cpu", *HERE) is None
    assert built.stat().st_mtime_ns == time
    assert len(caplog.records) == 1


def knows(march):
    """Whether this processor knows the instruction set, as Linux tells."""
    needs = {"x86-64-v2": {"sse4_2", "ssse3"}, "x86-64-v3": {"avx2", "fma", "bmi2"}}[march]
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and needs <= set(cpuinfo.read_text().split())


@needs_compiler
@pytest.mark.parametrize(("march", "panel"), [("x86-64-v2", 8), ("x86-64-v3", 16)])
def test_a_lesser_instruction_set_can_be_chosen_and_is_right(fresh, monkeypatch, march, panel):
    if not knows(march):
        pytest.skip(f"this processor is not {march}")
    assert block_sparse.unavailable("cpu", *HERE) is None
    monkeypatch.setenv("DRAFTDIFF_CPU_MARCH", march)
    assert cpu._library().draftdiff_panel() == panel
    assert len(list(fresh.iterdir())) == 2, "one for each instruction set"
    problem = make(KERNEL_CASES[3], 64, torch.float32, True)
    assert_attends(*block_sparse_attention_lse(problem, backend="cpu"), problem)


@needs_compiler
def test_an_unknown_instruction_set_is_told_by_the_compiler(fresh, monkeypatch):
    monkeypatch.setenv("DRAFTDIFF_CPU_MARCH", "abacus")
    assert "abacus" in (block_sparse.unavailable("cpu", *HERE) or "")


@needs_compiler
def test_a_head_dim_it_cannot_pack_goes_to_the_torch_backend():
    assert "takes a head_dim that is a multiple of" in (block_sparse.unavailable("cpu", *HERE[:2], 12) or "")


@needs_compiler
def test_one_thread_and_two_give_the_same():
    problem = make(KERNEL_CASES[3], 64, torch.float32, True)
    outs = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs.append(block_sparse_attention(problem, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(*outs)


@needs_compiler
def test_it_reads_strided_views_in_place():
    problem = make(KERNEL_CASES[1], 64, torch.float32, True)
    views = {name: getattr(problem, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    assert not views["q"].is_contiguous()
    expected = block_sparse_attention(problem, backend="cpu")
    assert torch.equal(block_sparse_attention(replace(problem, **views), backend="cpu"), expected)
