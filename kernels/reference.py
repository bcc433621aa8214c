"""The truth that every other backend is held against: one dense masked softmax in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from draftdiff.core.draft import Tail
from draftdiff.core.grid import Tiling
from draftdiff.core.select import BlockMask


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


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
    q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
    tile_of = torch.empty_like(tiling.order)
    tile_of[tiling.order] = torch.repeat_interleave(torch.arange(tiling.tiles, device=q.device), tiling.counts)

    scores = q32 @ k32.transpose(-1, -2) * scale
    hidden = ~mask.keep[:, :, tile_of][..., tile_of]
    if text_mask is not None:
        absent = torch.zeros(q.shape[0], tiling.tokens, dtype=torch.bool, device=q.device)
        absent[:, tiling.order[tiling.grid.tokens :]] = ~text_mask
        hidden = hidden | absent[:, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    values = v32
    if tail is not None:
        counts = tiling.counts[: tiling.video_tiles]
        pooled = q32 @ tail.k_mean.transpose(-1, -2) * scale + counts.log()
        kept = mask.keep[:, :, tile_of, : tiling.video_tiles]
        scores = torch.cat([scores, pooled.masked_fill(kept, float("-inf"))], dim=-1)
        values = torch.cat([v32, tail.v_mean], dim=2)
    # A row without any key gives 0, as a kernel's empty loop does.
    out = scores.softmax(-1).nan_to_num(0.0) @ values
    return out.transpose(1, 2).to(q.dtype).contiguous(), scores.logsumexp(-1).transpose(1, 2) if want_lse else None
