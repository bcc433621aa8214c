"""What the methods that read a draft model share: the check of a prompt, positions, and the draft's lookahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from draftdiff.llm.drafters.base import vocabulary_size
from draftdiff.llm.plain_config import own_law


def check_prompt(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask, int64 like ids.

    Raises ValueError for an encoder-decoder model or torch.compile's wrapper of one, for ids that are no int64 [batch,
    tokens], are empty, out of the vocabulary or on another device than the model, and for a mask of another shape, with
    padding on the right, or of a row without tokens.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("models must come without torch.compile's wrapper: take its _orig_mod, or model.compile()")
    if model.config.is_encoder_decoder:
        raise ValueError(f"models must be decoder-only, got {type(model).__name__}")
    if ids.ndim != 2 or ids.dtype != torch.long:
        raise ValueError(f"ids must be int64 [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(f"the prompt must have at least one token, got ids of shape {list(ids.shape)}")
    if ids.device != model.device:
        raise ValueError(f"ids must be on the model's device {model.device}, got {ids.device}")
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary_size(model):
        raise ValueError(
            f"ids must be from 0 to {vocabulary_size(model) - 1}, the vocabulary of {type(model).__name__}, got "
            f"{lowest if lowest < 0 else highest}"
        )
    if attention_mask is None:
        return torch.ones_like(ids)
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be {list(ids.shape)} like ids, got {list(attention_mask.shape)}")
    mask = attention_mask.to(ids)
    if not bool(((mask == 0) | (mask == 1)).all()) or not bool((mask.diff(dim=-1) >= 0).all()):
        raise ValueError("attention_mask must be 0 for padding, which is on the left, and 1 for tokens")
    if not bool(mask[:, -1].all()):
        raise ValueError(f"each prompt must have at least one token, row {int(mask[:, -1].argmin())} has none")
    return mask


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has a table of; None where they are computed and have no end."""
    learned = any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions")
        for name, module in model.named_modules()
    )
    return model.config.get_text_config().max_position_embeddings if learned else None


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise ValueError for more tokens, of prompt and continuation, than there are learned positions."""
    most = learned_positions(model)
    if most is not None and tokens > most:
        raise ValueError(f"{type(model).__name__} has learned {most} positions, prompt and continuation take {tokens}")


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token in its row, padding aside; int64 like the mask [batch, tokens]."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def lookahead(
    draft: PreTrainedModel, ids: Tensor, attention_mask: Tensor, tokens: int, size: int
) -> tuple[Tensor, Tensor]:
    """The draft's greedy continuation of prompts [batch, tokens], whatever its generation config asks for.

    tokens: how many at most; it ends with the last row's end-of-sequence token.  size: of the vocabulary to use.
    Returns int64 [batch, tokens] and int64 of that shape, 1 up to a row's first end-of-sequence token and 0 after it.
    """
    check_length(draft, ids.shape[1] + tokens)
    own = draft.generation_config.eos_token_id
    stops = torch.as_tensor([] if own is None else own, device=ids.device).flatten()
    config = own_law(
        draft,
        max_new_tokens=tokens,
        suppress_tokens=list(range(size, vocabulary_size(draft))) or None,
        pad_token_id=0,
    )
    new = draft.generate(ids, attention_mask=attention_mask, generation_config=config)[:, ids.shape[1] :]
    stop = torch.isin(new, stops).long()
    return new, (stop.cumsum(-1) == stop).long()
