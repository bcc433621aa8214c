"""Which models and caches can take drafts back, and which of them only chains."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from draftdiff.errors import UserError
from draftdiff.hosts.transformers import borrows_keys, is_recurrent, takes_positions
from draftdiff.hosts.transformers_quirks import BY_PLACE, quirks_of_model
from draftdiff.llm.checks import require
from draftdiff.llm.kept_cache import KeptLayer, WindowLayer

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer, WindowLayer)


def check_cache(model: PreTrainedModel, cache: Any, rows: int, tokens: int) -> None:
    """Raise ValueError for a model that forgets, a cache that cannot be rolled back, or one of another prompt."""
    name = type(model).__name__
    for quirk in quirks_of_model(model, "refused"):
        until = f"; it takes drafts from transformers {quirk.before} on" if quirk.before else ""
        raise UserError(f"{name} cannot take drafts: {quirk.why}{until}")
    layers = getattr(cache, "layers", None)
    require(
        not layers or not all(is_recurrent(layer) and not hasattr(layer, "keys") for layer in layers),
        f"{name} cannot take drafts: it has no attention, and its states cannot be rolled back",
    )
    allowed = layers is not None and all(
        is_recurrent(layer) or borrows_keys(layer) or type(layer) in _LAYERS for layer in layers
    )
    if layers is None or not allowed or type(cache).__name__ in ("EncoderDecoderCache", "QuantizedCache"):
        kinds = sorted({type(layer).__name__ for layer in layers or ()}) or [type(cache).__name__]
        raise UserError(f"speculative needs a dynamic cache, got {type(cache).__name__} of {', '.join(kinds)}")
    held = cache.get_seq_length()
    require(held < tokens, f"the cache holds {held} tokens, which must be fewer than the prompt's {tokens}")
    for layer in layers:
        if getattr(layer, "is_initialized", False) and layer.keys is not None:
            batch = len(layer.keys)
            require(batch == rows, f"the cache holds {batch} rows, the prompt {rows}")


def no_branches(model: PreTrainedModel, *, recurrent: bool) -> str | None:
    """Why the model takes neither trees nor batches of several rows, if it does not."""
    if recurrent:
        return f"{type(model).__name__} has linear-attention layers: draft chains, one row at a time"
    reasons = [quirk.why for quirk in quirks_of_model(model, "chains")]
    if not takes_positions(model):
        reasons.append(BY_PLACE)
    return f"{type(model).__name__} {reasons[0]}: draft chains, one row at a time, unpadded" if reasons else None
