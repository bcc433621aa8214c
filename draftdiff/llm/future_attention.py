"""What a cut cache is worth: how much of the attention that the target will really pay goes to the keys it keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.llm.checks import check_prompt
from draftdiff.llm.observe import AttentionCall, observing


@torch.no_grad()
def future_attention(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[Tensor, dict[int, Tensor]]:
    """The target's own greedy continuation of prompts without padding, on a full cache, and what it looks at.

    ids: int64 [batch, tokens].  Returns int64 [batch, new_tokens], and by layer the attention that the last prompt
    token and the continuation give to each key before them, fp32 [batch, key heads, tokens - 1], summed over queries
    and the heads that share a key head.
    """
    check_prompt(model, ids, None)
    prompt = ids.shape[1]
    mask = torch.ones_like(ids)
    full = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[])
    paid: dict[int, Tensor] = {}

    def watch(call: AttentionCall) -> None:
        paid[call.layer] = call.mass(call.query.shape[2] - prompt + 1)[..., : prompt - 1]

    with observing(model, watch):
        model(full[:, :-1], use_cache=False)
    return full[:, prompt:], paid


def kept_mass(paid: Mapping[int, Tensor], indices: Mapping[int, Tensor]) -> float:
    """Share of the attention `paid` that goes to the keys at `indices`, mean over the layers of indices and key heads.

    paid: see `future_attention`.  indices: by layer int64 [batch, key heads, kept], as in SpecKVInfo.
    """
    shares = [paid[layer].gather(-1, kept).sum(-1) / paid[layer].sum(-1) for layer, kept in indices.items()]
    return float(torch.stack(shares).mean())


def kept_recall(paid: Mapping[int, Tensor], indices: Mapping[int, Tensor]) -> float:
    """Share of the keys of most attention, as many as are kept, that are among the kept; mean as in `kept_mass`."""
    found = []
    for layer, kept in indices.items():
        best = paid[layer].topk(kept.shape[-1]).indices
        found.append((best[..., None] == kept[..., None, :]).any(-1).float().mean())
    return float(torch.stack(found).mean())
