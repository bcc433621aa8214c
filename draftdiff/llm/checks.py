"""What a user may have got wrong with a model, a pair of models or a prompt: each a ValueError in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.errors import UserError
from draftdiff.hosts.transformers_quirks import learned_positions


def require(allowed: bool, message: str) -> None:
    """Raise ValueError with the message unless allowed."""
    if not allowed:
        raise UserError(message)


def vocabulary_size(model: Any) -> int:
    """Rows of the model's output."""
    return int(model.config.get_text_config().vocab_size)


def check_vocabulary_sizes(target: PreTrainedModel, draft: PreTrainedModel, *, same_tokenizer: bool = False) -> int:
    """The target's vocabulary size. Raises ValueError unless draft and target may share a vocabulary.

    Sizes may differ by padding and added tokens, together fewer than 1,024. same_tokenizer: whether to take it for
    granted, whatever the sizes.
    """
    a, b = vocabulary_size(target), vocabulary_size(draft)
    require(
        same_tokenizer or abs(a - b) < 1024,
        f"the draft's vocabulary of {b} tokens is not the target's of {a}: they need the same tokenizer "
        "(CrossVocabDrafter takes others; same_tokenizer=True if it is the same)",
    )
    return a


def share_tokens(a: Any, b: Any) -> bool:
    """Whether two tokenizers have the same tokens but for fewer than 1,024 that one of them has added."""
    small, large = sorted((a.get_vocab(), b.get_vocab()), key=len)
    return len(large) - len(small) < 1024 and all(large.get(token) == id for token, id in small.items())


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> int:
    """As `check_vocabulary_sizes`, and raises ValueError unless both are on one device."""
    size = check_vocabulary_sizes(target, draft)
    require(
        target.device == draft.device,
        f"the draft is on {draft.device}, the target on {target.device}: they need the same device",
    )
    return size


def check_prompt(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask, int64 like ids.

    Raises ValueError for an encoder-decoder model or torch.compile's wrapper of one, for ids that are no int64 [batch,
    tokens], are empty, out of the vocabulary or on another device than the model, and for a mask of another shape, with
    padding on the right, or of a row without tokens.
    """
    require(
        not hasattr(model, "_orig_mod"),
        "models must come without torch.compile's wrapper: take its _orig_mod, or model.compile()",
    )
    require(not model.config.is_encoder_decoder, f"models must be decoder-only, got {type(model).__name__}")
    require(
        ids.ndim == 2 and ids.dtype == torch.long,
        f"ids must be int64 [batch, tokens], got {ids.dtype} {list(ids.shape)}",
    )
    require(ids.numel() > 0, f"the prompt must have at least one token, got ids of shape {list(ids.shape)}")
    require(ids.device == model.device, f"ids must be on the model's device {model.device}, got {ids.device}")
    lowest, highest, size = int(ids.min()), int(ids.max()), vocabulary_size(model)
    require(
        lowest >= 0 and highest < size,
        f"ids must be from 0 to {size - 1}, the vocabulary of {type(model).__name__}, got "
        f"{lowest if lowest < 0 else highest}",
    )
    if attention_mask is None:
        return torch.ones_like(ids)
    require(
        attention_mask.shape == ids.shape,
        f"attention_mask must be {list(ids.shape)} like ids, got {list(attention_mask.shape)}",
    )
    mask = attention_mask.to(ids)
    require(
        bool(((mask == 0) | (mask == 1)).all()) and bool((mask.diff(dim=-1) >= 0).all()),
        "attention_mask must be 0 for padding, which is on the left, and 1 for tokens",
    )
    last = mask[:, -1]
    require(bool(last.all()), f"each prompt must have at least one token, row {int(last.argmin())} has none")
    return mask


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise ValueError for more tokens, of prompt and continuation, than there are learned positions."""
    most = learned_positions(model)
    require(
        most is None or tokens <= most,
        f"{type(model).__name__} has learned {most} positions, prompt and continuation take {tokens}",
    )


def check_decoding(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose `generate` would refuse a cache that is given."""
    chosen = model.generation_config.cache_implementation
    require(
        chosen in (None, "hybrid"),  # which the host drops by itself
        f"generation_config.cache_implementation must be None to decode from a cache that is given, got {chosen!r}",
    )
