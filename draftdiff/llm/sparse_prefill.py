"""Reading a prompt by vertical-slash attention: each query sees the keys just before it and a few columns of all.

The pattern is that of MInference (arXiv 2407.02490); SpecKV (arXiv 2506.08373) takes the columns from its own scores.
Block-sparse kernels know whole tiles only, so a head's columns are laid side by side behind the prompt as tiles of
their own. What needs a mask inside a tile, the diagonal and the one tile of columns that a query tile's band cuts, is
computed densely, and both parts are merged by their log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.errors import UserError
from draftdiff.kernels.block_sparse import block_sparse_attention_lse
from draftdiff.kernels.problem import Problem
from draftdiff.llm.observe import AttentionCall

TILE = 64


@dataclass(frozen=True)
class SparsePrefill:
    """columns: keys of each key head that all later queries read.  local: keys that a query reads before it, counted
    from the end of its tile of 64, in whole tiles.  backend: of draftdiff.kernels.

    Prompts of no more than columns + local tokens are read densely: there is nothing to skip.
    """

    columns: int = 2048
    local: int = 2048
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise UserError(f"columns must be at least 1, got {self.columns}")
        if self.local < TILE or self.local % TILE:
            raise UserError(f"local must be a positive multiple of {TILE}, got {self.local}")


def check_sparse(model: PreTrainedModel, attention_mask: Tensor) -> None:
    """Raise ValueError for a batch with padding and for models whose scores have a soft cap."""
    if not bool(attention_mask.all()):
        raise UserError("sparse_prefill takes prompts of one length, got an attention_mask with padding")
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None:
        raise UserError(f"sparse_prefill takes models without a soft cap of the scores, got {softcap}")


def sparse_attention(call: AttentionCall, order: Tensor, config: SparsePrefill) -> Tensor | None:
    """A layer's attention, [batch, queries, heads, head_dim], or None where all of it fits columns and local.

    order: the keys that may be columns, from most to least important, int64 [batch, key heads, keys].
    Raises ValueError for attention with sinks.
    """
    if call.sinks is not None:
        raise UserError(f"sparse_prefill takes models without attention sinks, {type(call.module).__name__} has them")
    if call.key.shape[2] <= config.columns + config.local:
        return None
    columns = order[..., : config.columns].sort(-1).values
    return vertical_slash_attention(
        call.query, call.key, call.value, columns, local=config.local, scale=call.scale, backend=config.backend
    )


def vertical_slash_attention(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor, *, local: int, scale: float, backend: str = "auto"
) -> Tensor:
    """Causal attention in which query i reads key j <= i if j is one of its head's columns or in its band, which starts
    local - 64 keys before the tile of 64 that i is in.

    query: [batch, heads, tokens, head_dim].  key, value: [batch, key heads, tokens, head_dim].  columns: int64 [batch,
    key heads, columns], ascending.  Returns [batch, tokens, heads, head_dim].
    """
    batch, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    tiles = -(-tokens // TILE)
    columns = columns.repeat_interleave(group, dim=1)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    at = columns[..., None].expand(-1, -1, -1, key.shape[-1])
    column_key, column_value = key.gather(2, at), value.gather(2, at)

    band = (torch.arange(tiles, device=query.device) * TILE - (local - TILE)).clamp(min=0)
    padded = F.pad(columns, (0, -columns.shape[-1] % TILE), value=tokens).unflatten(-1, (-1, TILE))
    last = columns[..., TILE - 1 :: TILE]
    if last.shape[-1] < padded.shape[2]:
        last = torch.cat([last, columns[..., -1:]], dim=-1)
    whole = last[:, :, None] < band[:, None]  # tiles of columns before a query tile's band
    cut = whole.sum(-1).clamp(max=padded.shape[2] - 1)  # the next one, of which some may be

    number = torch.arange(tiles, device=query.device)
    slash = (number[:, None] > number) & (number >= band[:, None] // TILE)
    keep = whole.new_zeros(batch, heads, tiles + padded.shape[2], tiles + padded.shape[2])
    keep[:, :, :tiles, :tiles] = slash
    keep[:, :, :tiles, tiles:] = whole
    tiling = tiling_for(LatentGrid(1, 1, tokens), (1, 1, TILE), TILE, text=columns.shape[-1], device=query.device)
    nothing = query.new_zeros(*column_key.shape[:3], query.shape[-1])
    joint = [
        torch.cat(pair, dim=2).transpose(1, 2) for pair in ((query, nothing), (key, column_key), (value, column_value))
    ]
    problem = Problem(*joint, keep=keep, tiling=tiling, scale=scale)
    out, lse = block_sparse_attention_lse(problem, backend=backend)
    result = query.new_empty(batch, tokens, heads, value.shape[-1])
    for row in range(batch):
        for head in range(heads):
            near, near_lse = _near(
                query[row, head],
                key[row, head],
                value[row, head],
                column_key[row, head],
                column_value[row, head],
                padded[row, head][cut[row, head]],
                cut[row, head],
                ~whole[row, head].all(-1),
                band,
                scale,
            )
            share = torch.sigmoid(near_lse - lse[row, :tokens, head])[:, None]
            result[row, :, head] = torch.lerp(out[row, :tokens, head].float(), near, share).to(result.dtype)
    return result


def _near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    column_key: Tensor,
    column_value: Tensor,
    where: Tensor,
    cut: Tensor,
    is_cut: Tensor,
    band: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One head's diagonal tiles and cut tiles of columns: fp32 out [tokens, head_dim] and log-sum-exp [tokens].

    where: positions of the cut tile's columns, int64 [query tiles, 64].  cut: its number [query tiles].  is_cut: False
    where there is none, bool [query tiles].
    """
    tokens = len(query)
    q, k, v = (F.pad(x, (0, 0, 0, -tokens % TILE)).unflatten(0, (-1, TILE)).float() for x in (query, key, value))
    more_k, more_v = (
        F.pad(x, (0, 0, 0, -len(x) % TILE)).unflatten(0, (-1, TILE)).float()[cut] for x in (column_key, column_value)
    )
    diagonal = torch.ones(TILE, TILE, dtype=torch.bool, device=q.device).tril()
    before = (where < band[:, None]) & is_cut[:, None]
    scores = torch.cat([q @ k.mT, q @ more_k.mT], dim=-1) * scale
    hidden = torch.cat([~diagonal.expand(len(q), -1, -1), ~before[:, None].expand(-1, TILE, -1)], dim=-1)
    scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp_()
    out = weights[..., :TILE] @ v + weights[..., TILE:] @ more_v
    return out.flatten(0, 1)[:tokens], lse.flatten()[:tokens]
