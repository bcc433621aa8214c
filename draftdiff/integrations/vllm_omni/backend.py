"""The attention backend that vLLM-Omni (0.30) calls: sparse where the model tells where its video stands, else dense.

Written against the contract of `vllm_omni.diffusion.attention.backends.abstract`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    VideoTokenLayout,
)
from vllm_omni.diffusion.attention.selector import get_attn_backend_for_capability, get_attn_backend_for_role
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError
from draftdiff.integrations.call import MIN_TOKENS, Places, layer_of, say_once, unmasked
from draftdiff.integrations.vllm_omni import SLOT
from draftdiff.video.config import DraftAttentionConfig


class DraftAttentionBackend(AttentionBackend):
    accept_output_buffer = True
    supports_prefix_kv_slicing = True  # padding behind the real tokens is cut off, also for dense calls

    @staticmethod
    def get_name() -> str:
        return SLOT

    @staticmethod
    def get_impl_cls() -> type[DraftAttentionImpl]:
        return DraftAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> Any:
        raise NotImplementedError

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # any

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """What the platform's own backend does with one: masked calls are its."""
        return get_attn_backend_for_capability("self").supports_attention_mask()


class DraftAttentionImpl(AttentionImpl):
    """One layer's attention. q, k, v: [batch, tokens, heads, head_dim].

    backend_kwargs: `block_sparse` of the server's config: sparsity; start_step and end_step, how many of the first and
    last steps stay dense; skip_layers, which blocks do, the first one if none are named.
    Raises UserError for what it cannot honour.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        role: str = "self",
        **extra: Any,
    ) -> None:
        given = backend_kwargs or {}
        if (precision := given.get("precision", "bf16")) != "bf16":
            raise UserError(
                f"draft attention in vLLM-Omni takes block_sparse.precision 'bf16' alone, got {precision!r}"
            )
        parallel = getattr(get_current_diffusion_config_or_none(), "parallel_config", None)
        for degree in ("ring_degree", "allgather_degree"):
            if (size := getattr(parallel, degree, 1)) > 1:
                raise UserError(f"draft attention in vLLM-Omni needs all keys: {degree} must be 1, got {size}")
        self.scale, self.causal, self.layer = softmax_scale, causal, layer_of(prefix)
        self.first, self.last = given.get("start_step", 0), given.get("end_step", 0)
        self.config = DraftAttentionConfig(
            sparsity=given.get("sparsity", DraftAttentionConfig.sparsity),
            dense_layers=tuple(given["skip_layers"]) if given.get("skip_layers") else DraftAttentionConfig.dense_layers,
            min_tokens=MIN_TOKENS,
        )
        dense, _ = get_attn_backend_for_role(role, head_size)  # without a config: the platform's own
        self.dense = dense.get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        if attn_metadata is None:
            return self.dense.forward(query, key, value, attn_metadata)
        real = _real_tokens(attn_metadata)
        if real is None or not real <= query.shape[1] == key.shape[1]:
            return self._forward(query, key, value, attn_metadata)
        # What is behind the real tokens is padding: nobody reads its rows.
        out = self._forward(*(x[:, :real] for x in (query, key, value)), _without_padding(attn_metadata))
        return torch.cat([out, out.new_zeros(out.shape[0], query.shape[1] - real, *out.shape[2:])], dim=1)

    # The server's `Attention` calls it outside of graphs; a caller that traces through breaks here.
    @torch.compiler.disable
    def _forward(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        if self._is_sparse_step() and not (self.layer is not None and self.config.is_dense_layer(self.layer)):
            found = self._sparse(query, key, value, metadata)
            if isinstance(found, Tensor):
                return found
            say_once(f"dense in vLLM-Omni: {found}")
        return self.dense.forward(query, key, value, metadata)

    def _is_sparse_step(self) -> bool:
        if not self.first and not self.last:
            return True
        context = get_forward_context() if is_forward_context_available() else None
        step, steps = getattr(context, "denoise_step_idx", None), getattr(context, "total_denoise_steps", None)
        if step is None or (self.last and steps is None):
            say_once("dense in vLLM-Omni: its pipeline does not tell the step that start_step and end_step count")
            return False
        return self.first <= step and (not self.last or step < steps - self.last)

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor | str:
        if metadata.video_layout is None:
            return "the model does not tell where its video stands (AttentionMetadata.video_layout)"
        if self.causal or metadata.attn_mask is not None or metadata.full_attn_spans is not None:
            return "causal attention or a mask over pairs of tokens"
        if metadata.joint_query is not None or query.shape[1] != key.shape[1]:
            return "queries that are not over the sequence of the keys"
        places = places_of(metadata.video_layout)
        if places is None or any(start > stop for start, stop in places.gaps(query.shape[1])):
            return f"a video layout without a target in {query.shape[1]} tokens: {metadata.video_layout}"
        return unmasked(query, key, value, self.config, places, self.scale)


def places_of(layout: VideoTokenLayout) -> Places | None:
    """The target is the grid, videos it refers to are further ones, and all else is computed exactly."""
    if layout.latent_grid is not None:
        return Places(LatentGrid(*layout.latent_grid), layout.prefix_len or 0)
    spans = [(span.role, span.start, LatentGrid(*span.latent_grid)) for span in layout.video_spans]
    targets = [number for number, (role, *_) in enumerate(spans) if role == "target"]
    if not targets:
        return None
    _, lead, grid = spans.pop(targets[-1])
    return Places(grid, lead, tuple((start, other) for _, start, other in spans))


def _real_tokens(metadata: AttentionMetadata) -> int | None:
    """Tokens in front of the padding, None where it is not told."""
    layout = metadata.video_layout
    if layout is not None and layout.used_len is not None:
        return layout.used_len
    if layout is not None and layout.latent_grid is not None:
        return (layout.prefix_len or 0) + LatentGrid(*layout.latent_grid).tokens
    return metadata.extra.get("valid_kv_length")


def _without_padding(metadata: AttentionMetadata) -> AttentionMetadata:
    """Of the real tokens alone: a mask of one flag per token covers padding by the server's contract, and what counts
    packed sequences no longer holds."""
    flags = metadata.attn_mask is not None and metadata.attn_mask.ndim == 2
    packed = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "valid_kv_length", "npu_attn_varlen")
    extra = {name: value for name, value in metadata.extra.items() if name not in packed}
    mask = None if flags else metadata.attn_mask
    return replace(metadata, attn_mask=mask, extra=extra, packed_padding=None)
