"""Class-conditional next-scale generation as a diffusers pipeline (VAR, arXiv 2404.02905), alone or with CoDe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Generator, Tensor

from draftdiff.core.devices import chosen_dtype, dtype_named
from draftdiff.errors import UserError
from draftdiff.pipelines.in_painting import masks, pictures
from draftdiff.pipelines.inputs import check_call, check_flag, check_sampling, plain_numbers
from draftdiff.pipelines.next_scale import NextScalePipeline, put_together
from draftdiff.pipelines.scale_kv import accepts_old_names
from draftdiff.var.collaborative import CollaborativeDecoder, check_pair
from draftdiff.var.decoding import ScaleDecoder
from draftdiff.var.sampling import DRAWS, Draws
from draftdiff.var.scale_kv import ScaleKVConfig, WideLayers
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel


class VARPipeline(NextScalePipeline):
    """Pictures of a class, scale after scale.

    transformer: the model, or the drafter where there is a refiner.  vae: the VQ model whose codes it predicts.
    refiner, draft_scales: see `enable_collaborative`.  id2label: names of the classes.
    """

    model_cpu_offload_seq = "transformer->refiner"
    _optional_components = ["refiner"]  # noqa: RUF012
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012  # its small quantizer works at every scale
    _callback_tensor_inputs = ["latents", "logits", "indices", "cache"]  # noqa: RUF012

    def __init__(
        self,
        transformer: VARTransformer2DModel,
        vae: VQModel,
        scheduler: VARScheduler,
        refiner: VARTransformer2DModel | None = None,
        draft_scales: int | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,  # a saved pipeline's numbers are strings
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, refiner=refiner)
        self.register_to_config(draft_scales=draft_scales, id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.downscale)
        _check_parts(transformer, vae, scheduler)
        if refiner is not None:
            self.enable_collaborative(refiner, 8 if draft_scales is None else draft_scales)

    @classmethod
    def from_single_file(
        cls,
        transformer: str | Path,
        vae: str | Path,
        *,
        refiner: str | Path | None = None,
        draft_scales: int | None = None,
        id2label: dict[int, str] | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
    ) -> VARPipeline:
        """A pipeline from original checkpoints: `var_d16.pth` and `vae_ch160v4096z32.pth`, or of CoDe `drafter_8.pth`
        and as refiner `refiner_8.pth`.

        dtype, or by its old name torch_dtype: that of the files if None. Raises ValueError that names what does not
        fit.
        """
        wanted = chosen_dtype(dtype, torch_dtype)
        model = VARTransformer2DModel.from_single_file(transformer, dtype=wanted)
        second = None if refiner is None else VARTransformer2DModel.from_single_file(refiner, dtype=wanted)
        patch_nums = model.config.patch_nums
        vq = VQModel.from_single_file(vae, dtype=wanted, patch_nums=patch_nums)
        with put_together(transformer, refiner, vae):
            return cls(model, vq, VARScheduler(patch_nums), second, draft_scales, id2label)

    def enable_collaborative(self, refiner: VARTransformer2DModel, draft_scales: int = 8) -> None:
        """From now on `transformer` draws scales 0 to draft_scales - 1 and `refiner` the others.

        The authors sample with top_k=600 and temperature 1.1 on scales 0 to 6. Raises ValueError if the two do not
        share codes, classes and scales, or draft_scales is not from 1 to the number of scales less 1.
        """
        check_pair(self.transformer, refiner, draft_scales)
        self.register_modules(refiner=refiner)
        self.register_to_config(draft_scales=draft_scales)

    def disable_collaborative(self) -> None:
        """Back to `transformer` alone."""
        self.register_modules(refiner=None)
        self.register_to_config(draft_scales=None)

    @accepts_old_names
    def enable_scale_kv(
        self,
        budget: float = 0.1,
        *,
        refiner_wide_layers: WideLayers = None,
        refiner_missed: Any = None,
        **options: Any,
    ) -> None:
        """See ScaleKVMixin; refiner_wide_layers, refiner_missed: of the refiner, like `wide_layers` and `missed`."""
        of_refiner = {"wide_layers": refiner_wide_layers, "missed": refiner_missed}
        if self.refiner is not None:
            config = ScaleKVConfig(budget, **options | of_refiner)
            config.check_model(self.refiner.config.num_layers, self.refiner.config.num_attention_heads)
        super().enable_scale_kv(budget, **options)
        self._of_refiner = of_refiner

    def _scale_kv_for(self, model: VARTransformer2DModel) -> ScaleKVConfig | None:
        if self.scale_kv is None or model is not self.refiner or model is self.transformer:
            return self.scale_kv
        return replace(self.scale_kv, **self._of_refiner)

    def get_label_ids(self, labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """Class ids of names or ids, one or several. Raises ValueError for one that this model does not have."""
        if isinstance(labels, Tensor):
            labels = labels.flatten().tolist()
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            labels = [labels]
        known = {name: int(number) for number, name in (self.config.id2label or {}).items()}
        classes = self.transformer.config.num_classes
        for label in labels:
            if isinstance(label, str) and label not in known:
                some = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
                raise UserError(f"unknown class {label!r}; this model's classes are: {some or 'known by number only'}")
        ids = [known[label] if isinstance(label, str) else label for label in labels]
        for label in ids:
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label <= classes:
                raise UserError(
                    f"class label must be from 0 to {classes - 1}, or {classes} for no class, got {label!r}"
                )
        return [int(label) for label in ids]

    def _labels(self, class_labels: Any, count: int, draws: Draws) -> Tensor:
        """Class ids, each `count` times, or `count` ids drawn at random where there are none: int64 [batch]."""
        if class_labels is None:
            return draws.labels(count, self.transformer.config.num_classes)
        return torch.tensor(self.get_label_ids(class_labels)).repeat_interleave(count)

    def _decoder(
        self, labels: Tensor, key_dtype: torch.dtype | None, draws: Draws
    ) -> ScaleDecoder | CollaborativeDecoder:
        scales = self.scheduler.scales

        def new_decoder(model: VARTransformer2DModel) -> ScaleDecoder:
            def forward(inputs: Tensor | None, **options: Any) -> tuple[Tensor]:
                rows = len(labels) if inputs is None else len(inputs)  # fewer once guidance is off
                return model(inputs, labels[:rows], **options)

            return ScaleDecoder(forward, self._make_cache(scales, model, key_dtype), len(scales))

        if self.refiner is None:
            return new_decoder(self.transformer)
        models = self.transformer, self.refiner
        return CollaborativeDecoder(*models, self.config.draft_scales, new_decoder, draws.hand_over)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        guidance_scale: float = 4.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        temperature: float | Sequence[float] | None = None,
        more_smooth: bool = False,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        cache_key_dtype: str | torch.dtype | None = None,
        rng: str = "fast",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        class_labels: ids or names, one or several; None draws num_images_per_prompt classes at random.
        image, mask_image: in-painting: keep `image` where the mask is black, make new content where it is at least half
            white. Of PIL, numpy (channels last) or torch (channels first), or lists of these, in any size: uint8 up to
            255, uint16 up to 65535, bool, or floating-point numbers from 0 to 1.
        guidance_scale: VAR's own convention: logits are (1 + t) * conditional - t * unconditional with t growing
            linearly from 0 at the first scale to guidance_scale at the last, so one number; 0 means off and halves the
            work.
        top_k, top_p, temperature: the scheduler's where None; top_k and temperature also one per scale.
        more_smooth: Gumbel-softmax mixing of codes.
        generator: one for all pictures, or one per picture, which then do not depend on the rest of the batch.
        cache_key_dtype: dtype of cached keys or its name, that of the model if None; the original keeps torch.float32.
        rng: "fast" draws what is needed; "upstream" also draws and discards what the originals do, so that a seed gives
            the same pictures as theirs.
        output_type: "pil", "np", "pt" or "latent" (latents summed over all scales).
        callback_on_step_end: called as (pipeline, scale, scale, tensors) after each scale, with the tensors named, of
            "latents", "logits" (guided, before the filters), "indices" and "cache" (the KVCache of the model that
            is at work); may return new "latents".

        Raises ValueError for an argument that cannot be; the message says what can.
        """
        settings = plain_numbers(
            {"guidance_scale": guidance_scale, "top_k": top_k, "top_p": top_p, "temperature": temperature}
        )
        self.check_inputs(
            class_labels=class_labels,
            image=image,
            mask_image=mask_image,
            sampling=settings,
            more_smooth=more_smooth,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            rng=rng,
            output_type=output_type,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        key_dtype = None if cache_key_dtype is None else dtype_named(cache_key_dtype, "cache_key_dtype")
        guidance = settings.pop("guidance_scale")
        draws, scales = DRAWS[rng](generator), self.scheduler.scales
        labels = self._labels(class_labels, num_images_per_prompt, draws).to(self._execution_device)
        latents = self._blank(len(labels), scales[-1], self.vae.dtype)
        edit = self._in_painting(image, mask_image, latents)
        if guidance != 0:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        latents = self._generate(
            self._decoder(labels, key_dtype, draws),
            latents,
            scales,
            guidance={"guidance_scale": guidance or None},
            sampling={"quantizer": self.vae.quantize, "generator": draws, "more_smooth": bool(more_smooth), **settings},
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
            edit=edit,
        )
        return self._finish(latents, output_type, return_dict)

    def check_inputs(
        self,
        *,
        class_labels: Any,
        image: Any,
        mask_image: Any,
        sampling: dict[str, Any],
        more_smooth: Any,
        **call: Any,
    ) -> None:
        """Raise ValueError for what cannot be. sampling: guidance_scale, top_p, top_k and temperature.  call: see
        check_call."""
        ids = [None] if class_labels is None else self.get_label_ids(class_labels)
        if not ids:
            raise UserError("class_labels is empty: give at least one class")
        check_call(prompts=len(ids), known_tensors=self._callback_tensor_inputs, **call)
        check_sampling(
            sampling,
            len(self.scheduler),
            defaults=("top_k", "top_p", "temperature"),
            per_scale=("top_k", "temperature"),
        )
        check_flag("more_smooth", more_smooth)
        if call["rng"] == "upstream" and call["generator"] is None:
            raise UserError("rng='upstream' repeats the draws of a seed: pass a generator")
        if (image is None) != (mask_image is None):
            raise UserError("in-painting needs both image and mask_image")

    def _in_painting(
        self, image: PipelineImageInput | None, mask_image: PipelineImageInput | None, latents: Tensor
    ) -> Callable[[Tensor, int], Tensor] | None:
        """What puts a picture into the latents [batch, channels, side, side] of a scale where its mask is black."""
        if image is None:
            return None
        side = latents.shape[-1]
        pixels = side * self.vae.downscale
        picture = self.image_processor.preprocess(pictures(image, "image"), height=pixels, width=pixels)
        as_mask = VaeImageProcessor(do_normalize=False, do_convert_grayscale=True, resample="nearest")
        mask = as_mask.preprocess(masks(mask_image, "mask_image"), height=pixels, width=pixels)
        for name, tensor in (("image", picture), ("mask_image", mask)):
            if len(tensor) not in (1, len(latents)):
                raise UserError(f"{name} must hold 1 or {len(latents)} pictures, got {len(tensor)}")
        indices = self.vae.encode(picture.to(latents.device, self.vae.dtype), self.scheduler.patch_nums)
        kept = self.vae.quantize.latents_by_scale(indices, self.scheduler.patch_nums)
        hole = torch.nn.functional.interpolate(mask, size=(side, side), mode="nearest").to(kept[0])
        return lambda drawn, scale: kept[scale].lerp(drawn, hole)


def _check_parts(transformer: VARTransformer2DModel, vae: VQModel, scheduler: VARScheduler) -> None:
    """Raise ValueError if the parts do not speak of the same codes and scales."""
    for ours, theirs in (("vocab_size", "num_vq_embeddings"), ("in_channels", "latent_channels")):
        if transformer.config[ours] != vae.config[theirs]:
            raise UserError(
                f"transformer and vae must agree: {ours} is {transformer.config[ours]}, "
                f"{theirs} is {vae.config[theirs]}"
            )
    if tuple(transformer.config.patch_nums) != tuple(scheduler.config.patch_nums):
        raise UserError(
            f"transformer and scheduler must have the same patch_nums, got {transformer.config.patch_nums} "
            f"and {scheduler.config.patch_nums}"
        )
