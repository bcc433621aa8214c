"""Attention by other libraries on the inputs of `bench kernels`, each in the memory layout that it likes best.

Copies into that layout are made before the clock starts, which favours the peers: our kernels read the model's own.
Sparse peers get tiles in tile order. A library that is not installed, or cannot do a case, raises `Absent` with the
reason. None is a dependency; each is looked for when a case is prepared.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.bench.runner import Absent
from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling, choose_tile, tiling_for
from draftdiff.core.select import tile_lists
from draftdiff.kernels.problem import Problem
from draftdiff.kernels.torch_backend import from_tiles, to_tiles

Attention = Callable[[], Tensor]  # timed; returns what `restore` turns into [batch, tokens, heads, head_dim]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One case: q, k, v [1, tokens, heads, head_dim] in the model's order and what is kept.

    tokens, taken: read singly besides, as in `Problem`."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    tiling: Tiling
    tokens: Tensor | None = None
    taken: Tensor | None = None

    def problem(self, tail: Tail | None) -> Problem:
        return Problem(self.q, self.k, self.v, self.keep, self.tiling, tail=tail, tokens=self.tokens, taken=self.taken)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def is_even(self) -> bool:
        return self.tiling.tokens == self.tiling.slots.numel()


# The call, and what brings its result back.
Prepared = tuple[Attention, Callable[[Tensor], Tensor]]
Prepare = Callable[[Inputs], Prepared]


def _package(name: str, distribution: str) -> ModuleType:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Absent(f"{distribution} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel built for another torch or GPU fails in ways of its own
        raise Absent(f"{distribution} cannot be imported: {' '.join(str(error).split())[:120]}") from error


def _needs_gpu(inputs: Inputs) -> None:
    if inputs.q.device.type != "cuda":
        raise Absent("runs on a GPU only")


def _in_tile_order(inputs: Inputs, tiling: Tiling | None = None) -> list[Tensor]:
    """q, k, v as [1, heads, tiles * block, head_dim], zeros where a tile has no token. tiling: not theirs."""
    slots = (tiling or inputs.tiling).slots
    return [to_tiles(x, slots, (slots < 0)[None]).flatten(2, 3) for x in (inputs.q, inputs.k, inputs.v)]


def _from_tile_order(tiling: Tiling) -> Callable[[Tensor], Tensor]:
    shape = (tiling.tiles, tiling.block_size)
    return lambda out: from_tiles(out.unflatten(2, shape), tiling)


def sdpa(backend: str) -> Prepare:
    """PyTorch's own dense attention by one of its backends."""

    def prepare(inputs: Inputs) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        if inputs.q.device.type == "cpu" and backend != "FLASH_ATTENTION":
            raise Absent("not on a CPU")

        def run() -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v)

        return run, lambda out: out.transpose(1, 2)

    return prepare


def flash3_dense(inputs: Inputs) -> Prepared:
    """flash-attn-3, dense."""
    _needs_gpu(inputs)
    flash = _package("flash_attn_interface", "flash-attn-3")
    q, k, v = inputs.q, inputs.k, inputs.v

    def run() -> Tensor:
        out = flash.flash_attn_func(q, k, v, softmax_scale=inputs.scale)
        return out[0] if isinstance(out, tuple) else out  # older ones return the log-sum-exp too

    return run, lambda out: out


def flash4_dense(inputs: Inputs) -> Prepared:
    """flash-attn-4, dense."""
    _needs_gpu(inputs)
    flash = _package("flash_attn.cute.interface", "flash-attn-4")
    q, k, v = inputs.q, inputs.k, inputs.v
    return lambda: flash.flash_attn_func(q, k, v, softmax_scale=inputs.scale)[0], lambda out: out


def sage(inputs: Inputs) -> Prepared:
    """sageattention: dense, in 8 bits."""
    _needs_gpu(inputs)
    package = _package("sageattention", "sageattention")
    q, k, v = inputs.q, inputs.k.clone(), inputs.v  # version 1 takes the mean off the caller's keys
    return lambda: package.sageattn(q, k, v, tensor_layout="NHD", sm_scale=inputs.scale), lambda out: out


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs) -> Prepared:
    """FlexAttention with the same block mask, compiled."""
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    _needs_gpu(inputs)
    q, k, v = _in_tile_order(inputs)
    tiling, keep = inputs.tiling, inputs.keep
    readable = (tiling.slots >= 0).flatten()
    whole = (tiling.slots >= 0).all(-1)
    partial, full = (tile_lists(keep & which) for which in (~whole, whole))
    block_mask = FlexMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=tiling.block_size,
        mask_mod=lambda b, h, query, key: readable[key],
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    attention = _compiled_flex()
    return lambda: attention(q, k, v, block_mask=block_mask, scale=inputs.scale), _from_tile_order(inputs.tiling)


