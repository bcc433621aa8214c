"""SpecKV: evict a prompt's keys and values by what a draft's continuation will read (arXiv 2506.08373, section 4).

The draft continues the prompt; the target reads prompt and continuation once; in each layer the prompt's last tokens
and the continuation vote, head by head, for the keys that stay. Lossy; what is generated comes from the target alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.core.importance import POOLINGS, importance_order, smooth
from draftdiff.hosts.transformers import cache_argument, last_logits_only
from draftdiff.llm.checks import (
    check_decoding,
    check_length,
    check_prompt,
    check_vocabularies,
    require,
    vocabulary_size,
)
from draftdiff.llm.kept_cache import KeptCache, KeptLayer, end_sliding_layer
from draftdiff.llm.observe import AttentionCall, observing
from draftdiff.llm.pair import lookahead, positions
from draftdiff.llm.sparse_prefill import SparsePrefill, check_sparse, sparse_attention

REDUCES = ("max", "mean")
DEFAULT_LOOKAHEAD = 32


@dataclass(frozen=True)
class SpecKVConfig:
    """What to keep, and who votes.

    capacity: tokens that each key head of each layer keeps.  window: the last of them before the prompt's final token,
    kept in any case, whose queries vote.  lookahead: tokens that the draft continues with; None takes max_new_tokens of
    the call or else 32, and 0 needs no draft: the window votes alone, as in SnapKV (arXiv 2404.14469).
    pool, kernel: how a key's importance spreads over its neighbours.  reduce: over the votes of a key head's queries.
    sparse_prefill: read the prompt by block-sparse attention; None reads it densely.
    """

    capacity: int = 256
    window: int = 32
    lookahead: int | None = None
    pool: str = "max"
    kernel: int = 7
    reduce: str = "max"
    sparse_prefill: SparsePrefill | None = None

    def __post_init__(self) -> None:
        require(self.window >= 1, f"window must be at least 1, got {self.window}")
        require(
            self.capacity >= self.window, f"capacity must be at least the window of {self.window}, got {self.capacity}"
        )
        require((self.lookahead or 0) >= 0, f"lookahead must be at least 0, got {self.lookahead}")
        require(self.kernel >= 1 and self.kernel % 2 == 1, f"kernel must be odd and positive, got {self.kernel}")
        for name, value, allowed in (("pool", self.pool, POOLINGS), ("reduce", self.reduce, REDUCES)):
            require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass
class SpecKVInfo:
    """What was kept. Lengths in tokens, of layers with full attention; bytes of all keys and values.

    logical: what the cache stands for, the prompt but its last token.  physical: what it holds.  layers: that evict.
    full_bytes: of the cache without eviction, sliding layers at their window.  kept_bytes: of the cache as it is.
    peak_bytes: most that was held while the prompt was read, the layer being cut both before and after.
    lookahead: the draft's tokens, int64 [batch, tokens].  draft_seconds, prefill_seconds: time of the two models.
    indices: positions that each layer keeps, int64 [batch, key heads, physical], where they were asked for.
    prompt_indices: what speckv_pc left of the prompt, int64 [tokens], to which the lengths and indices then refer.
    """

    capacity: int
    logical: int
    physical: int
    layers: int
    full_bytes: int
    kept_bytes: int
    peak_bytes: int
    lookahead: Tensor
    draft_seconds: float = 0.0
    prefill_seconds: float = 0.0
    indices: dict[int, Tensor] = field(default_factory=dict, repr=False)
    prompt_indices: Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, tensors as lists."""
        plain = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return plain | {"indices": {str(layer): kept.tolist() for layer, kept in self.indices.items()}}


