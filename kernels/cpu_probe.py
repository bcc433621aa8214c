"""The probe (`core.probe`) on a CPU, by cpu_probe.cpp: the same findings, some ten times as fast."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.kernels.cpu import Strides, library


class _Probe(ctypes.Structure):
    """`Probe` of cpu_probe.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_mean", "k", "v", "v_mean", "center", "slots")),
        *((name, ctypes.c_void_p) for name in ("error", "keep", "singles")),
        *((name, Strides) for name in ("k_at", "v_at")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "dim", "rows", "tiles", "block", "most")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


def errors(q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, *, scale: float) -> Tensor:
    """`core.probe.errors`."""
    error = torch.empty(*q_mean.shape[:3], tiling.video_tiles)
    _call(q_mean, k, v, means, tiling, scale, error=error)
    return error


def singles(
    q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, keep: Tensor, *, scale: float, tokens: int
) -> Tensor:
    """`core.probe.singles`."""
    found = torch.empty(*q_mean.shape[:3], tokens, dtype=torch.int32)
    _call(q_mean, k, v, means, tiling, scale, keep=keep.contiguous(), singles=found)
    return found


def _call(q_mean: Tensor, k: Tensor, v: Tensor, means: Tail, tiling: Tiling, scale: float, **more: Tensor) -> None:
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k.float(), v.float()))
    tensors = {
        "q_mean": q_mean.contiguous(),
        "k": k,
        "v": v,
        "v_mean": means.v_mean.contiguous(),
        "center": (q_mean @ means.k_mean.mT * (scale * math.log2(math.e))).contiguous(),
        "slots": tiling.slots,
        **more,
    }
    call = _Probe(
        **{name: x.data_ptr() for name, x in tensors.items()},
        k_at=Strides(*k.stride()[:3]),
        v_at=Strides(*v.stride()[:3]),
        batch=q_mean.shape[0],
        heads=q_mean.shape[1],
        dim=q_mean.shape[-1],
        rows=q_mean.shape[2],
        tiles=tiling.video_tiles,
        block=tiling.block_size,
        most=more["singles"].shape[-1] if "singles" in more else 0,
        scale=scale,
        threads=torch.get_num_threads(),
    )
    if library().draftdiff_probe(ctypes.byref(call)):
        raise MemoryError(f"no memory for the keys of a head of {k.shape[1]} tokens")
