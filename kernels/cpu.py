"""The `cpu` backend: a C++ kernel (cpu.cpp), compiled once into the user's cache and called through ctypes.

Calls release the interpreter lock and use torch's own OpenMP threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.core.select import BlockMask

SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp"]


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    try:
        library = _library()
    except OSError as error:
        return str(error)
    panel = library.draftdiff_panel()
    if head_dim % panel:
        return f"takes a head_dim that is a multiple of {panel} on this processor, got {head_dim}"
    return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The compiled kernel. Raises OSError with the reason where it cannot be had."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("needs a C++ compiler (g++ or clang++), none was found")
    path = cache_folder() / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftdiff"


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    processor = flags[0] if flags else platform.machine() + platform.processor()
    parts = [SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, processor.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    logging.getLogger("draftdiff").warning("compiling the CPU kernel, once, into %s", path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        product, built = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        # Linked without an OpenMP of its own: the symbols are found in the one that torch has loaded, so that two
        # thread pools do not fight for the cores.
        for command in (
            [compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(product)],
            [compiler, "-shared", str(product), "-o", str(built)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                raise OSError(f"could not be compiled with {compiler}: {reason}")
        os.replace(built, path)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    tiling: Tiling,
    text_mask: Tensor | None,
    tail: Tail | None,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, tokens, heads, head_dim = q.shape
    wide = [x.float() for x in (q, k, v)]
    wide = [x if x.stride(-1) == 1 else x.contiguous() for x in wide]
    out = torch.empty((batch, tokens, heads, head_dim))
    lse = torch.empty((batch, tokens, heads)) if want_lse else None
    readable = tiling.readable(text_mask).contiguous()
    keep = mask.keep.contiguous()
    log2_tokens = tiling.counts[: tiling.video_tiles].log2()
    means = (tail.k_mean.contiguous(), tail.v_mean.contiguous()) if tail is not None else (None, None)
    strides = (ctypes.c_int64 * 9)(*(x.stride(axis) for x in wide for axis in (0, 1, 2)))

    def pointer(x: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(x.data_ptr() if x is not None else None)

    no_memory = _library().draftdiff_block_sparse(
        *map(pointer, (*wide, out, lse, tiling.slots, readable)),
        ctypes.c_int64(readable.stride(0) if len(readable) > 1 else 0),
        *map(pointer, (keep, *means, log2_tokens)),
        strides,
        *map(ctypes.c_int64, (batch, tokens, heads, head_dim, tiling.tiles, tiling.video_tiles, tiling.block_size)),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )
    if no_memory:
        raise MemoryError(
            f"no memory for packed keys and values of {batch} x {tokens} tokens, {heads} heads of {head_dim}"
        )
    return out.to(q.dtype), lse
