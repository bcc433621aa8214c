"""The `triton` backend: how the kernels of `triton_attention` are set up for a call, a GPU and a memory layout.

No permuted copy of the video's q, k, v or the output is made: tiles are read where the model left them, through tensor
descriptors on Hopper and later, by address elsewhere.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.kernels.problem import Problem
from draftdiff.kernels.sampled import attention_of, some_rows
from draftdiff.kernels.torch_backend import to_tiles
from draftdiff.kernels.triton_configs import Config, configs_for

try:
    import triton
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.tools.tensor_descriptor import TensorDescriptor

    from draftdiff.kernels import triton_attention, triton_int8
    from draftdiff.kernels.autotune import DoesNotCompile, fastest
    from draftdiff.kernels.triton_lists import TileLists, TileTables, list_tiles, on_device_of, tables_for
except ImportError:
    triton = None

differentiable = False
reads_tokens = True
_DESCRIPTORS = ("hopper", "blackwell")
_INT32 = 2**31  # elements that a box may span for "strided"
_WRONG = {"full": 0.04, "int8": 0.2}  # share of the largest value, well above what rounding does
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if triton is None:
        return "needs the package triton"
    if device.type != "cuda" and not _INTERPRETED:
        return f"needs a GPU (on {device.type} only with TRITON_INTERPRET=1)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {dtype}"
    if head_dim > 128:
        return f"takes head_dim up to 128, got {head_dim}"
    return None


@dataclass(frozen=True)
class Interleave:
    """Where a head lies for a descriptor [outer, frames, height, width, columns] over k or v.

    Heads side by side in a token: outer is the batch, columns are all heads.  Heads after one another: outer is batch
    and head.
    """

    outer: int
    outer_stride: int
    columns: int
    outer_batch: int
    outer_head: int
    inner_head: int


def interleave(x: Tensor) -> Interleave | None:
    """The layout of x [batch, tokens, heads, head_dim] as descriptors want it, None if they cannot read it."""
    batch, tokens, heads, dim = x.shape
    batch_stride, token, head, last = x.stride()
    # The stride of an axis of one means nothing and may be anything.
    batch_stride = batch_stride if batch > 1 else tokens * token
    head = head if heads > 1 else dim
    bytes_of = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s * bytes_of % 16 == 0 for s in (dim, token, head, batch_stride))
    if last != 1 or not aligned:
        return None
    if head == dim and token >= heads * dim:
        return Interleave(batch, batch_stride, heads * dim, 1, 0, dim)
    if batch == 1 or batch_stride == heads * head:
        return Interleave(batch * heads, head, dim, heads, 1, 0)
    return None


@lru_cache(maxsize=16)
def _architecture(device: torch.device) -> str:
    if _INTERPRETED:
        return "hopper"
    major = torch.cuda.get_device_capability(device)[0]
    if torch.version.hip or major < 9:
        return "strided"
    return {9: "hopper", 10: "blackwell"}.get(major, "strided")


def access_to(k: Tensor, v: Tensor, tiling: Tiling) -> str:
    """How keys and values are read: "hopper" and "blackwell" by descriptors, "strided" by address, "gather" slot by
    slot."""
    box = tables_for(tiling).box
    if box is None:
        return "gather"
    layout = interleave(k)
    if layout is not None and layout == interleave(v) and k.stride() == v.stride() and k.element_size() == 2:
        access = _architecture(k.device)
        if access != "strided":
            return access
    _, height, width = tiling.grid.shape
    span = ((box[0] - 1) * height + box[1] - 1) * width + box[2]
    return "strided" if span * max(k.stride(1), v.stride(1)) < _INT32 else "gather"


def run(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    call = Call.prepare(problem, want_lse)
    q, block_size = call.q, problem.tiling.block_size
    with on_device_of(q):
        if _INTERPRETED:
            return call.launch(call.configs[0])
        kind = (call.access, q.dtype, q.shape[-1], block_size, problem.tail is not None, call.singles)
        key = " ".join(map(str, (triton.__version__, *kind)))
        return call.launch(fastest(key, call.configs, call.launch, q.device, lambda found: is_right(problem, found[0])))


def is_right(problem: Problem, out: Tensor) -> bool:
    """Whether sampled rows are what attention is by its definition, but for rounding. The host reads the answer."""
    rows, heads = some_rows(problem)
    expected, found = attention_of(problem, rows, heads), out[0, rows][:, heads].float()
    allowed = _WRONG[problem.precision] * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(found, expected, rtol=0.0, atol=allowed + 1e-6, equal_nan=True)


@dataclass(frozen=True, eq=False)
class Call:
    """One problem, ready to be launched with any configuration.

    q, k, v: the problem's, head_dim contiguous.  key_slots int32 [batch or 1, tiles, block_size], -1 where none may be
    read.  rest: k and v of the tiles that are no boxes of the first grid [batch, heads, tiles, block_size, head_dim], 0
    where none may be read; only descriptors need it.  rest_bias fp32 [batch or 1, tiles, block_size].
    singles: whether there are single tokens.  pooled: means of k and v in their dtype.  packed: q, k and v where access
    is "int8", which reads video tiles from there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tiling: Tiling
    tables: TileTables
    access: str
    lists: TileLists
    key_slots: Tensor
    rest_bias: Tensor
    rest: tuple[Tensor, Tensor] | None
    singles: bool
    pooled: tuple[Tensor, Tensor] | None
    scale_log2: float
    want_lse: bool
    packed: triton_int8.Packed | None

    @classmethod
    def prepare(cls, problem: Problem, want_lse: bool) -> Call:
        """Everything that does not depend on the configuration."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
        tiling, tail = problem.tiling, problem.tail
        tables = tables_for(tiling)
        boxes = len(tables.corners)
        access = access_to(k, v, tiling) if problem.precision == "full" else "int8"
        numbers = torch.arange(tiling.tiles, dtype=torch.int32, device=q.device)
        entries = numbers
        if access not in ("gather", "int8"):
            first_of = tables.slots[:boxes, 0] if access == "strided" else tables.corners
            entries = torch.cat([first_of, numbers[boxes:]])
        key_slots = tables.slots[None]
        if problem.text_mask is not None:
            key_slots = tables.slots.where(problem.readable, -1)
        absent = key_slots[:, boxes:] < 0
        rest_bias = torch.zeros(absent.shape, dtype=torch.float32, device=q.device).masked_fill_(absent, float("-inf"))
        rest = None
        # Descriptors fetch whole tiles, and 0 times a NaN beside the text is NaN.
        if tiling.tiles > boxes and access in _DESCRIPTORS:
            rest = to_tiles(k, tables.slots[boxes:], absent), to_tiles(v, tables.slots[boxes:], absent)
        scale_log2 = problem.factor * math.log2(math.e)
        packed = None
        if access == "int8":
            mean_key = triton_int8.mean_key(k, tiling, tail and tail.k_mean)
            packed = triton_int8.pack(q, k, v, tiling, mean_key, scale_log2)
        return cls(
            q=q,
            k=k,
            v=v,
            tiling=tiling,
            tables=tables,
            access=access,
            lists=list_tiles(
                problem.keep,
                tiling,
                entries=entries,
                tail=tail is not None,
                tokens=problem.tokens,
                taken=problem.taken,
                queries=problem.queries,
            ),
            key_slots=key_slots,
            rest_bias=rest_bias,
            rest=rest,
            singles=problem.tokens is not None and problem.tokens.shape[-1] > 0,
            pooled=tail and (tail.k_mean.to(k.dtype).contiguous(), tail.v_mean.to(v.dtype).contiguous()),
            scale_log2=scale_log2,
            want_lse=want_lse,
            packed=packed,
        )

    @property
    def configs(self) -> list[Config]:
        """The configurations worth trying."""
        return configs_for(self.access, self.q.dtype, self.q.shape[-1], self.tiling.block_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes that both kernels take: heads, tokens, tiles, those of the video, boxes, tiles with queries."""
        tiling, boxes, queries = self.tiling, len(self.tables.corners), self.lists.order.shape[1]
        return self.q.shape[2], tiling.tokens, tiling.tiles, tiling.video_tiles, boxes, queries

    def launch(self, config: Config) -> tuple[Tensor, Tensor | None]:
        """Run it. Raises DoesNotCompile if the GPU or the compiler cannot take the configuration."""
        q = self.q
        batch, tokens, heads, head_dim = q.shape
        out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.device) if self.want_lse else None
        try:
            if self.packed is None:
                self._forward(config, out, lse)
            else:
                self._forward_int8(self.packed, config, out, lse)
        except (OutOfResources, PTXASError, CompilationError) as error:
            raise DoesNotCompile(str(error)) from error
        except RuntimeError as error:
            if not str(error).startswith("PassManager::run failed"):  # the words of Triton 3.4 to 3.9
                raise
            raise DoesNotCompile(str(error)) from error
        return out, lse

    def _descriptors(self, part: tuple[int, int, int], keys: int, padded: int) -> list[Any]:
        """k and v as boxes of video, their other tiles and their pooled tiles, for `forward`."""
        layout = interleave(self.k)
        assert layout is not None
        grid, lead = self.tiling.grid, self.tiling.lead
        row, frame = grid.width, grid.height * grid.width
        operands = []
        for x in (self.k, self.v):
            token = x.stride(1)
            shape = [layout.outer, *grid.shape, layout.columns]
            strides = [layout.outer_stride, frame * token, row * token, token, 1]
            operands.append(TensorDescriptor(x[:, lead:], shape, strides, [1, *part, padded]))
        for pair, rows in ((self.rest, keys), (self.pooled, min(keys, triton_attention.TAIL_KEYS.value))):
            # What a call does without, the kernel does not touch.
            tiles = [x.flatten(0, 1).flatten(1, -2) for x in pair or ()]
            described = [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, padded]) for x in tiles]
            operands += described or operands[:2]
        return operands

    def _switches(self, config: Config) -> dict[str, Any]:
        """What the kernels for all kinds of tiles are compiled for."""
        tiling = self.tiling
        return {
            "KEYS": config.keys,
            "TILE": tiling.block_size,
            "D": self.q.shape[-1],
            "PARTIAL": tiling.tokens < tiling.video_tiles * tiling.block_size or tiling.text > 0,
            "SINGLES": self.singles,
            "TAIL": self.pooled is not None,
            "LSE": self.want_lse,
            "WIDEN": _widened(self.q.dtype),
            "MASKED_STAGES": config.masked_stages or config.stages,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": True,  # Triton 3.10 leaves it out where nothing is said
        }

    def _forward(self, config: Config, out: Tensor, lse: Tensor | None) -> None:
        q, k, v, tables, lists = self.q, self.k, self.v, self.tables, self.lists
        head_dim, block_size = q.shape[-1], self.tiling.block_size
        padded = max(16, triton.next_power_of_2(head_dim))
        box = tables.box or (1, 1, block_size)
        part = split(box, config.keys)
        layout = interleave(k)
        described = self.access in _DESCRIPTORS
        operands = self._descriptors(part, config.keys, padded) if described else [k, v, k, v, *(self.pooled or (k, v))]
        of_tables = tuple(x.stride(0) if len(x) > 1 else 0 for x in (self.key_slots, self.rest_bias))
        options = {"maxnreg": config.registers} if config.registers and not _INTERPRETED else {}
        triton_attention.forward[(lists.order.numel(),)](
            q,
            *operands,
            out,
            lse if lse is not None else tables.tokens,
            tables=(tables.slots, self.key_slots, self.rest_bias, lists.tail_bias),
            lists=(lists.order, lists.counts, lists.lists),
            singles=(lists.singles, lists.singles.shape[1], k, v),
            scale_log2=self.scale_log2,
            shape=self.shape,
            video=self.tiling.grid.shape,
            strides=(*(x.stride()[:3] for x in (q, k, v)), of_tables),
            layout=(layout.outer_batch, layout.outer_head, layout.inner_head) if layout else (0, 0, 0),
            D_PAD=padded,
            BOX=box,
            PART=part,
            ACCESS="descriptors" if described else self.access,
            REST=self.rest is not None,
            ALIKE=k.stride(1) == v.stride(1),
            **self._switches(config),
            **options,
        )

    def _forward_int8(self, packed: triton_int8.Packed, config: Config, out: Tensor, lse: Tensor | None) -> None:
        q, k, v, tables, lists = self.q, self.k, self.v, self.tables, self.lists
        triton_int8.forward[(lists.order.numel(),)](
            q,
            k,
            v,
            *(self.pooled or (k, v)),
            out,
            lse if lse is not None else tables.tokens,
            packed=packed.pointers,
            tables=(tables.slots, self.key_slots, lists.tail_bias),
            lists=(lists.order, lists.counts, lists.lists),
            singles=(lists.singles, lists.singles.shape[1]),
            scale_log2=self.scale_log2,
            shape=self.shape,
            strides=(*(x.stride()[:3] for x in (q, k, v)), self.key_slots.stride(0) if len(self.key_slots) > 1 else 0),
            D_PAD=packed.q.shape[-1],
            **self._switches(config),
        )


def _widened(dtype: torch.dtype) -> bool:
    """Whether products are made in fp32: the interpreter would multiply the bit patterns of bf16."""
    return _INTERPRETED and dtype == torch.bfloat16


def split(box: tuple[int, int, int], keys: int) -> tuple[int, int, int]:
    """The part of a box that holds `keys` tokens in raster order: halves along the slowest axis that can be halved."""
    part = list(box)
    while math.prod(part) > keys:
        axis = next(i for i in range(3) if part[i] > 1)
        part[axis] //= 2
    return part[0], part[1], part[2]
