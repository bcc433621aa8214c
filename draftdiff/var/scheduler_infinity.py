"""Infinity's scales as a diffusers scheduler: guidance, bits, and the sum of residuals (arXiv 2412.04431)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from draftdiff.var.autoencoder_bsq import codes_of, resize
from draftdiff.var.sampling import Draws, Generators, at
from draftdiff.var.schedules import Scales


@dataclass
class InfinitySchedulerOutput(BaseOutput):
    """latents: [batch, channels, height, width] after this scale.  bits: int64 [batch, tokens, bits per token]."""

    latents: Tensor
    bits: Tensor


class InfinityScheduler(SchedulerMixin, ConfigMixin):
    """Steps over scales instead of time.

    patchify: a token stands for 2 x 2 cells of the autoencoder (the 8B models).  temperature, top_p: what `guide` and
    `step` use where their caller names nothing; temperature may be one value or one per scale.
    """

    order = 1

    @register_to_config
    def __init__(
        self, patchify: bool = False, temperature: float | tuple[float, ...] = 0.5, top_p: float = 0.97
    ) -> None:
        pass

    @property
    def cells(self) -> int:
        """Cells of the autoencoder per token, along one axis."""
        return 2 if self.config.patchify else 1

    def latent_size(self, scale: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a scale in cells of the autoencoder."""
        return scale[0] * self.cells, scale[1] * self.cells

    def guide(
        self,
        logits: Tensor,
        scale: int,
        guidance_scale: float | Sequence[float] | None,
        temperature: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Logits over temperature, and classifier-free guidance g * conditional + (1 - g) * unconditional.

        logits: [2 * batch, tokens, 2 * bits], the unconditional half last, or without it where guidance_scale is None.
        Returns fp32 [batch, tokens, bits, 2].
        """
        temperature = self.config.temperature if temperature is None else temperature
        logits = logits.float() * (1 / at(temperature, scale))
        if guidance_scale is not None:
            guidance = at(guidance_scale, scale)
            conditional, unconditional = logits.chunk(2)
            logits = guidance * conditional + (1 - guidance) * unconditional
        return logits.unflatten(-1, (-1, 2))

    def step(
        self,
        logits: Tensor,
        scale: int,
        latents: Tensor,
        scales: Scales,
        *,
        generator: Draws | Generators = None,
        top_p: float | None = None,
    ) -> InfinitySchedulerOutput:
        """Draw the bits of a scale from guided logits [batch, tokens, bits, 2] and add their codes to the latents.

        generator, top_p: see Draws, `bits`.
        """
        top_p = self.config.top_p if top_p is None else top_p
        bits = Draws.of(generator).bits(logits.flatten(1, 2), top_p).view(logits.shape[:-1])
        height, width = scales[scale]
        image = rearrange(bits, "b (h w) c -> b c h w", h=height, w=width)
        if self.config.patchify:
            image = F.pixel_shuffle(image, 2)
        codes = resize(codes_of(image), self.latent_size(scales[-1])).to(latents.dtype)
        return InfinitySchedulerOutput(latents=latents + codes, bits=bits)

    def scale_model_input(self, latents: Tensor, scale: int, scales: Scales) -> Tensor:
        """What the model reads at a scale: the latents at its size, [batch, tokens, bits]."""
        small = resize(latents, self.latent_size(scales[scale]))
        if self.config.patchify:
            small = F.pixel_unshuffle(small, 2)
        return rearrange(small, "b c h w -> b (h w) c")
