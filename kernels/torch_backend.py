"""The `torch` backend: gather the kept tiles of a few query tiles, then two batched products. No compiler needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.core.select import tile_lists
from draftdiff.kernels.problem import Problem

differentiable = True
reads_tokens = True
# Score elements held at once: on a CPU what fits a core's share of the last-level cache, else a small part of memory.
_CPU_SCORES, _SCORES = 1 << 19, 1 << 27


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def to_tiles(x: Tensor, slots: Tensor, absent: Tensor | None = None) -> Tensor:
    """[batch, tokens, heads, head_dim] in model order -> [batch, heads, tiles, block_size, head_dim].

    slots: [tiles, block_size], as a tiling has them.  absent: bool [batch or 1, tiles, block_size], slots that are 0
    whatever stands there; without it slots that hold no token repeat some token.
    """
    tiles = rearrange(x[:, slots.clamp(min=0)], "b t s h d -> b h t s d").contiguous()
    return tiles if absent is None else tiles.masked_fill_(absent[:, None, ..., None], 0)


def from_tiles(x: Tensor, tiling: Tiling) -> Tensor:
    """[batch, heads, tiles, block_size, head_dim] -> [batch, tokens, heads, head_dim] in model order."""
    position = torch.empty_like(tiling.order)
    filled = (tiling.slots >= 0).flatten().nonzero()[:, 0]
    position[tiling.slots.flatten()[filled]] = filled
    return rearrange(rearrange(x, "b h t s d -> b h (t s) d")[:, :, position], "b h n d -> b n h d").contiguous()


def run(problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, tiling = problem.q, problem.tiling
    batch, _, heads, _ = q.shape
    # Half-precision products are slow on CPUs, and their sums are not fp32 everywhere.
    compute = torch.float32 if _is_cpu(q.device) else q.dtype
    q_tiles = to_tiles(q, tiling.slots).to(compute) * problem.factor
    # One more tile, of nothing, stands where a row keeps fewer tiles than those beside it.
    slots = F.pad(tiling.slots, (0, 0, 0, 1), value=-1)
    absent = F.pad(~problem.readable.expand(batch, -1, -1), (0, 0, 0, 1), value=True)
    k_tiles, v_tiles = (to_tiles(x, slots, absent).to(compute) for x in (problem.k, problem.v))
    bias = torch.zeros(absent.shape, device=q.device).masked_fill_(absent, float("-inf"))
    has_holes = problem.text_mask is not None or tiling.tokens < tiling.slots.numel()
    log_counts = problem.log_counts
    tokens = problem.tokens
    if tokens is not None:  # text reads everything
        tokens = F.pad(tokens, (0, 0, 0, tiling.tiles - tiling.video_tiles), value=-1)
    single = 0 if tokens is None else tokens.shape[-1]
    counts, indices = tile_lists(problem.keep)
    lengths, nothing = counts.cpu(), problem.reads_nothing.cpu()
    wanted = torch.ones(tiling.tiles, dtype=torch.bool)
    if problem.queries is not None:
        wanted = torch.zeros_like(wanted).index_fill_(0, problem.queries.cpu(), True)
    most = (_CPU_SCORES if _is_cpu(q.device) else _SCORES) // tiling.block_size**2

    out, lse = [], []
    for b in range(batch):
        for h in range(heads):
            tiles = (q_tiles[b, h], k_tiles[b, h], v_tiles[b, h])
            pooled = singles = None
            if problem.tail is not None:
                weights = log_counts[None] if log_counts.dim() == 1 else log_counts[b, h]
                pooled = (problem.tail.k_mean[b, h], problem.tail.v_mean[b, h], weights)
            if tokens is not None:
                singles = (tokens[b, h], *(F.pad(x[b, :, h].to(compute), (0, 0, 0, 1)) for x in (problem.k, problem.v)))
            head = _Head(*tiles, problem.keep[b, h], bias[b], pooled, singles)
            out.append(torch.zeros_like(tiles[0]))
            lse.append(torch.full(tiles[0].shape[:-1], float("-inf"), device=q.device))
            longest_first = lengths[b, h].argsort(descending=True)
            longest_first = longest_first[(wanted & ~nothing[b, h])[longest_first]]
            start = 0
            while start < len(longest_first):
                width = int(lengths[b, h, longest_first[start]])
                rows = longest_first[start : start + max(1, most // max(1, width + single // tiling.block_size))]
                start += len(rows)
                uneven = int(lengths[b, h, rows[-1]]) < width
                rows = rows.to(q.device)
                kept = indices[b, h, rows, :width].long()
                if uneven:
                    beyond = torch.arange(width, device=q.device) >= counts[b, h, rows, None]
                    kept = kept.masked_fill(beyond, tiling.tiles)
                scores = head.scores(rows, kept, has_holes or uneven)
                out[-1].index_copy_(0, rows, head.output(rows, scores, kept))
                if want_lse:
                    lse[-1].index_copy_(0, rows, scores.logsumexp(-1))

    def in_order(x: list[Tensor]) -> Tensor:
        return from_tiles(torch.stack(x).unflatten(0, (batch, heads)), tiling)

    return in_order(out).to(q.dtype), in_order([x[..., None] for x in lse])[..., 0] if want_lse else None


@dataclass(frozen=True, eq=False)
class _Head:
    """A head of a problem in tiles: q, scaled, [tiles, block_size, head_dim], k and v with one tile more, 0 where
    nothing may be read, keep [tiles, tiles], bias [tiles + 1, block_size], -inf there.

    pooled: keys and values [video_tiles, head_dim], their log weights [tiles or 1, video_tiles].  singles: positions
    [tiles, any], -1 for none, and k and v [tokens + 1, head_dim] in the model's order, 0 at the end.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    bias: Tensor
    pooled: tuple[Tensor, Tensor, Tensor] | None
    singles: tuple[Tensor, Tensor, Tensor] | None

    def scores(self, rows: Tensor, kept: Tensor, biased: bool) -> Tensor:
        """Scores of query tiles, fp32 [rows, block_size, width * block_size, single tokens and pooled keys].

        kept [rows, width]: the key tiles of each.  biased: whether any of their slots may not be read.
        """
        parts = [torch.bmm(self.q[rows], self.k[kept].flatten(1, 2).transpose(1, 2)).float()]
        if biased:
            parts[0] += self.bias[kept].flatten(1)[:, None]
        if self.singles is not None:
            tokens, k, _ = self.singles
            single = torch.bmm(self.q[rows], k[tokens[rows]].transpose(1, 2)).float()
            parts.append(single.masked_fill((tokens[rows] < 0)[:, None], float("-inf")))
        if self.pooled is not None:
            k_mean, _, log_counts = self.pooled
            weight = log_counts[rows if len(log_counts) > 1 else [0]].masked_fill(
                self.keep[rows, : len(k_mean)], float("-inf")
            )
            tail = self.q[rows].float() @ k_mean.T
            parts.append(tail.masked_fill((weight == float("-inf"))[:, None], 0.0) + weight[:, None])
        return torch.cat(parts, dim=-1)

    def output(self, rows: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
        """Softmax over the scores, and the values it weighs, [rows, block_size, head_dim]."""
        weights = scores.softmax(-1)
        in_tiles, single = kept.shape[1] * self.v.shape[1], 0
        out = torch.bmm(weights[..., :in_tiles].to(self.v.dtype), self.v[kept].flatten(1, 2))
        if self.singles is not None:
            tokens, _, v = self.singles
            single = tokens.shape[1]
            out = out + torch.bmm(weights[..., in_tiles : in_tiles + single].to(v.dtype), v[tokens[rows]])
        if self.pooled is not None:
            out = out + (weights[..., in_tiles + single :] @ self.pooled[1]).to(out.dtype)
        return out
