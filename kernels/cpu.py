"""The `cpu` backend: a C++ kernel (cpu.cpp), compiled once into the user's cache and called through ctypes. The probe
(cpu_probe.cpp) is in the same library.

Calls release the interpreter lock and use torch's own OpenMP threads. The environment variable DRAFTDIFF_CPU_MARCH
chooses another instruction set than this processor's, as the compiler's -march names it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from draftdiff.kernels import cache
from draftdiff.kernels.problem import Problem

differentiable = False
reads_tokens = True
SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.cpp", "cpu_probe.cpp"))
HEADER = Path(__file__).with_name("cpu_common.h")
_FLAGS = ("-std=c++17", "-O3", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp")


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    try:
        built = library()
    except OSError as error:
        return str(error)
    panel = built.draftdiff_panel()
    if head_dim % panel:
        return f"takes a head_dim that is a multiple of {panel} on this processor, got {head_dim}"
    return None


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises OSError with the reason where it cannot be had."""
    return _load(os.environ.get("DRAFTDIFF_CPU_MARCH") or "native")


@lru_cache(maxsize=4)
def _load(march: str) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("needs a C++ compiler (g++ or clang++), none was found")
    flags = (f"-march={march}", *_FLAGS)
    name = f"cpu-{_fingerprint(compiler, flags)}.so"
    path = cache.stored(name)
    content = _whole(path) if path else None
    if content is None:
        built = _compile(compiler, flags)
        content = built + hashlib.sha256(built).digest()  # which loaders pass over
        path = cache.store(name, content)
    if path is not None:
        with suppress(OSError):  # a disk from which nothing may be run
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="draftdiff.") as folder:
        copy = Path(folder, name)
        copy.write_bytes(content)
        return ctypes.CDLL(str(copy))


def _whole(path: Path) -> bytes | None:
    """The content of a kept library, None unless it ends in its digest: a loader may crash on a file that was cut."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content[:-32]).digest() == content[-32:] else None


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the source and how it is built, the flags, the compiler and the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith("flags")), platform.machine() + platform.processor())
    files = (file.read_bytes() for file in (*SOURCES, HEADER, Path(__file__)))
    parts = [*files, " ".join(flags).encode(), _version(compiler), processor.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, flags: tuple[str, ...]) -> bytes:
    """The shared library. Raises OSError with the compiler's reason."""
    logging.getLogger("draftdiff").warning("compiling the CPU kernel, once, by %s", compiler)
    with tempfile.TemporaryDirectory(prefix="draftdiff.") as folder:
        products = {source: Path(folder, source.with_suffix(".o").name) for source in SOURCES}
        built = Path(folder, "cpu.so")
        commands = [[compiler, *flags, "-c", str(source), "-o", str(product)] for source, product in products.items()]
        # Linked without an OpenMP of its own: the symbols are found in the one that torch has loaded, so that two
        # thread pools do not fight for the cores. What clang compiles calls LLVM's, and torch has GNU's.
        openmp = ["-fopenmp"] if b"clang" in _version(compiler) else []
        for command in (*commands, [compiler, "-shared", *openmp, *map(str, products.values()), "-o", str(built)]):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                raise OSError(f"could not be compiled with {compiler}: {reason}")
        return built.read_bytes()


class Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("batch", "token", "head"))


class _Call(ctypes.Structure):
    """`Call` of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "slots", "readable", "keep")),
        *((name, ctypes.c_void_p) for name in ("k_mean", "v_mean", "log2_counts", "singles", "wanted")),
        *((name, Strides) for name in ("q_at", "k_at", "v_at")),
        *((name, ctypes.c_int64) for name in ("readable_batch", "counts_row", "most_singles")),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("tiles", "video_tiles", "block_size")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


def run(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    tiling, tail = problem.tiling, problem.tail
    batch, tokens, heads, head_dim = problem.q.shape
    wide = [x.float() for x in (problem.q, problem.k, problem.v)]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in wide)
    out = torch.empty((batch, tokens, heads, head_dim))
    lse = torch.empty((batch, tokens, heads)) if want_lse else None
    readable = problem.readable.contiguous()
    log2_counts = (problem.log_counts.float() * math.log2(math.e)).contiguous()
    singles = None if problem.tokens is None else problem.tokens.contiguous()
    wanted = None
    if problem.queries is not None:
        wanted = torch.zeros(tiling.tiles, dtype=torch.bool).index_fill_(0, problem.queries, True)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "slots": tiling.slots,
        "readable": readable,
        "keep": problem.keep.contiguous(),
        "k_mean": None if tail is None else tail.k_mean.contiguous(),
        "v_mean": None if tail is None else tail.v_mean.contiguous(),
        "log2_counts": log2_counts,
        "singles": singles,
        "wanted": wanted,
    }
    call = _Call(
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        **{f"{name}_at": Strides(*x.stride()[:3]) for name, x in zip("qkv", (q, k, v))},
        readable_batch=readable.stride(0) if len(readable) > 1 else 0,
        counts_row=0 if log2_counts.dim() == 1 else tiling.video_tiles,
        most_singles=0 if singles is None else singles.shape[-1],
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        tiles=tiling.tiles,
        video_tiles=tiling.video_tiles,
        block_size=tiling.block_size,
        scale=problem.factor,
        threads=torch.get_num_threads(),
    )
    if library().draftdiff_block_sparse(ctypes.byref(call)):
        raise MemoryError(
            f"no memory for packed keys and values of {batch} x {tokens} tokens, {heads} heads of {head_dim}"
        )
    return out.to(problem.q.dtype), lse
