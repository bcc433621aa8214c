"""One call of block-sparse attention: what is attended to, what is kept, and the checks that the parts fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.core.draft import Tail, softmax_scale
from draftdiff.core.grid import Tiling
from draftdiff.errors import UserError

PRECISIONS = ("full", "int8")


@dataclass(frozen=True, eq=False)
class Problem:
    """Attention over the kept tiles, exact, and over the skipped ones through the tail.

    q, k, v: [batch, tokens, heads, head_dim] of one floating dtype, in the model's order.
    keep: bool [batch, heads, tiles, tiles], which key tiles each query tile reads, text tiles last.
    text_mask: bool [batch, text], False for padding, which none reads, whatever stands in it.
    tail: pooled keys and values of the video tiles, or None to drop what is skipped.
    tokens: int32 [batch, heads, video_tiles, any], positions of single keys of the video that a query tile reads though
        it skips their tiles, each once, -1 for none; their tiles' means stand for the others alone.
    taken: uint8 [batch, heads, video_tiles, video_tiles], how many of a tile's tokens are among them, by query tile;
        counted where it is None. With it -1 stands behind all others, and `any` is a multiple of 128.
    queries: int64 [any], the tiles whose queries are asked for, ascending, all if None; the output of the others is
    undefined.
    scale: of the scores, 1/sqrt(head_dim) if None.
    precision: of the products over video tiles, "full" as q, k and v have it; "int8" makes q and k
        8-bit numbers first, and what is infinite in them then counts as NaN.
    A row that may read nothing gives 0. Another whose q is NaN, or that reads a NaN of k or v in a kept tile or through
    a mean, gives NaN where dense attention does (v: in that feature), and no other row does. Scores of -inf have no
    weight, +inf gives NaN, an infinite v gives infinity or NaN.
    Raises ValueError for parts that do not fit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    tiling: Tiling
    text_mask: Tensor | None = None
    tail: Tail | None = None
    scale: float | None = None
    tokens: Tensor | None = None
    taken: Tensor | None = None
    precision: str = "full"
    queries: Tensor | None = None

    def __post_init__(self) -> None:
        q, tiling = self.q, self.tiling
        check_tensors(q, self.k, self.v)
        if q.shape != self.k.shape:
            raise UserError(f"q, k and v must have one shape, got {tuple(q.shape)} and {tuple(self.k.shape)}")
        softmax_scale(self.scale, q.shape[-1])
        batch, tokens, heads, head_dim = q.shape
        if tokens != tiling.tokens:
            raise UserError(
                f"q has {tokens} tokens, the grid {tiling.grid} with {tiling.text} text tokens has {tiling.tokens}"
            )
        _check("keep", self.keep, (batch, heads, tiling.tiles, tiling.tiles), torch.bool)
        if self.text_mask is not None:
            check_mask(self.text_mask, q)
            _check("text_mask", self.text_mask, (batch, tiling.text), torch.bool)
        if self.tail is not None:
            for name in ("k_mean", "v_mean"):
                pooled = (batch, heads, tiling.video_tiles, head_dim)
                _check(f"tail.{name}", getattr(self.tail, name), pooled, torch.float32)
        if self.tokens is not None:
            _check("tokens", self.tokens, (batch, heads, tiling.video_tiles, *self.tokens.shape[3:4]), torch.int32)
            if self.taken is not None:
                _check("taken", self.taken, (batch, heads, tiling.video_tiles, tiling.video_tiles), torch.uint8)

    @property
    def factor(self) -> float:
        """What the scores are multiplied by."""
        return softmax_scale(self.scale, self.q.shape[-1])

    @property
    def tile_of(self) -> Tensor:
        """The tile of each token, int64 [tokens]."""
        tiling = self.tiling
        return torch.arange(tiling.tiles, device=tiling.device).repeat_interleave(
            tiling.counts, output_size=tiling.tokens
        )[tiling.restore]

    @property
    def readable(self) -> Tensor:
        """Slots with a token that may be read as a key, bool [batch, tiles, block_size], batch 1 without text_mask."""
        return self.tiling.readable(self.text_mask)

    @property
    def log_counts(self) -> Tensor:
        """Natural logarithm of the tokens of each video tile that its mean stands for, fp32 [video_tiles]; where single
        tokens are read [batch, heads, tiles, video_tiles], by query tile, -inf where none is left."""
        counts = self.tiling.counts[: self.tiling.video_tiles]
        if self.tokens is None:
            return counts.log()
        if self.taken is not None:
            taken = self.taken
        else:
            taken = torch.zeros(*self.tokens.shape[:3], len(counts) + 1, device=counts.device)
            tile_of = F.pad(self.tile_of, (0, 1), value=len(counts))  # where -1 leads
            taken.scatter_add_(-1, tile_of[self.tokens], torch.ones_like(self.tokens, dtype=taken.dtype))
            taken = taken[..., :-1]
        return (counts - F.pad(taken, (0, 0, 0, self.tiling.tiles - len(counts)))).log()  # of text none

    @property
    def reads_nothing(self) -> Tensor:
        """Query tiles that have no key at all, bool [batch, heads, tiles]: output 0, log-sum-exp -inf."""
        read = self.keep & self.readable.any(-1)[:, None, None]
        if self.tokens is not None and self.tokens.shape[-1]:
            singles = (self.tokens >= 0).any(-1)
            read[:, :, : singles.shape[-1], 0] |= singles
        if self.tail is not None:  # a skipped video tile is read through its mean
            video = self.tiling.video_tiles
            read[..., :video] |= ~self.keep[..., :video]
        return ~read.any(-1)


def check_mask(text_mask: Any, q: Tensor) -> None:
    """Raise ValueError unless it is a tensor of bool where q is."""
    if not isinstance(text_mask, Tensor) or text_mask.dtype != torch.bool:
        found = text_mask.dtype if isinstance(text_mask, Tensor) else type(text_mask).__name__
        raise UserError(f"text_mask must be torch.bool, True for tokens and False for padding, got {found}")
    if text_mask.device != q.device:
        raise UserError(f"text_mask must be on {q.device} as q is, got {text_mask.device}")


def check_tensors(q: Any, k: Any, v: Any) -> None:
    """Raise ValueError unless q, k and v are [batch, tokens, heads, head_dim] of one floating dtype on one device,
    alike but for the tokens of q and its heads, which may be several for each of k, and none of them empty."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise UserError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or 0 in x.shape:
            raise UserError(f"{name} must be [batch, tokens, heads, head_dim], none of them 0, got {tuple(x.shape)}")
    if len({x.dtype for x in named.values()}) > 1 or not q.is_floating_point():
        found = ", ".join(str(x.dtype) for x in named.values())
        raise UserError(f"q, k and v must have one floating dtype, got {found}")
    if len({x.device for x in named.values()}) > 1:
        raise UserError(f"q, k and v must be on one device, got {', '.join(str(x.device) for x in named.values())}")
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in named.values())
        raise UserError(f"q, k and v must have the same batch and head_dim, and heads that fit, got {shapes}")


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.shape != shape:
        raise UserError(f"{name} must be {dtype} {shape}, got {x.dtype} {tuple(x.shape)}")
