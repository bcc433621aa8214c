"""The released sizes of VAR and Infinity, small versions of them, and pipelines of either with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftdiff.models.image import ImageModel
from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.scheduler_infinity import InfinityScheduler
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import PATCH_NUMS_256, PATCH_NUMS_512, VQModel

PROMPT_TOKENS = 32
Size = Mapping[str, Any]


@dataclass(frozen=True)
class BenchModel:
    """full, small: arguments of the transformer, and "size" of Infinity's pictures or "refiner" of VAR's pair.
    small_batches: pictures at once that a CPU has time for."""

    full: Size
    small: Size
    small_batches: tuple[int, ...] = (1, 4)


class RandomModel(ImageModel):
    """A model with random weights, whose pictures are its latents: the decoder is left out."""

    def latents(self, subjects: Any, seed: int, **call: Any) -> Tensor:
        """What it makes for class labels or embeddings of prompts, from one seed on the device."""
        given = {"class_labels" if self.by_class else "prompt_embeds": subjects}
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.pipeline(**given, **call, generator=generator, output_type="latent").images

    def pictures(self, subjects: Any, seed: int, **call: Any) -> np.ndarray:
        return self.latents(subjects, seed, **call).float().cpu().numpy()


def _var(depth: int, pair: bool = True, **config: Any) -> BenchModel:
    """depth: layers and heads; its refiner is a model of depth 16."""

    def size(layers: int, heads: int, refiner: tuple[int, int], vocabulary: int) -> Size:
        shared = {"vocab_size": vocabulary, "patch_nums": config.get("patch_nums", PATCH_NUMS_256)}
        second = {"num_layers": refiner[0], "num_attention_heads": refiner[1], **shared}
        first = {"num_layers": layers, "num_attention_heads": heads, **shared, **config}
        return {**first, "refiner": second if pair else None}

    batches = (1,) if "patch_nums" in config else (1, 4)
    # A sixth of the width and of the codes: drawing one of 4096 would take a small model's time, but not a large one's.
    small = size(depth // 2, round(depth / 6), (8, 2), 640)
    return BenchModel(size(depth, depth, (16, 16), 4096), small, batches)


MODELS: dict[str, BenchModel] = {
    "var-d16": _var(16, pair=False),  # there is no smaller one to refine for it
    "var-d20": _var(20),
    "var-d24": _var(24),
    "var-d30": _var(30),
    "var-d36": _var(36, patch_nums=PATCH_NUMS_512, shared_adaln=True),
    "infinity-2b": BenchModel(
        {"num_layers": 32, "num_attention_heads": 16, "bits": 32, "size": "1M"},
        {"num_layers": 12, "num_attention_heads": 1, "bits": 32, "text_dim": 128, "size": "0.25M"},
    ),
    "infinity-8b": BenchModel(
        {"num_layers": 40, "num_attention_heads": 28, "bits": 56, "size": "1M"},
        {"num_layers": 14, "num_attention_heads": 2, "bits": 56, "text_dim": 128, "size": "0.25M"},
        (1,),
    ),
}


def build(model: BenchModel, size: Size, device: torch.device, dtype: torch.dtype) -> RandomModel:
    """A pipeline with random weights on the device. Its autoencoder is small: only its quantizer works here."""
    config = {name: value for name, value in size.items() if name not in ("size", "refiner")}
    with torch.device(device), _default(dtype):
        if "bits" in config:
            pipeline: Any = _infinity(config)
            refiner = None
        else:
            codes, patch_nums = config["vocab_size"], config["patch_nums"]
            transformer = VARTransformer2DModel(**config)
            vae = VQModel((32,) * 5, 1, num_vq_embeddings=codes, patch_nums=patch_nums)
            scheduler = VARScheduler(patch_nums, top_k=round(codes * 900 / 4096), top_p=0.95)
            pipeline = VARPipeline(transformer.eval(), vae.eval(), scheduler)
            refiner = VARTransformer2DModel(**size["refiner"]).eval() if size["refiner"] else None
    pipeline.set_progress_bar_config(disable=True)
    return RandomModel("random weights", pipeline, refiner)


def _infinity(config: dict[str, Any]) -> InfinityPipeline:
    patchify = config["bits"] == 56
    vae = AutoencoderBSQ((32,) * (4 if patchify else 5), 1, config["bits"] // (4 if patchify else 1))
    transformer = InfinityTransformer2DModel(**config)
    return InfinityPipeline(transformer.eval(), vae.eval(), InfinityScheduler(patchify))


def subjects(model: ImageModel, size: Size, batch: int) -> tuple[Any, dict[str, Any]]:
    """What to draw in so many pictures, and further arguments of the pipeline's call."""
    if model.by_class:
        return [i % 1000 for i in range(batch)], {}
    width = model.pipeline.transformer.config.text_dim
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, PROMPT_TOKENS, width, generator=generator).to(model.device), {"size": size["size"]}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
