"""VAR's scales as a diffusers scheduler: guidance ramp, sampling, and the sum of residuals (arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from draftdiff.var.quantizer import MultiScaleQuantizer, resize_area
from draftdiff.var.sampling import Draws, Generators, at, filter_logits
from draftdiff.var.schedules import Scales
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

    @property
    def scales(self) -> Scales:
        """Height and width of each scale in tokens."""
        return tuple((side, side) for side in self.patch_nums)

    def guide(self, logits: Tensor, scale: int, guidance_scale: float | None) -> Tensor:
        """Classifier-free guidance that grows linearly from 0 at the first scale to guidance_scale at the last:
        (1 + t) * conditional - t * unconditional.

        logits [2 * batch, tokens, vocabulary], the conditional half first, or without the other where guidance_scale is
        None; returns fp32 [batch, tokens, vocabulary].
        """
        if guidance_scale is None:
            return logits.float()
        conditional, unconditional = logits.float().chunk(2)
        t = guidance_scale * self.progress(scale)
        return (1 + t) * conditional - t * unconditional

    def step(
        self,
        logits: Tensor,
        scale: int,
        latents: Tensor,
        scales: Scales,
        *,
        quantizer: MultiScaleQuantizer,
        generator: Draws | Generators = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        temperature: float | Sequence[float] | None = None,
        more_smooth: bool = False,
    ) -> VARSchedulerOutput:
        """Draw the codes of a scale from guided logits [batch, tokens, vocabulary] and add them to the latents.

        generator: see Draws.  more_smooth: mix codes by Gumbel-softmax weights that sharpen from scale to scale,
        instead of drawing one: for smoother pictures, not for metrics; takes no temperature.
        """
        draws = Draws.of(generator)
        top_k = self.config.top_k if top_k is None else top_k
        top_p = self.config.top_p if top_p is None else top_p
        heat = at(self.config.temperature if temperature is None else temperature, scale)
        filtered = filter_logits(logits.float(), at(top_k, scale), top_p)
        tempered = filtered if heat == 1 else filtered / heat
        codebook = quantizer.embedding.weight
        if more_smooth:
            indices = draws.unused_codes(tempered)
            ratio = self.progress(scale)
            weights = draws.mixture(filtered * (1 + ratio), max(0.27 * (1 - 0.95 * ratio), 0.005))
            codes = weights.to(codebook.dtype) @ codebook
        else:
            indices = draws.codes(tempered)
            codes = quantizer.embedding(indices)
        latents = latents + quantizer.contribution(codes, scale, [side for side, _ in scales])
        return VARSchedulerOutput(latents=latents, indices=indices)

    def scale_model_input(self, latents: Tensor, scale: int, scales: Scales) -> Tensor:
        """What the model reads at a scale: the latents averaged down to its size, [batch, tokens, channels]."""
        return rearrange(resize_area(latents, scales[scale][0]), "b c h w -> b (h w) c")
