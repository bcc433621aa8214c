"""Infinity's autoencoder, whose codes are signs (arXiv 2412.04431; binary spherical quantisation, arXiv 2406.07548)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.var.autoencoder_names import vqgan_config, vqgan_name
from draftdiff.var.checkpoint import OriginalCheckpointMixin, Tensors, shape


def codes_of(bits: Tensor) -> Tensor:
    """Bits [batch, channels, height, width] as corners of a cube inscribed in the unit sphere, fp32."""
    return (2.0 * bits - 1) / math.sqrt(bits.shape[1])


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, without antialiasing when it shrinks; x [batch, channels, height, width]."""
    return (
        x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    )


class AutoencoderBSQ(OriginalCheckpointMixin, ModelMixin, ConfigMixin):
    """Pictures to bits of every scale and back; residual blocks only, no attention.

    block_out_channels: channels per level, finest first; each level but the last halves the resolution.
    layers_per_block: residual blocks per level of the encoder, one more in the decoder.  latent_channels: bits of a
    cell.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 32,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        shared: dict[str, Any] = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": False,
        }
        self.encoder = Encoder(
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            double_z=False,
            **shared,
        )
        self.decoder = Decoder(in_channels=latent_channels, up_block_types=("UpDecoderBlock2D",) * levels, **shared)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @apply_forward_hook
    def encode(self, sample: Tensor, scales: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Bits of every scale, bool [batch, latent_channels, height, width], for pictures [batch, 3, height, width] in
        [-1, 1] that are `downscale` times the last of `scales` (height, width)."""
        features = self.encoder(sample)
        if features.shape[-2:] != tuple(scales[-1]):
            raise UserError(f"the last scale must be {tuple(features.shape[-2:])} here, got {tuple(scales[-1])}")
        left, bits = features.float(), []
        for scale in scales:
            bits.append(resize(left, scale) > 0)
            left = left - resize(codes_of(bits[-1]), scales[-1])
        return bits

    @apply_forward_hook
    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures [batch, 3, height, width] in [-1, 1], clamped, for latents summed over all scales."""
        sample = self.decoder(latents).clamp(-1, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, scales: Sequence[tuple[int, int]]) -> DecoderOutput:
        """Reconstruct pictures from the bits of all scales."""
        codes = [resize(codes_of(bits), scales[-1]) for bits in self.encode(sample, scales)]
        return DecoderOutput(sample=self.decoder(torch.stack(codes).sum(0).to(self.dtype)))

    @classmethod
    def original_config(cls, tensors: Tensors) -> dict[str, Any]:
        """Constructor arguments that fit a checkpoint."""
        config = vqgan_config(tensors, wrapper="conv.")
        return {**config, "latent_channels": shape(tensors, "decoder.conv_in.conv.weight", 4)[1]}

    def original_names(self, tensors: Tensors) -> Callable[[str], str]:
        """From our parameter names to those of a checkpoint."""
        levels = len(self.config.block_out_channels)

        def name(key: str) -> str:
            prefix, _, kind = vqgan_name(key, levels).rpartition(".")
            layer = prefix.rsplit(".", 1)[-1]
            wrapper = "norm" if layer.startswith("norm") else "conv"
            return f"{prefix}.{wrapper}.{kind}"

        return name
