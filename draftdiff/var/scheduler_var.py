"""VAR's scales as a diffusers scheduler: guidance ramp, sampling, and the sum of residuals (arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from draftdiff.var.quantizer import MultiScaleQuantizer, resize_area
from draftdiff.var.sampling import Generators, at, draw, draw_soft, exponential, filter_logits
from draftdiff.var.vq_model import PATCH_NUMS_256


@dataclass
class VARSchedulerOutput(BaseOutput):
    """latents: [batch, channels, side, side] after this scale.  indices: int64 [batch, tokens] or None."""

    latents: Tensor
    indices: Tensor | None


class VARScheduler(SchedulerMixin, ConfigMixin):
    """Steps over scales instead of time.

    patch_nums: side of each scale in tokens.  top_k, top_p, temperature: what `step` uses where its caller names
    nothing; top_k and temperature may be one value or one per scale. Temperature divides the logits after the filters.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        patch_nums: tuple[int, ...] = PATCH_NUMS_256,
        top_k: int | tuple[int, ...] = 900,
        top_p: float = 0.95,
        temperature: float | tuple[float, ...] = 1.0,
    ) -> None:
        self.patch_nums = tuple(patch_nums)

    def __len__(self) -> int:
        return len(self.patch_nums)

    def progress(self, scale: int) -> float:
        """Place of a scale among all, 0 to 1."""
        return scale / max(len(self) - 1, 1)

    def guide(self, logits: Tensor, scale: int, guidance_scale: float) -> Tensor:
        """Classifier-free guidance that grows linearly from 0 at the first scale to guidance_scale at the last:
        (1 + t) * conditional - t * unconditional.

        logits [2 * batch, tokens, vocabulary], the conditional half first; returns fp32.
        """
        conditional, unconditional = logits.float().chunk(2)
        t = guidance_scale * self.progress(scale)
        return (1 + t) * conditional - t * unconditional

    def step(
        self,
        logits: Tensor,
        scale: int,
        latents: Tensor,
        quantizer: MultiScaleQuantizer,
        *,
        generator: Generators = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        temperature: float | Sequence[float] | None = None,
        more_smooth: bool = False,
        burn: bool = False,
    ) -> VARSchedulerOutput:
        """Draw the codes of a scale from guided logits [batch, tokens, vocabulary] and add them to the latents.

        more_smooth: mix codes by Gumbel-softmax weights that sharpen from scale to scale, instead of drawing one: for
        smoother pictures, not for metrics; takes no temperature.  burn: draw indices even then, as the originals do.
        """
        top_k = self.config.top_k if top_k is None else top_k
        top_p = self.config.top_p if top_p is None else top_p
        temperature = self.config.temperature if temperature is None else temperature
        filtered = filter_logits(logits.float(), at(top_k, scale), top_p)
        indices = None
        if burn or not more_smooth:
            heat = at(temperature, scale)
            indices = draw(filtered if heat == 1 else filtered / heat, generator)
        if more_smooth:
            ratio = self.progress(scale)
            weights = draw_soft(filtered * (1 + ratio), max(0.27 * (1 - 0.95 * ratio), 0.005), generator)
            codes = weights.to(quantizer.embedding.weight.dtype) @ quantizer.embedding.weight
        else:
            codes = quantizer.embedding(indices)
        latents = latents + quantizer.contribution(codes, scale, self.patch_nums)
        return VARSchedulerOutput(latents=latents, indices=indices)

    def scale_model_input(self, latents: Tensor, scale: int) -> Tensor:
        """What the model reads at a scale: the latents averaged down to its size, [batch, tokens, channels]."""
        return rearrange(resize_area(latents, self.patch_nums[scale]), "b c h w -> b (h w) c")

    def burn(self, scales: int, batch: int, vocabulary: int, generator: Generators, like: Tensor) -> None:
        """Advance the generator by the draws of the first scales, without drawing anything from them."""
        for side in self.patch_nums[:scales]:
            exponential((batch, side**2, vocabulary), generator, like)


def draw_labels(count: int, classes: int, generator: Generators) -> Tensor:
    """Class labels drawn uniformly, int64 [count], as VAR's original draws them."""
    if isinstance(generator, Sequence):
        return torch.cat([draw_labels(1, classes, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    uniform = torch.full((1, classes), 1 / classes, device=device)
    return torch.multinomial(uniform, count, replacement=True, generator=generator).flatten()
