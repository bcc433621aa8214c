"""SpecKV-PC: shorten the prompt by SpecPC, then evict from its cache by SpecKV, with one draft run for both
(arXiv 2506.08373, section 5)."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.llm.checks import require, vocabulary_size
from draftdiff.llm.kept_cache import KeptCache
from draftdiff.llm.pair import lookahead
from draftdiff.llm.spec_kv import SpecKVConfig, SpecKVInfo, check_eviction, evicting_prefill
from draftdiff.llm.spec_pc import SpecPCConfig, observed

COMPRESS = SpecPCConfig(capacity=2048, lookahead=8)


def speckv_pc(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    ids: Tensor,
    evict: SpecKVConfig | None = None,
    compress: SpecPCConfig | None = None,
    *,
    return_indices: bool = False,
) -> tuple[Tensor, KeptCache, SpecKVInfo]:
    """A shorter prompt int64 [1, kept], its evicted cache, and what was done:

        short, cache, info = speckv_pc(model, draft, ids)
        model.generate(short, past_key_values=cache)

    Positions are those of the shorter prompt, so a prompt beyond the target's context may fit.
    ids: int64 [1, tokens].  evict: its lookahead must be None: compress.lookahead tokens serve both.
    compress: SpecPC to 2048 tokens with a lookahead of 8 if None.
    Raises ValueError for more than one prompt, and as speckv and specpc do.
    """
    evict, compress = evict or SpecKVConfig(), compress or COMPRESS
    require(
        evict.lookahead is None,
        f"the lookahead of evict must be None, as that of compress serves both, got {evict.lookahead}",
    )
    require(
        evict.capacity <= compress.capacity,
        f"the capacity of evict must be at most that of compress, {compress.capacity}, got {evict.capacity}",
    )
    mask = check_eviction(model, draft, ids, None)
    require(len(ids) == 1, f"speckv_pc takes one prompt at a time, got {len(ids)}")
    started = time.perf_counter()
    size = vocabulary_size(model)
    if ids.shape[1] > compress.capacity:
        (keep,), ahead, valid = observed(draft, ids, mask, compress, size)
    else:
        keep = torch.arange(ids.shape[1], device=ids.device)
        ahead, valid = lookahead(draft, ids, mask, compress.lookahead, size)
    short = ids[:, keep]
    cache, info = evicting_prefill(
        model, short, mask[:, keep], ahead, valid, evict, draft_started=started, return_indices=return_indices
    )
    info.prompt_indices = keep
    return short, cache, info
