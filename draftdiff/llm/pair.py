"""What the methods that read a draft model share: positions, and the draft's lookahead."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.llm.checks import check_length, vocabulary_size
from draftdiff.llm.plain_config import own_law


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
