"""The attention backend that SGLang's own models (0.5.23) call: sparse where a call is over the video alone.

Written against the contract of `sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum, current_platform
from sglang.multimodal_gen.runtime.server_args import get_global_server_args
from sglang.multimodal_gen.runtime.utils.precision import get_compute_dtype
from torch import Tensor

from draftdiff.core.grid import LatentGrid
from draftdiff.integrations.call import MIN_TOKENS, Places, layer_of, say_once, unmasked
from draftdiff.integrations.sglang import SLOT
from draftdiff.video.config import DraftAttentionConfig


@dataclass
class DraftAttentionMetadata(AttentionMetadata):
    """Of one step. grid: of the video's tokens, or why it is not known.  dense: whether the step is."""

    grid: LatentGrid | str
    config: DraftAttentionConfig
    dense: bool


class DraftAttentionMetadataBuilder(AttentionMetadataBuilder):
    def build(  # type: ignore[override]
        self,
        current_timestep: int,
        skip_first_steps: int,
        sparsity: float,
        raw_latent_shape: Sequence[int],
        patch_size: Sequence[int],
        **rest: Any,
    ) -> DraftAttentionMetadata:
        """As the server's denoising stage calls it for each step.

        raw_latent_shape: [..., frames, height, width] of the latents.  sparsity, skip_first_steps: of the server's
        `--attention-backend-config`, whose other entries are fields of DraftAttentionConfig.
        """
        given = getattr(get_global_server_args(), "attention_backend_config", None) or {}
        fields = {name: value for name, value in given.items() if name not in ("sparsity", "skip_first_steps")}
        config = DraftAttentionConfig.of({"min_tokens": MIN_TOKENS, **fields, "sparsity": sparsity})
        grid: LatentGrid | str = f"latents of shape {tuple(raw_latent_shape)} tell no grid of frames and rows"
        if len(raw_latent_shape) >= 5 and len(patch_size) == 3:
            grid = LatentGrid(*(size // patch for size, patch in zip(raw_latent_shape[-3:], patch_size)))
        return DraftAttentionMetadata(current_timestep, grid, config, current_timestep < skip_first_steps)


class DraftAttentionBackend(AttentionBackend):
    accept_output_buffer = True

    @staticmethod
    def get_enum() -> AttentionBackendEnum:
        return AttentionBackendEnum[SLOT]

    @staticmethod
    def get_impl_cls() -> type[DraftAttentionImpl]:
        return DraftAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[DraftAttentionMetadata]:
        return DraftAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[DraftAttentionMetadataBuilder]:
        return DraftAttentionMetadataBuilder


class DraftAttentionImpl(AttentionImpl):
    """One layer's attention. q, k, v: [batch, tokens, heads, head_dim], of all processes."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra: Any,
    ) -> None:
        self.scale, self.causal, self.layer = softmax_scale, causal, layer_of(prefix)
        dense = resolve_name(current_platform.get_attn_backend_cls_str(None, head_size, get_compute_dtype()))
        self.dense = dense.get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            **extra,
        )

    @torch.compiler.disable
    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor:
        found = self._sparse(query, key, value, attn_metadata)
        if isinstance(found, Tensor):
            return found
        if found is not None:
            say_once(f"dense in SGLang: {found}")
        return self.dense.forward(query, key, value, None)

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor | str | None:
        """The output, the reason why the call is dense, or None where it was asked to be."""
        if not isinstance(metadata, DraftAttentionMetadata):
            return "its denoising stage built no metadata for this backend"
        config, grid = metadata.config, metadata.grid
        if metadata.dense or (self.layer is not None and config.is_dense_layer(self.layer)):
            return None
        if isinstance(grid, str):
            return grid
        if self.causal:
            return "causal attention"
        if query.shape[1] != key.shape[1] or query.shape[1] != grid.tokens:
            return f"{query.shape[1]} queries and {key.shape[1]} keys are not the {grid.tokens} of the video {grid}"
        return unmasked(query, key, value, config, Places(grid), self.scale)
