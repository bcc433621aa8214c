"""Text-to-image by bits, scale after scale, as a diffusers pipeline (Infinity, arXiv 2412.04431)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from packaging.version import Version
from torch import Generator, Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from draftdiff.core.devices import chosen_dtype, dtype_named
from draftdiff.errors import UserError, one_line
from draftdiff.pipelines.inputs import check_call, check_embeds, check_sampling, plain_numbers
from draftdiff.pipelines.next_scale import NextScalePipeline, put_together
from draftdiff.stored import lfs_pointer
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.decoding import ScaleDecoder
from draftdiff.var.sampling import DRAWS, at
from draftdiff.var.scheduler_infinity import InfinityScheduler
from draftdiff.var.schedules import Scales, reference_grid, scales_for, scales_for_pixels
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel

# The argument's new name; the old one warns where the new one exists.
_DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"

logger = logging.get_logger(__name__)


class InfinityPipeline(NextScalePipeline):
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
            raise UserError(
                f"transformer and vae must agree: {transformer.config.bits} bits per token, but latent_channels "
                f"{vae.config.latent_channels} with patchify={scheduler.config.patchify} are {needed}"
            )
        if text_encoder is not None and text_encoder.config.d_model != transformer.config.text_dim:
            raise UserError(
                f"transformer and text_encoder must agree: text_dim is {transformer.config.text_dim}, the encoder has "
                f"{text_encoder.config.d_model} channels"
            )

    @classmethod
    def from_single_file(
        cls,
        transformer: str | Path,
        vae: str | Path,
        *,
        text_encoder: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
    ) -> InfinityPipeline:
        """A pipeline from original checkpoints: `infinity_2b_reg.pth` or the folder `infinity_8b_weights`, and
        `infinity_vae_*.pth`.

        text_encoder: folder or hub repository of flan-t5-xl; None for embeddings only.  dtype, or by its old name
        torch_dtype: that of the files if None. Raises ValueError that names what does not fit.
        """
        wanted = chosen_dtype(dtype, torch_dtype)
        model = InfinityTransformer2DModel.from_single_file(transformer, dtype=wanted)
        autoencoder = AutoencoderBSQ.from_single_file(vae, dtype=wanted)
        bits, channels = model.config.bits, autoencoder.config.latent_channels
        patchify = bits == 4 * channels
        if not patchify and bits != channels:
            raise UserError(
                f"{transformer} and {vae} do not belong together: the transformer has {bits} bits per token, the vae "
                f"{channels} latent channels, of which a token has all of one cell or of 2 x 2"
            )
        # The authors' settings of their 2B and 8B models.
        scheduler = InfinityScheduler(patchify=patchify, temperature=1.0 if patchify else 0.5)
        encoder = tokenizer = None
        if text_encoder is not None:
            try:
                options: dict[str, Any] = {_DTYPE: wanted or "auto", "trust_remote_code": False}
                encoder = T5EncoderModel.from_pretrained(text_encoder, **options)
                tokenizer = AutoTokenizer.from_pretrained(text_encoder, trust_remote_code=False)
            except Exception as error:  # transformers, the hub and safetensors each have their own
                reason = lfs_pointer(text_encoder) or one_line(error)
                raise UserError(f"text encoder {str(text_encoder)!r} cannot be loaded: {reason}") from error
        with put_together(transformer, vae, text_encoder):
            return cls(model, autoencoder, scheduler, encoder, tokenizer)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings fp32 [prompts, tokens, channels] of the text encoder and their mask, bool [prompts, tokens].

        What a prompt has more than the transformer's text_tokens is cut, with a warning.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("this pipeline has no text encoder: pass prompt_embeds and prompt_mask")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        most = self.transformer.config.text_tokens
        options = {"max_length": most, "padding": True, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **options).to(self._execution_device)
        for text, whole in zip(prompts, self.tokenizer(prompts, verbose=False).input_ids):
            if len(whole) > most:
                logger.warning(f"The prompt has {len(whole)} tokens, of which only {most} are read: {text!r}")
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
        cache_key_dtype: str | torch.dtype | None = None,
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
            every scale unless one per scale is given, in a list, a tensor or an array; 1 means off and halves the work.
        temperature, top_p: the scheduler's where None; temperature also one per scale.
        generator: one for all pictures, or one per picture, which then do not depend on the rest of the batch.
        prompt_embeds, negative_prompt_embeds: [prompts, tokens, channels] of the text encoder instead of prompts, with
            masks [prompts, tokens] where some are padding, of False and True or 0 and 1.
        cache_key_dtype: dtype of cached keys or its name, that of the model if None; the original keeps torch.float32.
        rng: "fast" draws one number per bit; "upstream" draws as the originals, so that a seed gives their pictures.
        output_type: "pil", "np", "pt" or "latent" (latents summed over all scales).
        callback_on_step_end: called as (pipeline, scale, scale, tensors) after each scale, with the tensors named, of
            "latents", "logits" (guided, before top-p), "bits" and "cache" (the KVCache); may return new
            "latents".

        Raises ValueError for an argument that cannot be; the message says what can.
        """
        scales = self._scales(height, width, aspect_ratio, size)
        settings = plain_numbers({"guidance_scale": guidance_scale, "top_p": top_p, "temperature": temperature})
        self.check_inputs(
            texts={"prompt": prompt, "negative_prompt": negative_prompt},
            embeds={
                "prompt": (prompt_embeds, prompt_mask),
                "negative_prompt": (negative_prompt_embeds, negative_prompt_mask),
            },
            scales=len(scales),
            sampling=settings,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            rng=rng,
            output_type=output_type,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        key_dtype = None if cache_key_dtype is None else dtype_named(cache_key_dtype, "cache_key_dtype")
        text, mask = self._text(prompt, prompt_embeds, prompt_mask, times=num_images_per_prompt)
        latents = self._blank(len(text), self.scheduler.latent_size(scales[-1]))
        guidance = settings["guidance_scale"]
        guided = any(at(guidance, scale) != 1 for scale in range(len(scales)))
        if guided:
            negative = negative_prompt, negative_prompt_embeds, negative_prompt_mask
            text, mask = _stacked(text, mask, *self._negative_text(text, mask, *negative))
        latents = self._generate(
            self._decoder(text, mask, scales, key_dtype),
            latents,
            scales,
            guidance={"guidance_scale": guidance if guided else None, "temperature": settings["temperature"]},
            sampling={"generator": DRAWS[rng](generator), "top_p": settings["top_p"]},
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        return self._finish(latents, output_type, return_dict)

    def _text(self, prompt: Any, embeds: Tensor | None, mask: Tensor | None, times: int) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts, each several times over, and their mask, all true where none is given."""
        if embeds is None:
            embeds, mask = self.encode_prompt(prompt)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        return embeds.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)

    def _negative_text(
        self, text: Tensor, mask: Tensor, prompt: Any, embeds: Tensor | None, negative_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What guidance leads away from, for each row of text: negative prompts, or what was learned for none."""
        if prompt is None and embeds is None:
            return self.transformer.uncond_embed[: text.shape[1]].to(text).expand(len(text), -1, -1), mask
        other, other_mask = self._text(prompt, embeds, negative_mask, times=1)
        times = len(text) // len(other)
        return other.repeat_interleave(times, 0), other_mask.repeat_interleave(times, 0)

    def _decoder(self, text: Tensor, mask: Tensor, scales: Scales, key_dtype: torch.dtype | None) -> ScaleDecoder:
        text, mask = text.to(self._execution_device), mask.to(self._execution_device)
        reference = reference_grid(scales)

        def forward(inputs: Tensor | None, *, first_scale: int, **options: Any) -> tuple[Tensor]:
            here = scales[first_scale : first_scale + 1]
            rows = len(text) if inputs is None else len(inputs)  # fewer once guidance is off
            return self.transformer(
                inputs,
                text[:rows],
                here,
                reference,
                encoder_attention_mask=mask[:rows],
                first_scale=first_scale,
                **options,
            )

        return ScaleDecoder(forward, self._make_cache(scales, self.transformer, key_dtype), len(scales))

    @staticmethod
    def _scales(height: int | None, width: int | None, aspect_ratio: float, size: str) -> Scales:
        if (height is None) != (width is None):
            raise UserError(f"give both height and width or neither, got {height} and {width}")
        if height is not None and width is not None:
            return scales_for_pixels(height, width)
        return scales_for(aspect_ratio, size)

    def check_inputs(
        self,
        *,
        texts: dict[str, Any],
        embeds: dict[str, tuple[Tensor | None, Tensor | None]],
        scales: int,
        sampling: dict[str, Any],
        **call: Any,
    ) -> None:
        """Raise ValueError for what cannot be.

        texts, embeds: of prompt and negative_prompt, the embeddings with their masks.  sampling: top_p, guidance_scale,
        temperature.  call: see check_call.
        """
        if (texts["prompt"] is None) == (embeds["prompt"][0] is None):
            raise UserError("give either prompt or prompt_embeds")
        if texts["negative_prompt"] is not None and embeds["negative_prompt"][0] is not None:
            raise UserError("give either negative_prompt or negative_prompt_embeds")
        prompts, negative = (self._count(name, texts[name], *embeds[name]) for name in ("prompt", "negative_prompt"))
        if negative not in (None, 1, prompts):
            raise UserError(f"{prompts} prompts need 1 or as many negative ones: {negative}")
        check_sampling(
            sampling,
            scales,
            defaults=("top_p", "temperature"),
            per_scale=("guidance_scale", "temperature"),
        )
        check_call(prompts=prompts or 0, known_tensors=self._callback_tensor_inputs, **call)

    def _count(self, name: str, texts: Any, embeds: Tensor | None, mask: Tensor | None) -> int | None:
        """How many prompts there are, None without any. Raises ValueError for what is no prompt."""
        if embeds is not None:
            check_embeds(name, embeds, mask, self.transformer.config.text_dim, self.transformer.config.text_tokens)
            return len(embeds)
        if mask is not None:
            raise UserError(f"{name}_mask is of {name}_embeds, which are not given")
        if texts is None:
            return None
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, Sequence) or not listed or not all(isinstance(text, str) for text in listed):
            raise UserError(f"{name} must be a text or a list of texts, got {texts!r}")
        if name == "prompt" and not all(text.strip() for text in listed):
            raise UserError("prompt is empty: say what the picture shall show")
        return len(listed)


def _stacked(text: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of prompts one after the other, padded to the longer."""
    pad = torch.nn.functional.pad
    longest = max(text.shape[1], other.shape[1])
    texts = [pad(t, (0, 0, 0, longest - t.shape[1])) for t in (text, other.to(text))]
    masks = [pad(m, (0, longest - m.shape[1])) for m in (mask, other_mask)]
    return torch.cat(texts), torch.cat(masks)
