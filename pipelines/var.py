"""Class-conditional next-scale generation as a diffusers pipeline (VAR, arXiv 2404.02905), alone or with CoDe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Generator, Tensor

from draftdiff.pipelines.hub import local_folder
from draftdiff.pipelines.inputs import check_choices, check_count, check_generators, check_sampling
from draftdiff.pipelines.scale_kv import ScaleKVMixin
from draftdiff.var.cache import KVCache
from draftdiff.var.collaborative import CollaborativeDecoder, check_pair
from draftdiff.var.decoding import Decoder, ScaleDecoder
from draftdiff.var.scale_kv import Drafters, ScaleKVConfig
from draftdiff.var.scheduler_var import VARScheduler, draw_labels
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel


class VARPipeline(ScaleKVMixin, DiffusionPipeline):
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VARPipeline:
        """Load a saved pipeline: a folder, or a repository of the hub, which is downloaded first."""
        return super().from_pretrained(local_folder(pretrained_model_name_or_path, kwargs), **kwargs)

    @classmethod
    def from_single_file(
        cls,
        transformer: str | Path,
        vae: str | Path,
        *,
        refiner: str | Path | None = None,
        draft_scales: int | None = None,
        id2label: dict[int, str] | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> VARPipeline:
        """A pipeline from original checkpoints: `var_d16.pth` and `vae_ch160v4096z32.pth`, or of CoDe `drafter_8.pth`
        and as refiner `refiner_8.pth`. Raises ValueError that names what does not fit."""
        model = VARTransformer2DModel.from_single_file(transformer, torch_dtype=torch_dtype)
        second = None if refiner is None else VARTransformer2DModel.from_single_file(refiner, torch_dtype=torch_dtype)
        patch_nums = model.config.patch_nums
        vq = VQModel.from_single_file(vae, torch_dtype=torch_dtype, patch_nums=patch_nums)
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

    def enable_scale_kv(self, budget: float = 0.1, *, refiner_drafters: Drafters = None, **options: Any) -> None:
        """See ScaleKVMixin; refiner_drafters: the layers of the refiner that look widely, like `drafters`."""
        if self.refiner is not None:
            ScaleKVConfig(budget, refiner_drafters).check_drafters(self.refiner.config.num_layers)
        super().enable_scale_kv(budget, **options)
        self._refiner_drafters = refiner_drafters

    def _scale_kv_for(self, model: VARTransformer2DModel) -> ScaleKVConfig | None:
        if self.scale_kv is None or model is not self.refiner or model is self.transformer:
            return self.scale_kv
        return replace(self.scale_kv, drafters=self._refiner_drafters)

    def get_label_ids(self, labels: str | Sequence[str]) -> list[int]:
        """Class ids of class names. Raises ValueError for a name that is not in id2label."""
        known = {name: int(number) for number, name in (self.config.id2label or {}).items()}
        names = [labels] if isinstance(labels, str) else labels
        for name in names:
            if name not in known:
                some = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
                raise ValueError(f"unknown class {name!r}; this model's classes are: {some or 'known by number only'}")
        return [known[name] for name in names]

    def _class_labels(self, labels: Any, count: int, generator: Any) -> Tensor:
        """int64 [batch]."""
        classes = self.transformer.config.num_classes
        if labels is None:
            return draw_labels(count, classes, generator)
        if isinstance(labels, Tensor):
            labels = labels.flatten().tolist()
        if isinstance(labels, (int, np.integer, str)):
            labels = [labels]
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in labels]
        for label in ids:
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label <= classes:
                raise ValueError(
                    f"class label must be from 0 to {classes - 1}, or {classes} for no class, got {label!r}"
                )
        if not ids:
            raise ValueError("class_labels is empty: give at least one class")
        return torch.tensor(ids).repeat_interleave(count)

    def _decoder(self, key_dtype: torch.dtype | None) -> Decoder:
        def new_cache(model: VARTransformer2DModel) -> KVCache:
            scales = [(side, side) for side in model.config.patch_nums]
            return self._make_cache(scales, model, key_dtype)

        if self.refiner is None:
            return ScaleDecoder(self.transformer, new_cache)
        return CollaborativeDecoder(self.transformer, self.refiner, self.config.draft_scales, new_cache)

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
        cache_key_dtype: torch.dtype | None = None,
        rng: str = "fast",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        class_labels: ids or names, one or several; None draws num_images_per_prompt classes at random.
        image, mask_image: in-painting: keep `image` where the mask is black, make new content where it is white.
        guidance_scale: VAR's own convention: logits are (1 + t) * conditional - t * unconditional with t growing
            linearly from 0 at the first scale to guidance_scale at the last; 0 means off and halves the work.
        top_k, top_p, temperature: the scheduler's where None; top_k and temperature also one per scale.
        more_smooth: Gumbel-softmax mixing of codes.
        generator: one for all pictures, or one per picture, which then do not depend on the rest of the batch.
        cache_key_dtype: dtype of cached keys, that of the model if None; torch.float32 is what the original keeps.
        rng: "fast" draws what is needed; "upstream" also draws and discards what the originals do, so that a seed gives
            the same pictures as theirs.
        output_type: "pil", "np", "pt" or "latent" (latents summed over all scales).
        callback_on_step_end: called as (pipeline, scale, scale, tensors) after each scale, with the tensors named, of
            "latents", "logits" (guided, before the filters), "indices" and "cache" (the KVCache of the model that
            is at work); may return new "latents".

        Raises ValueError for an argument that cannot be; the message says what can.
        """
        labels = self.check_inputs(
            class_labels, image, mask_image, top_k, top_p, temperature, num_images_per_prompt, generator, rng,
            output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        device, dtype = self._execution_device, self.transformer.dtype
        sources = [generator] if isinstance(generator, Generator) else list(generator or ())
        start = [source.get_state() for source in sources]
        if labels is None:
            labels = self._class_labels(None, num_images_per_prompt, generator)
        labels = labels.to(device)
        batch, scheduler, quantizer = len(labels), self.scheduler, self.vae.quantize
        guided = guidance_scale != 0
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        kept, hole = self._encode_picture(image, mask_image, batch, device)

        decoder = self._decoder(cache_key_dtype)
        side = scheduler.patch_nums[-1]
        latents = torch.zeros(batch, self.vae.config.latent_channels, side, side, device=device, dtype=self.vae.dtype)
        with self.progress_bar(total=len(scheduler)) as bar:
            for scale in range(len(scheduler)):
                inputs = scheduler.scale_model_input(latents, scale).to(dtype) if scale else None
                if guided and inputs is not None:
                    inputs = inputs.repeat(2, 1, 1)
                logits = decoder.logits(scale, inputs, labels)
                logits = scheduler.guide(logits, scale, guidance_scale) if guided else logits.float()
                if rng == "upstream" and self.refiner is not None and scale == self.config.draft_scales:
                    # The original's refiner starts from the seed again and draws the drafted scales once more.
                    for source, state in zip(sources, start):
                        source.set_state(state)
                    if class_labels is None:
                        self._class_labels(None, num_images_per_prompt, generator)
                    scheduler.burn(scale, batch, logits.shape[-1], generator, logits)
                step = scheduler.step(
                    logits,
                    scale,
                    latents,
                    quantizer,
                    generator=generator,
                    top_k=top_k,
                    top_p=top_p,
                    temperature=temperature,
                    more_smooth=more_smooth,
                    burn=rng == "upstream",
                )
                latents = step.latents
                if kept is not None and hole is not None:
                    latents = kept[scale].lerp(latents, hole)
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "logits": logits, "indices": step.indices, "cache": decoder.cache}
                    named = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, scale, scale, named) or {}).get("latents", latents)
                bar.update()
        del decoder

        pictures: Any = latents
        if output_type != "latent":
            sample = self.vae.decode(latents, return_dict=False)[0]
            pictures = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def check_inputs(
        self,
        class_labels: Any,
        image: Any,
        mask_image: Any,
        top_k: Any,
        top_p: float | None,
        temperature: Any,
        num_images_per_prompt: int,
        generator: Any,
        rng: str,
        output_type: str,
        callback_tensors: Sequence[str],
    ) -> Tensor | None:
        """Raise ValueError for what cannot be; returns the class labels int64 [batch], None if they are to be drawn."""
        check_count(num_images_per_prompt)
        check_choices(rng, output_type, callback_tensors, self._callback_tensor_inputs)
        check_sampling(len(self.scheduler), top_p, top_k=top_k, temperature=temperature)
        if rng == "upstream" and generator is None:
            raise ValueError("rng='upstream' repeats the draws of a seed: pass a generator")
        if (image is None) != (mask_image is None):
            raise ValueError("in-painting needs both image and mask_image")
        labels = None
        if class_labels is not None:
            labels = self._class_labels(class_labels, num_images_per_prompt, generator)
        check_generators(generator, num_images_per_prompt if labels is None else len(labels))
        return labels

    def _encode_picture(
        self, image: PipelineImageInput | None, mask_image: PipelineImageInput | None, batch: int, device: torch.device
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """Latents of the picture after each scale, and 1 where it is to be replaced, [batch or 1, 1, side, side]."""
        if image is None:
            return None, None
        side = self.scheduler.patch_nums[-1]
        pixels = side * self.vae.downscale
        picture = self.image_processor.preprocess(image, height=pixels, width=pixels)
        masks = VaeImageProcessor(do_normalize=False, do_convert_grayscale=True, resample="nearest")
        mask = masks.preprocess(mask_image, height=pixels, width=pixels)
        for name, tensor in (("image", picture), ("mask_image", mask)):
            if len(tensor) not in (1, batch):
                raise ValueError(f"{name} must hold 1 or {batch} pictures, got {len(tensor)}")
        indices = self.vae.encode(picture.to(device, self.vae.dtype), self.scheduler.patch_nums)
        kept = self.vae.quantize.latents_by_scale(indices, self.scheduler.patch_nums)
        hole = torch.nn.functional.interpolate(mask, size=(side, side), mode="nearest").round()
        return kept, hole.to(device, kept[0].dtype)


def _check_parts(transformer: VARTransformer2DModel, vae: VQModel, scheduler: VARScheduler) -> None:
    """Raise ValueError if the parts do not speak of the same codes and scales."""
    for ours, theirs in (("vocab_size", "num_vq_embeddings"), ("in_channels", "latent_channels")):
        if transformer.config[ours] != vae.config[theirs]:
            raise ValueError(
                f"transformer and vae must agree: {ours} is {transformer.config[ours]}, "
                f"{theirs} is {vae.config[theirs]}"
            )
    if tuple(transformer.config.patch_nums) != tuple(scheduler.config.patch_nums):
        raise ValueError(
            f"transformer and scheduler must have the same patch_nums, got {transformer.config.patch_nums} "
            f"and {scheduler.config.patch_nums}"
        )
