"""Text-to-image by bits, scale after scale, as a diffusers pipeline (Infinity, arXiv 2412.04431)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from packaging.version import Version
from torch import Generator, Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from draftdiff.pipelines.hub import local_folder
from draftdiff.pipelines.inputs import check_choices, check_count, check_generators, check_sampling
from draftdiff.pipelines.scale_kv import ScaleKVMixin
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.cache import KVCache
from draftdiff.var.scheduler_infinity import InfinityScheduler
from draftdiff.var.schedules import Scales, reference_grid, scales_for, scales_for_pixels
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel

# The argument's new name; the old one warns where the new one exists.
_DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


class InfinityPipeline(ScaleKVMixin, DiffusionPipeline):
    """Pictures of a prompt, scale after scale.

    text_encoder, tokenizer: flan-t5-xl for the released models; None where prompts come as embeddings.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "logits", "bits", "cache"]  # noqa: RUF012

    def __init__(
        self,
        transformer: InfinityTransformer2DModel,
        vae: AutoencoderBSQ,
        scheduler: InfinityScheduler,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.image_processor = VaeImageProcessor()
        needed = vae.config.latent_channels * scheduler.cells**2
        if transformer.config.bits != needed:
            raise ValueError(
                f"transformer and vae must agree: {transformer.config.bits} bits per token, but latent_channels "
                f"{vae.config.latent_channels} with patchify={scheduler.config.patchify} are {needed}"
            )
        if text_encoder is not None and text_encoder.config.d_model != transformer.config.text_dim:
            raise ValueError(
                f"transformer and text_encoder must agree: text_dim is {transformer.config.text_dim}, the encoder has "
                f"{text_encoder.config.d_model} channels"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> InfinityPipeline:
        """Load a saved pipeline: a folder, or a repository of the hub, which is downloaded first."""
        return super().from_pretrained(local_folder(pretrained_model_name_or_path, kwargs), **kwargs)

    @classmethod
    def from_single_file(
        cls,
        transformer: str | Path,
        vae: str | Path,
        *,
        text_encoder: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> InfinityPipeline:
        """A pipeline from original checkpoints: `infinity_2b_reg.pth` or the folder `infinity_8b_weights`, and
        `infinity_vae_*.pth`.

        text_encoder: folder or hub repository of flan-t5-xl; None for embeddings only.
        Raises ValueError that names what does not fit.
        """
        model = InfinityTransformer2DModel.from_single_file(transformer, torch_dtype=torch_dtype)
        autoencoder = AutoencoderBSQ.from_single_file(vae, torch_dtype=torch_dtype)
        patchify = model.config.bits != autoencoder.config.latent_channels
        # The authors' settings of their 2B and 8B models.
        scheduler = InfinityScheduler(patchify=patchify, temperature=1.0 if patchify else 0.5)
        encoder = tokenizer = None
        if text_encoder is not None:
            try:
                encoder = T5EncoderModel.from_pretrained(text_encoder, **{_DTYPE: torch_dtype or "auto"})
                tokenizer = AutoTokenizer.from_pretrained(text_encoder)
            except (OSError, ValueError) as error:  # transformers' messages have several lines
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"text encoder {str(text_encoder)!r} cannot be loaded: {reason}") from error
        return cls(model, autoencoder, scheduler, encoder, tokenizer)

    def _new_cache(self, scales: Scales, key_dtype: torch.dtype | None) -> KVCache:
        return self._make_cache(scales, self.transformer, key_dtype)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings fp32 [prompts, tokens, channels] of the text encoder and their mask, bool [prompts, tokens]."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: pass prompt_embeds and prompt_mask")
        tokens = self.tokenizer(
            [prompt] if isinstance(prompt, str) else list(prompt),
            max_length=self.transformer.config.text_tokens,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._execution_device)
        mask = tokens.attention_mask
        return self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state.float(), mask.bool()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: float = 1.0,
        size: str = "1M",
        guidance_scale: float | Sequence[float] = 3.0,
        temperature: float | Sequence[float] | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_mask: Tensor | None = None,
        cache_key_dtype: torch.dtype | None = None,
        rng: str = "fast",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        prompt, negative_prompt: one or several; without a negative prompt a learned embedding stands for it.
        height, width: in pixels, one of the sizes of Infinity's schedules; or aspect_ratio (height / width) and size
            ("0.06M", "0.25M", "0.60M" or "1M" pixels).
        guidance_scale: Infinity's own convention: logits are g * conditional + (1 - g) * unconditional, the same at
            every scale unless one per scale is given; 1 means off and halves the work.
        temperature, top_p: the scheduler's where None; temperature also one per scale.
        generator: one for all pictures, or one per picture, which then do not depend on the rest of the batch.
        prompt_embeds, negative_prompt_embeds: [prompts, tokens, channels] of the text encoder instead of prompts, with
            masks bool [prompts, tokens] where some are padding.
        cache_key_dtype: dtype of cached keys, that of the model if None; torch.float32 is what the original keeps.
        rng: "fast" draws one number per bit; "upstream" draws as the originals, so that a seed gives their pictures.
        output_type: "pil", "np", "pt" or "latent" (latents summed over all scales).
        callback_on_step_end: called as (pipeline, scale, scale, tensors) after each scale, with the tensors named, of
            "latents", "logits" (guided, before top-p), "bits" and "cache" (the KVCache); may return new
            "latents".

        Raises ValueError for an argument that cannot be; the message says what can.
        """
        scales = self._scales(height, width, aspect_ratio, size)
        batch = self.check_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, len(scales), guidance_scale, temperature,
            top_p, num_images_per_prompt, generator, rng, output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        device, dtype = self._execution_device, self.transformer.dtype
        each_guidance = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale]
        guided = any(value != 1 for value in each_guidance)
        if prompt is not None:
            prompt_embeds, prompt_mask = self.encode_prompt(prompt)
        if negative_prompt is not None and guided:
            negative_prompt_embeds, negative_prompt_mask = self.encode_prompt(negative_prompt)
        assert prompt_embeds is not None
        text, mask = _repeated(prompt_embeds, prompt_mask, num_images_per_prompt)
        if guided:
            if negative_prompt_embeds is None:
                learned = self.transformer.uncond_embed[: text.shape[1]].to(text)
                other, other_mask = learned.expand(batch, -1, -1), mask
            else:
                other, other_mask = _repeated(negative_prompt_embeds, negative_prompt_mask, 1)
                repeats = batch // len(other)
                other, other_mask = _repeated(other, other_mask, repeats)
            text, mask = _stacked(text, mask, other, other_mask)
        text, mask = text.to(device), mask.to(device)

        cache, reference, last = self._new_cache(scales, cache_key_dtype), reference_grid(scales), len(scales) - 1
        channels = self.vae.config.latent_channels
        latents = torch.zeros(batch, channels, *self.scheduler.latent_size(scales[-1]), device=device)
        with self.progress_bar(total=len(scales)) as bar:
            for scale in range(len(scales)):
                inputs = self.scheduler.scale_model_input(latents, scale, scales).to(dtype) if scale else None
                if guided and inputs is not None:
                    inputs = inputs.repeat(2, 1, 1)
                logits = self.transformer(
                    inputs,
                    text,
                    scales[scale : scale + 1],
                    reference,
                    encoder_attention_mask=mask,
                    first_scale=scale,
                    cache=cache,
                    keep=scale < last,
                    return_dict=False,
                )[0]
                logits = self.scheduler.guide(logits, scale, guidance_scale if guided else None, temperature)
                step = self.scheduler.step(
                    logits, scale, latents, scales, generator=generator, top_p=top_p, burn=rng == "upstream"
                )
                latents = step.latents
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "logits": logits, "bits": step.bits, "cache": cache}
                    named = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, scale, scale, named) or {}).get("latents", latents)
                bar.update()
        cache.clear()

        pictures: Any = latents
        if output_type != "latent":
            sample = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
            pictures = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    @staticmethod
    def _scales(height: int | None, width: int | None, aspect_ratio: float, size: str) -> Scales:
        if (height is None) != (width is None):
            raise ValueError(f"give both height and width or neither, got {height} and {width}")
        if height is not None and width is not None:
            return scales_for_pixels(height, width)
        return scales_for(aspect_ratio, size)

    def check_inputs(
        self,
        prompt: Any,
        negative_prompt: Any,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        scales: int,
        guidance_scale: Any,
        temperature: Any,
        top_p: float | None,
        num_images_per_prompt: int,
        generator: Any,
        rng: str,
        output_type: str,
        callback_tensors: Sequence[str],
    ) -> int:
        """Raise ValueError for what cannot be; returns the number of pictures."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds")
        counts = {}
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is None:
                continue
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be a text or a list of texts, got {value!r}")
            if name == "prompt" and not all(text.strip() for text in texts):
                raise ValueError("prompt is empty: say what the picture shall show")
            counts[name] = len(texts)
        for name, embeds in (("prompt", prompt_embeds), ("negative_prompt", negative_prompt_embeds)):
            if embeds is not None:
                if embeds.ndim != 3 or embeds.shape[-1] != self.transformer.config.text_dim or embeds.shape[1] == 0:
                    raise ValueError(
                        f"{name}_embeds must be [prompts, tokens, {self.transformer.config.text_dim}], "
                        f"got {tuple(embeds.shape)}"
                    )
                counts[name] = len(embeds)
        if counts.get("negative_prompt", 1) not in (1, counts["prompt"]):
            raise ValueError(f"{counts['prompt']} prompts need 1 or as many negative ones: {counts['negative_prompt']}")
        check_sampling(scales, top_p, guidance_scale=guidance_scale, temperature=temperature)
        check_count(num_images_per_prompt)
        check_choices(rng, output_type, callback_tensors, self._callback_tensor_inputs)
        batch = counts["prompt"] * num_images_per_prompt
        check_generators(generator, batch)
        return batch


def _repeated(embeds: Tensor, mask: Tensor | None, times: int) -> tuple[Tensor, Tensor]:
    """Each prompt several times over; the mask is all true where none is given."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    return embeds.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)


def _stacked(text: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of prompts one after the other, padded to the longer."""
    pad = torch.nn.functional.pad
    longest = max(text.shape[1], other.shape[1])
    texts = [pad(t, (0, 0, 0, longest - t.shape[1])) for t in (text, other.to(text))]
    masks = [pad(m, (0, longest - m.shape[1])) for m in (mask, other_mask)]
    return torch.cat(texts), torch.cat(masks)
