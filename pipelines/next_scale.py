"""Next-scale generation as a diffusers pipeline: what class-conditional VAR and text-to-image Infinity share.

Scale after scale a decoder gives logits, the scheduler guides them, draws tokens and adds what they stand for to the
latents (VAR, arXiv 2404.02905; Infinity, arXiv 2412.04431).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.hosts.custom_code import never_asked
from draftdiff.hosts.diffusers import with_one_dtype
from draftdiff.pipelines.hub import local_folder
from draftdiff.pipelines.scale_kv import ScaleKVMixin
from draftdiff.var.collaborative import CollaborativeDecoder
from draftdiff.var.decoding import ScaleDecoder
from draftdiff.var.schedules import Scales

if TYPE_CHECKING:
    from typing_extensions import Self


@contextmanager
def put_together(*files: str | Path | None) -> Iterator[None]:
    """Around making a pipeline of checkpoints: what does not fit is said with their names."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{' and '.join(str(file) for file in files if file is not None)}: {error}") from None


class NextScalePipeline(ScaleKVMixin, DiffusionPipeline):
    """Parts: `transformer`, `vae` and a `scheduler` that steps over scales (`scale_model_input`, `guide`, `step`)."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a saved pipeline: a folder, or a repository of the hub, which is downloaded first.

        dtype, or by its old name torch_dtype, may also be a name such as "bfloat16" or "bf16", or a dict of them by
        part. Code that a folder brings with it is not run.
        """
        kwargs.pop("trust_remote_code", None)  # False without it, and older hosts do not know it
        kwargs = with_one_dtype(kwargs)
        with never_asked():
            return super().from_pretrained(local_folder(pretrained_model_name_or_path, kwargs), **kwargs)

    def _generate(
        self,
        decoder: ScaleDecoder | CollaborativeDecoder,
        latents: Tensor,
        scales: Scales,
        *,
        guidance: dict[str, Any],
        sampling: dict[str, Any],
        callback: Callable[..., dict[str, Tensor]] | None,
        callback_tensors: Sequence[str],
        edit: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """Latents summed over all scales.

        latents: to begin with, [batch, channels, height, width].  guidance, sampling: further arguments of the
        scheduler's `guide` and `step`; a guidance_scale of None says that the decoder has no unconditional half.
        edit: what becomes of the latents after a scale.
        """
        guided = guidance["guidance_scale"] is not None
        unguided_from = len(scales) - min(self.unguided_scales, len(scales) - 1)
        with self.progress_bar(total=len(scales)) as bar:
            for scale in range(len(scales)):
                inputs = None
                if guided and scale == unguided_from:
                    guided, guidance = False, guidance | {"guidance_scale": None}
                    decoder.cache.keep_rows(len(latents))
                if scale:
                    inputs = self.scheduler.scale_model_input(latents, scale, scales).to(self.transformer.dtype)
                    inputs = inputs.repeat(2, 1, 1) if guided else inputs
                logits = self.scheduler.guide(decoder.logits(scale, inputs), scale, **guidance)
                step = self.scheduler.step(logits, scale, latents, scales, **sampling)
                latents = step.latents if edit is None else edit(step.latents, scale)
                if callback is not None:
                    ours = {"latents": latents, "logits": logits, "cache": decoder.cache}
                    tensors = {name: ours[name] if name in ours else getattr(step, name) for name in callback_tensors}
                    latents = (callback(self, scale, scale, tensors) or {}).get("latents", latents)
                bar.update()
        decoder.cache.clear()
        return latents

    def _blank(self, batch: int, size: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """Latents of nothing, [batch, channels, height, width]."""
        return torch.zeros(batch, self.vae.config.latent_channels, *size, device=self._execution_device, dtype=dtype)

    def _finish(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        """Decode the latents, unless they are what is asked for."""
        pictures: Any = latents
        if output_type != "latent":
            sample = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
            pictures = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)