def flashinfer(inputs: Inputs) -> Prepared:
    """FlashInfer's variable block sparse attention; its plan, made on the host, is not timed."""
    _needs_gpu(inputs)
    package = _package("flashinfer", "flashinfer-python")
    tiling, heads = inputs.tiling, inputs.q.shape[2]
    q, k, v = (x[0, tiling.order].transpose(0, 1).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    sizes = tiling.counts.to(torch.int32).expand(heads, -1).contiguous()
    wrapper = package.VariableBlockSparseAttentionWrapper(torch.empty(256 * 2**20, dtype=torch.uint8, device=q.device))
    wrapper.plan(
        block_mask_map=inputs.keep[0],
        block_row_sz=sizes,
        block_col_sz=sizes,
        num_qo_heads=heads,
        num_kv_heads=heads,
        head_dim=q.shape[-1],
        sm_scale=inputs.scale,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return lambda: wrapper.run(q, k, v), lambda out: out.transpose(0, 1)[tiling.restore][None]


def vsa(inputs: Inputs) -> Prepared:
    """The Triton kernel of FastVideo's VSA: blocks of 64, so a tile of 128 is two with the same row of the mask."""
    _needs_gpu(inputs)
    if inputs.q.dtype != torch.bfloat16:
        raise Absent("takes bf16 only")
    kernel = _package("fastvideo_kernel.triton_kernels.block_sparse_attn_triton", "fastvideo-kernel")
    q, k, v = _in_tile_order(inputs)
    parts = inputs.tiling.block_size // 64
    first = torch.arange(parts, device=q.device) * 64
    sizes = (inputs.tiling.counts[:, None] - first).clamp(0, 64).flatten().to(torch.int32)
    keep = inputs.keep.repeat_interleave(parts, 2).repeat_interleave(parts, 3) & (sizes > 0)
    counts, indices = tile_lists(keep)
    forward = kernel.triton_block_sparse_attn_forward
    return lambda: forward(q, k, v, indices, counts, sizes)[0], _from_tile_order(inputs.tiling)


def flash4_sparse(inputs: Inputs) -> Prepared:
    """flash-attn-4 with lists of whole blocks."""
    _needs_gpu(inputs)
    interface = _package("flash_attn.cute.interface", "flash-attn-4")
    sparsity = _package("flash_attn.cute.block_sparsity", "flash-attn-4")
    if not inputs.is_even:
        raise Absent("whole blocks only; a tile of this grid has empty slots")
    q, k, v = (x.transpose(1, 2).contiguous() for x in _in_tile_order(inputs))
    counts, indices = tile_lists(inputs.keep)
    tensors = sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(inputs.tiling.block_size, inputs.tiling.block_size),
    )
    restore = _from_tile_order(inputs.tiling)

    def run() -> Tensor:
        return interface.flash_attn_func(q, k, v, softmax_scale=inputs.scale, block_sparse_tensors=tensors)[0]

    return run, lambda out: restore(out.transpose(1, 2))


def sparsevideo(inputs: Inputs) -> Prepared:
    """The kernel of sparsevideo's draft method (MIT's Block-Sparse-Attention), if its CUDA extension was built."""
    _needs_gpu(inputs)
    runtime = _package("sparsevideo.kernels.draft_block_sparse_runtime", "sparsevideo")
    try:
        attention = runtime.load_block_sparse_attn_func()
    except ImportError as error:
        raise Absent(" ".join(str(error).split())[:120]) from error
    if not inputs.is_even or inputs.tiling.block_size != 128:
        raise Absent("whole blocks of 128 only; a tile of this grid has empty slots")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in _in_tile_order(inputs))
    tokens, heads = q.shape[:2]
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    ones = torch.ones(heads, dtype=torch.int32, device=q.device)
    restore = _from_tile_order(inputs.tiling)

    def run() -> Tensor:
        return attention(q, k, v, ends, ends, ones, None, inputs.keep, tokens, tokens, 0.0, softmax_scale=inputs.scale)

    return run, lambda out: restore(out[None].transpose(1, 2))


def sol_attn(everything: bool) -> Prepare:
    """comfy-kitchen's Sol-Attn in 8 bits, under its own choice of as many blocks of 64, with its tail; or of all."""

    def prepare(inputs: Inputs) -> Prepared:
        _needs_gpu(inputs)  # on a CPU it has a reference alone
        kitchen = _package("comfy_kitchen", "comfy-kitchen")
        if inputs.q.shape[-1] != 128:
            raise Absent("takes head_dim 128 only")
        grid = inputs.tiling.grid
        tiling = tiling_for(grid, choose_tile(grid, 64), 64, device=inputs.q.device)
        q, k, v = (x.transpose(1, 2).contiguous() for x in _in_tile_order(inputs, tiling))
        kept = 1.0 if everything else float(inputs.keep.float().mean())
        # The ratio must be below 1. Otherwise a block is kept if its score is tau deviations above the mean: all are.
        choice = {"topk_ratio": kept} if kept < 1 else {"tau": -1e9}
        wanted = {**choice, "block_len": tiling.counts.int(), "scale": inputs.scale}
        restore = _from_tile_order(tiling)
        return lambda: kitchen.sol_attn(q, k, v, **wanted), lambda out: restore(out.transpose(1, 2))

    return prepare


DENSE: dict[str, Prepare] = {
    "SDPA flash": sdpa("FLASH_ATTENTION"),
    "SDPA cuDNN": sdpa("CUDNN_ATTENTION"),
    "flash-attn-3": flash3_dense,
    "flash-attn-4": flash4_dense,
    "sageattention": sage,
}
SPARSE: dict[str, Prepare] = {
    "FlexAttention": flex,
    "FlashInfer": flashinfer,
    "VSA (fastvideo-kernel)": vsa,
    "flash-attn-4 sparse": flash4_sparse,
    "sparsevideo draft": sparsevideo,
}
# Those that choose for themselves what they read: what is timed, and what is held against dense attention.
CHOOSING: dict[str, tuple[Prepare, Prepare]] = {
    "comfy-kitchen sol_attn": (sol_attn(everything=False), sol_attn(everything=True)),
}


def dense_rows(inputs: Inputs, rows: Tensor, heads: Tensor) -> Tensor:
    """Dense attention of single queries in fp32 from its definition: [rows, heads, head_dim]."""
    q, k, v = (x[0][:, heads].float().transpose(0, 1) for x in (inputs.q[:, rows], inputs.k, inputs.v))
    return ((q @ k.transpose(-1, -2) * inputs.scale).softmax(-1) @ v).transpose(0, 1)
