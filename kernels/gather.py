"""The `torch` backend: gather the kept tiles of a few query tiles, then two batched products. No compiler needed."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.core.select import BlockMask

# Score elements held at once: what fits the last-level cache share of a core, or a small part of a GPU's memory.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 27}


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def to_tiles(x: Tensor, tiling: Tiling) -> Tensor:
    """[batch, tokens, heads, head_dim] in model order -> [batch, heads, tiles, block_size, head_dim]. Slots without a
    token repeat some token and must be masked."""
    return rearrange(x[:, tiling.slots.clamp(min=0)], "b t s h d -> b h t s d").contiguous()


def slot_bias(tiling: Tiling, text_mask: Tensor | None, batch: int) -> Tensor | None:
    """0 for slots that may be read, -inf for others, fp32 [batch, tiles, block_size]; None if all may."""
    if text_mask is None and tiling.tokens == tiling.slots.numel():
        return None
    hidden = ~tiling.readable(text_mask).expand(batch, -1, -1)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


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
    batch, _, heads, _ = q.shape
    block, tiles = tiling.block_size, tiling.tiles
    # Half-precision products are slow on CPUs, and their sums are not fp32 everywhere.
    compute = torch.float32 if q.device.type == "cpu" else q.dtype
    q_tiles, k_tiles, v_tiles = (to_tiles(x, tiling).to(compute) for x in (q, k, v))
    q_tiles = q_tiles * scale
    bias = slot_bias(tiling, text_mask, batch)
    counts, indices = mask.lists()
    host_counts = counts.cpu()

    out = torch.empty_like(q_tiles)
    lse = torch.empty(q_tiles.shape[:-1], dtype=torch.float32, device=q.device) if want_lse else None
    log_counts = tiling.counts[: tiling.video_tiles].log()
    for b in range(batch):
        for h in range(heads):
            longest_first = host_counts[b, h].argsort(descending=True)
            start = 0
            while start < tiles:
                width = int(host_counts[b, h, longest_first[start]])
                chunk = max(1, _CHUNK[q.device.type] // max(1, block * block * width))
                rows = longest_first[start : start + chunk].to(q.device)
                start += chunk
                kept = indices[b, h, rows, :width].long()
                scores = torch.bmm(q_tiles[b, h, rows], k_tiles[b, h][kept].flatten(1, 2).transpose(1, 2)).float()
                uneven = int(host_counts[b, h, longest_first[min(start, tiles) - 1]]) < width
                if bias is not None or uneven:
                    hidden = torch.arange(width, device=q.device) >= counts[b, h, rows, None]
                    row_bias = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
                    row_bias = row_bias[..., None] + (bias[b, kept] if bias is not None else scores.new_zeros(block))
                    scores += row_bias.flatten(1)[:, None]
                values = v_tiles[b, h][kept].flatten(1, 2)
                if tail is not None:
                    pooled = q_tiles[b, h, rows].float() @ tail.k_mean[b, h].T + log_counts
                    skipped = mask.keep[b, h, rows, : tiling.video_tiles]
                    scores = torch.cat([scores, pooled.masked_fill_(skipped[:, None], float("-inf"))], dim=-1)
                weights = scores.softmax(-1)
                if lse is not None:
                    lse[b, h, rows] = scores.logsumexp(-1)
                reached = width * block
                result = torch.bmm(weights[..., :reached].to(compute), values)
                if tail is not None:
                    result += (weights[..., reached:] @ tail.v_mean[b, h]).to(compute)
                out[b, h, rows] = result
    if bool((host_counts == 0).any()) and tail is None:
        out.nan_to_num_(0.0)
    return from_tiles(out, tiling).to(q.dtype), None if lse is None else from_tiles(lse[..., None], tiling)[..., 0]


def from_tiles(x: Tensor, tiling: Tiling) -> Tensor:
    """[batch, heads, tiles, block_size, head_dim] -> [batch, tokens, heads, head_dim] in model order."""
    position = torch.empty_like(tiling.order)
    filled = (tiling.slots >= 0).flatten().nonzero()[:, 0]
    position[tiling.slots.flatten()[filled]] = filled
    return rearrange(rearrange(x, "b h t s d -> b h (t s) d")[:, :, position], "b h n d -> b n h d").contiguous()
