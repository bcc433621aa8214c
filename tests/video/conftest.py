"""For models that name FlexAttention as their backend."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.nn.attention.flex_attention import create_mask, noop_mask


@pytest.fixture(autouse=True)
def _flex_in_sight(monkeypatch):
    """The FlexAttention of diffusers without a compiler is one node, into which neither a mode nor `rounded` sees."""
    stock = attention_dispatch.flex_attention
    monkeypatch.setattr(
        attention_dispatch, "flex_attention", SimpleNamespace(**vars(stock) | {"flex_attention": plain})
    )


def plain(query, key, value, block_mask=None, scale=None, **_):
    """FlexAttention by PyTorch's own."""
    mask = None
    if block_mask is not None:
        rows, columns = block_mask.BLOCK_SIZE
        mask = block_mask.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        if block_mask.mask_mod is not noop_mask:
            mask = mask & create_mask(block_mask.mask_mod, 1, 1, *mask.shape[-2:], device=query.device)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
