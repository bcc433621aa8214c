"""The compiled CPU kernel: found, built, refused and called as it should be."""

import ctypes
import errno
import os
import shutil
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftdiff.kernels import block_sparse, cache, cpu
from draftdiff.kernels.block_sparse import block_sparse_attention, block_sparse_attention_lse, resolve
from tests.kernels.cases import KERNEL_CASES, assert_attends, make

HERE = (torch.device("cpu"), torch.float32, 64)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has never built the kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("CXX", "DRAFTDIFF_CPU_MARCH"):
        monkeypatch.delenv(name, raising=False)
    for forget in (cpu._load.cache_clear, resolve.cache_clear, cache._say_once.cache_clear):
        forget()
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


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not there")
def test_clang_builds_it_too(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    assert block_sparse.unavailable("cpu", *HERE) is None
    problem = make(KERNEL_CASES[3], 64, torch.float32, True)
    assert_attends(*block_sparse_attention_lse(problem, backend="cpu"), problem)


def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(fresh, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    reason = block_sparse.unavailable("cpu", *HERE)
    assert reason is not None
    assert "could not be compiled with" in reason
    assert "\n" not in reason
    assert list(fresh.iterdir()) == []


@pytest.fixture
def built(fresh, monkeypatch):
    """A library that was built from other sources than ours, in no time, and says which of its builds it is."""
    builds = []

    def compile(_compiler, _flags):
        builds.append(len(builds))
        return b"library %d" % builds[-1]

    monkeypatch.setattr(cpu, "_compile", compile)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: (path, Path(path).read_bytes()[:-32].decode()))

    def load():
        cpu._load.cache_clear()
        return cpu.library()

    yield load
    cpu._load.cache_clear()


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "a bit", "writable", "link", "another's"])
def test_a_library_that_is_not_as_it_was_built_is_built_anew(damage, built, fresh, tmp_path):
    path, said = built()
    assert said == built()[1] == "library 0"
    path = Path(path)
    assert path.parent == fresh and stat.S_IMODE(fresh.stat().st_mode) == 0o700
    content = path.read_bytes()
    if damage == "writable":
        path.chmod(0o666)
    elif damage == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    elif damage == "another's":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(path, 12345, 12345)
    else:
        cut = {"cut": content[:-5], "empty": b"", "foreign": b"\x7fELF of another", "a bit": b"L" + content[1:]}[damage]
        path.write_bytes(cut)
    assert built() == (str(path), "library 1") == built()
    assert path.read_bytes()[:-32] == b"library 1" and cache.is_private(path)


@pytest.mark.parametrize(
    "trouble", ["no home", "a file", "read-only", "another's", "a full disk", "a folder of its name"]
)
def test_where_nothing_can_be_kept_the_kernel_serves_all_the_same_and_says_so_once(
    trouble, built, fresh, monkeypatch, caplog
):
    if trouble == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    elif trouble == "a file":
        fresh.write_text("not a folder")
    elif trouble == "read-only":
        monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    elif trouble == "another's":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        fresh.mkdir()
        os.chown(fresh, 12345, 12345)
        fresh.chmod(0o777)
    elif trouble == "a full disk":
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    else:
        path, _ = built()
        Path(path).unlink()
        Path(path).mkdir()
    caplog.clear()
    path, said = built()
    assert said.startswith("library ") and not path.startswith(str(fresh)) and not Path(path).exists()
    assert built()[1].startswith("library ")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compiled kernels cannot be kept for the next run: ")
    if trouble == "another's":
        assert stat.S_IMODE(fresh.stat().st_mode) == 0o777 and not list(fresh.iterdir())  # not ours to change


def failing(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_folder_that_others_can_write_to_is_made_private_and_what_they_left_is_not_run(built, fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    _, said = built()
    assert said == "library 0" and stat.S_IMODE(fresh.stat().st_mode) == 0o700


def test_a_disk_from_which_nothing_may_be_run_still_serves(built, fresh, monkeypatch):
    load = ctypes.CDLL

    def refuse(path):
        if path.startswith(str(fresh)):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    path, said = built()
    assert said == "library 0" and not path.startswith(str(fresh))


needs_compiler = pytest.mark.skipif(bool(cpu.unavailable(*HERE)), reason="no C++ compiler")


@needs_compiler
def test_it_is_built_once_into_the_users_cache_and_says_so_once(fresh, caplog):
    assert block_sparse.unavailable("cpu", *HERE) is None
    (built,) = fresh.iterdir()
    assert [record.getMessage().startswith("compiling the CPU kernel, once, by ") for record in caplog.records] == [
        True
    ]
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
    assert cpu.library().draftdiff_panel() == panel
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