class _Eviction:
    """The observer: cuts each layer down right after its keys came in, so that one full layer is held at a time."""

    def __init__(
        self, cache: KeptCache, config: SpecKVConfig, attention_mask: Tensor, prompt: int, return_indices: bool
    ) -> None:
        self.cache = cache
        self.config = config
        self.attention_mask = attention_mask  # of prompt and lookahead, int64 [batch, tokens]
        self.held = prompt - 1  # the last prompt token's keys are left to whoever decodes
        self.indices: dict[int, Tensor] | None = {} if return_indices else None
        self.peak_bytes = self.full_bytes = 0
        self.seen: set[int] = set()

    def __call__(self, call: AttentionCall) -> Tensor | None:
        layer = self.cache.layers[call.layer]
        require(
            call.layer not in self.seen,
            f"each layer must attend once, layer {call.layer} of {type(call.module).__name__} does several times",
        )
        self.seen.add(call.layer)
        require(
            layer.keys.shape[1] == call.key.shape[1],
            f"layers must hold the keys that they attend to, layer {call.layer} holds {layer.keys.shape[1]} heads "
            f"and attends to {call.key.shape[1]} (compressed keys, as of multi-head latent attention)",
        )
        incoming = self.cache.nbytes
        if isinstance(layer, KeptLayer):
            kept, out = self._choose(call)
            layer.keep(kept, self.held)
            self.full_bytes += _bytes(call.key, call.value) * self.held // call.key.shape[2]
        else:
            end_sliding_layer(layer, call.key, call.value, self.held)
            kept, out = None, None
            self.full_bytes += _bytes(layer.keys, layer.values)
        if self.indices is not None and kept is not None:
            self.indices[call.layer] = kept
        self.peak_bytes = max(self.peak_bytes, incoming + _bytes(layer.keys, layer.values))
        return out

    def _choose(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        config = self.config
        if self.held <= config.capacity:
            return torch.arange(self.held, device=call.key.device).expand(*call.key.shape[:2], -1), None
        order = self._order(call)
        best = order[..., : config.capacity - config.window].sort(-1).values
        window = torch.arange(order.shape[-1], self.held, device=best.device).expand(*best.shape[:2], -1)
        out = None if config.sparse_prefill is None else sparse_attention(call, order, config.sparse_prefill)
        return torch.cat([best, window], dim=-1), out

    def _order(self, call: AttentionCall) -> Tensor:
        """The keys before the window from most to least important, int64 [batch, key heads, keys], padding last."""
        candidates = self.held - self.config.window
        rows = self.attention_mask.shape[1] - candidates
        tokens = self.attention_mask.to(call.key.device)
        mass = call.mass(rows, weights=tokens[:, -rows:], reduce=self.config.reduce)[..., :candidates]
        padding = tokens[:, None, :candidates] == 0
        scores = smooth(mass, self.config.kernel, self.config.pool)
        return importance_order(scores.masked_fill(padding, -torch.inf), mass)


def speckv(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    ids: Tensor,
    config: SpecKVConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    return_indices: bool = False,
) -> tuple[KeptCache, SpecKVInfo]:
    """The target's cache of a prompt, cut down to what the draft's continuation reads; see SpecKVConfig.

    The cache stops before the last prompt token, so that the host goes on from there by itself:

        cache, info = speckv(model, draft, ids, SpecKVConfig(capacity=512), max_new_tokens=100)
        model.generate(ids, past_key_values=cache, max_new_tokens=100)

    (From transformers 5.24 on the argument is called `cache`.) A cache is used up by generating: take
    copy.deepcopy(cache) to go on from it twice. Layers that slide over a window keep the host's cache and are not
    evicted. Speculation goes on from such a cache as well, see draftdiff.llm.speculative.
    ids: int64 [batch, tokens].  attention_mask: of its shape, 0 for padding on the left; padding is never kept in place
    of a token.  draft: may be None where there is no lookahead.  return_indices: keep the chosen positions in the info.
    Raises ValueError for models of different vocabularies or devices, an empty prompt, ids out of the vocabulary,
    padding on the right, and layers that cannot be evicted from.
    """
    config = config or SpecKVConfig()
    mask = check_eviction(model, draft, ids, attention_mask)
    wanted = config.lookahead if config.lookahead is not None else max_new_tokens or DEFAULT_LOOKAHEAD
    require(
        draft is not None or not wanted,
        f"a lookahead of {wanted} tokens needs a draft model, got None; lookahead=0 does without",
    )
    started = time.perf_counter()
    if draft is not None and wanted and ids.shape[1] - 1 > config.capacity:
        ahead, valid = lookahead(draft, ids, mask, wanted, vocabulary_size(model))
    else:
        ahead = valid = ids[:, :0]
    return evicting_prefill(
        model, ids, mask, ahead, valid, config, draft_started=started, return_indices=return_indices
    )


def check_eviction(
    model: PreTrainedModel, draft: PreTrainedModel | None, ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """The attention mask, int64 like ids. Raises ValueError, before any work, for what speckv cannot take."""
    mask = check_prompt(model, ids, attention_mask)
    check_decoding(model)
    KeptCache(model.config)  # raises for layers that cannot be evicted from
    if draft is not None:
        check_vocabularies(model, draft)
        check_prompt(draft, ids, mask)
    return mask


@torch.no_grad()
def evicting_prefill(
    model: PreTrainedModel,
    ids: Tensor,
    attention_mask: Tensor,
    ahead: Tensor,
    valid: Tensor,
    config: SpecKVConfig,
    *,
    draft_started: float,
    return_indices: bool = False,
) -> tuple[KeptCache, SpecKVInfo]:
    """What speckv does once it has the draft's continuation `ahead` [batch, tokens], of which `valid` ones vote.

    draft_started: when the draft began, by time.perf_counter.
    """
    wait_for(model)
    drafted = time.perf_counter()
    cache = KeptCache(model.config)
    prompt = ids.shape[1]
    check_length(model, prompt + ahead.shape[1])
    if config.sparse_prefill is not None:
        check_sparse(model, attention_mask)
    full_mask = torch.cat([attention_mask, valid], dim=1)
    eviction = _Eviction(cache, config, full_mask, prompt, return_indices)
    if prompt > 1:
        with observing(model, eviction):
            # What follows an end of sequence is read, for shape, but has no vote.
            model(
                torch.cat([ids, ahead], dim=1),
                attention_mask=None if bool(attention_mask.all()) else _extended(attention_mask, ahead),
                position_ids=positions(_extended(attention_mask, ahead)),
                use_cache=True,
                **last_logits_only(model),
                **{cache_argument(model): cache},
            )
    wait_for(model)
    kept = next(iter(cache.kept_layers.values()))
    info = SpecKVInfo(
        capacity=config.capacity,
        logical=prompt - 1,
        physical=kept.physical_length,
        layers=len(cache.kept_layers),
        full_bytes=eviction.full_bytes,
        kept_bytes=cache.nbytes,
        peak_bytes=eviction.peak_bytes,
        lookahead=ahead,
        draft_seconds=drafted - draft_started,
        prefill_seconds=time.perf_counter() - drafted,
        indices=eviction.indices or {},
    )
    return cache, info


def _extended(attention_mask: Tensor, ahead: Tensor) -> Tensor:
    return torch.cat([attention_mask, torch.ones_like(ahead)], dim=1)


def wait_for(model: PreTrainedModel) -> None:
    """Return when the model's device has done its work."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
