"""Attention processor for HunyuanVideo 1.5 that keeps the key mask small.

The stock processor expands which keys are valid to one flag per pair of tokens, in every layer: 10 GB for 100k tokens.
Padding stands in the text only, and no valid query may look at it, so one flag per key says the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


class HunyuanVideo15Processor:
    """Joint attention of [video, text] with a mask of shape [B, 1, 1, N].

    Rows of padding come out different from the stock processor's (which are zero): no later layer reads them.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the video and the text output.

        hidden_states [B, V, C]: video.  encoder_hidden_states [B, T, C]: text.  attention_mask [B, T]: nonzero where
        text is valid.  image_rotary_emb: cosines and sines [V, D] of the video positions.
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        def rotated(x: Tensor) -> Any:
            # diffusers annotates the pair as a tuple of one.
            return apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)  # type: ignore[arg-type]

        text = encoder_hidden_states
        query = [rotated(attn.norm_q(heads(attn.to_q(hidden_states)))), attn.norm_added_q(heads(attn.add_q_proj(text)))]
        key = [rotated(attn.norm_k(heads(attn.to_k(hidden_states)))), attn.norm_added_k(heads(attn.add_k_proj(text)))]
        value = [heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(text))]

        video_tokens = hidden_states.shape[1]
        joint = dispatch_attention_fn(
            torch.cat(query, dim=1),
            torch.cat(key, dim=1),
            torch.cat(value, dim=1),
            attn_mask=F.pad(attention_mask.bool(), (video_tokens, 0), value=True)[:, None, None, :],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        joint = joint.flatten(2).to(hidden_states.dtype)
        project, dropout = attn.to_out
        return dropout(project(joint[:, :video_tokens])), attn.to_add_out(joint[:, video_tokens:])
