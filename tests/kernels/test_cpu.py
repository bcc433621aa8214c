"""The compiled CPU kernel: found, built, refused and called as it should be."""

import shutil
import warnings

import pytest
import torch

from draftdiff.kernels import block_sparse, cpu
from draftdiff.kernels.block_sparse import block_sparse_attention, resolve
from tests.kernels.cases import KERNEL_CASES, make

HERE = (torch.device("cpu"), torch.float32, 64)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has never built the kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu._library.cache_clear()
    resolve.cache_clear()
    yield tmp_path / "draftdiff"
    cpu._library.cache_clear()
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
def test_it_is_built_once_into_the_users_cache(fresh):
    assert block_sparse.unavailable("cpu", *HERE) is None
    (built,) = fresh.iterdir()
    cpu._library.cache_clear()
    time = built.stat().st_mtime_ns
    assert block_sparse.unavailable("cpu", *HERE) is None
    assert built.stat().st_mtime_ns == time


@needs_compiler
def test_a_head_dim_it_cannot_pack_goes_to_the_torch_backend():
    assert "takes a head_dim that is a multiple of" in (block_sparse.unavailable("cpu", *HERE[:2], 12) or "")


@needs_compiler
def test_one_thread_and_two_give_the_same():
    q, k, v, mask, tiling, text_mask, tail = make(KERNEL_CASES[3], 64, torch.float32, True)
    outs = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs.append(block_sparse_attention(q, k, v, mask, tiling=tiling, text_mask=text_mask, tail=tail, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(*outs)


@needs_compiler
def test_it_reads_strided_views_in_place():
    q, k, v, mask, tiling, _, tail = make(KERNEL_CASES[1], 64, torch.float32, True)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    expected = block_sparse_attention(q, k, v, mask, tiling=tiling, tail=tail, backend="cpu")
    assert torch.equal(block_sparse_attention(*views, mask, tiling=tiling, tail=tail, backend="cpu"), expected)


@needs_compiler
@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_very_large_scores_neither_overflow_nor_leak(scale):
    q, k, v, mask, tiling, text_mask, tail = make(KERNEL_CASES[3], 64, torch.float32, True)
    call = {"tiling": tiling, "text_mask": text_mask, "tail": tail, "scale": scale}
    expected = block_sparse_attention(q, k, v, mask, backend="reference", **call)
    out = block_sparse_attention(q, k, v, mask, backend="cpu", **call)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=1e-3)
