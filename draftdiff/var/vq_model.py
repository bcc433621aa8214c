"""The VQ autoencoder of VAR (arXiv 2404.02905, section 3.2): a VQGAN-style encoder and decoder around the multi-scale
residual quantiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from draftdiff.var.autoencoder_names import vqgan_config, vqgan_name
from draftdiff.var.checkpoint import OriginalCheckpointMixin, Tensors, count, rename, shape
from draftdiff.var.quantizer import MultiScaleQuantizer

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass
class VQTrainingOutput(BaseOutput):
    """sample: reconstruction [batch, 3, height, width] in [-1, 1], unclamped.  loss: codebook and commitment loss.
    indices: int64 [batch, side^2] per scale.
    """

    sample: Tensor
    loss: Tensor
    indices: list[Tensor]


class VQModel(OriginalCheckpointMixin, ModelMixin, ConfigMixin):
    """Pictures to code indices of every scale and back.

    block_out_channels: channels per level, finest first; each level but the last halves the resolution, and the lowest
    has attention.  layers_per_block: residual blocks per level of the encoder, one more in the decoder.
    latent_channels, num_vq_embeddings: size and number of the codes.  patch_nums: side of each scale in tokens.
    num_phi, phi_share, cosine: see MultiScaleQuantizer.  beta: weight of the commitment loss.
    """

    _supports_gradient_checkpointing = False
    _skip_layerwise_casting_patterns = ("quantize",)

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (160, 160, 320, 320, 640),
        layers_per_block: int = 2,
        latent_channels: int = 32,
        num_vq_embeddings: int = 4096,
        patch_nums: tuple[int, ...] = PATCH_NUMS_256,
        num_phi: int = 4,
        phi_share: float = 0.5,
        beta: float = 0.25,
        cosine: bool = False,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        shared = {"block_out_channels": tuple(block_out_channels), "norm_num_groups": norm_num_groups}
        self.encoder = Encoder(
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            layers_per_block=layers_per_block,
            double_z=False,
            **shared,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            layers_per_block=layers_per_block,
            **shared,
        )
        self.quantize = MultiScaleQuantizer(
            num_vq_embeddings, latent_channels, patch_nums, num_phi, phi_share, beta, cosine
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)

    @property
    def downscale(self) -> int:
        """Pixels per token of the last scale, along one axis."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @apply_forward_hook
    def encode(self, sample: Tensor, patch_nums: Sequence[int] | None = None) -> list[Tensor]:
        """Code indices int64 [batch, side^2] of every scale, for pictures [batch, 3, height, width] in [-1, 1] whose
        height and width are `downscale` times the last of patch_nums, by default the model's own."""
        return self.quantize(self.quant_conv(self.encoder(sample)), patch_nums).indices

    @apply_forward_hook
    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures [batch, 3, height, width] in [-1, 1], clamped, for latents summed over all scales."""
        sample = self.decoder(self.post_quant_conv(latents)).clamp(-1, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, patch_nums: Sequence[int] | None = None) -> VQTrainingOutput:
        """Reconstruct pictures [batch, 3, height, width] in [-1, 1], with straight-through gradients."""
        quantized = self.quantize(self.quant_conv(self.encoder(sample)), patch_nums)
        reconstruction = self.decoder(self.post_quant_conv(quantized.latents))
        return VQTrainingOutput(sample=reconstruction, loss=quantized.loss, indices=quantized.indices)

    @classmethod
    def original_config(cls, tensors: Tensors) -> dict[str, Any]:
        """Constructor arguments that fit a checkpoint."""
        vocabulary, channels = shape(tensors, "quantize.embedding.weight", 2)
        phi = "quantize.quant_resi."
        return {
            **vqgan_config(tensors),
            "latent_channels": channels,
            "num_vq_embeddings": vocabulary,
            "num_phi": count(tensors, rf"{phi}qresi_ls\.(\d+)") or int(f"{phi}qresi.weight" in tensors),
            "phi_share": 0.5 if any(name.startswith(phi) for name in tensors) else 0.0,
        }

    def original_names(self, tensors: Tensors) -> Callable[[str], str]:
        """From our parameter names to those of a checkpoint, whose phi may be one, several or one per scale."""
        phi = r"quantize.quant_resi.qresi_ls.\1"
        if "quantize.quant_resi.qresi.weight" in tensors:
            phi = "quantize.quant_resi.qresi."
        elif "quantize.quant_resi.0.weight" in tensors:
            phi = r"quantize.quant_resi.\1"
        levels = len(self.config.block_out_channels)
        return lambda key: rename(vqgan_name(key, levels), ((r"^quantize\.phi\.(\d+\.)", phi),))
