"""Rows of image models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.core.grid import LatentGrid
from draftdiff.video.layouts.grids import (
    batch_alike,
    in_a_row,
    patched,
    picture,
    rasters,
    shifted,
    text_before,
)
from draftdiff.video.layouts.layout import Arguments, Layout, Places
from draftdiff.video.layouts.video import JOINT_AND_SINGLE, SELF


def _flux_places(arguments: Arguments) -> Places:
    """The new image and behind it references (Kontext, FLUX.2), which the first id counts."""
    return rasters(batch_alike(arguments["img_ids"])[:, :3])


def _flux(model: Any, arguments: Arguments) -> LatentGrid | None:
    places = _flux_places(arguments)
    return places[0][1] if places and places[0][0] == 0 else None


def _flux_others(model: Any, arguments: Arguments) -> Places:
    return shifted(_flux_places(arguments)[1:], text_before(model, arguments))


def _flux2(model: Any, arguments: Arguments) -> LatentGrid | None:
    # The step that fills the cache of references lets them attend to themselves alone.
    return None if arguments["kv_cache_mode"] == "extract" else _flux(model, arguments)


def _flux2_lead(model: Any, arguments: Arguments) -> int:
    """Text and, where FLUX.2 klein brings the keys of cached references without their queries, those."""
    cache = arguments["kv_cache"]
    return text_before(model, arguments) + (0 if cache is None else cache.num_ref_tokens)


def _flux3_others(model: Any, arguments: Arguments) -> Places:
    ids = arguments["image_cond_ids"]
    before = text_before(model, arguments) + arguments["hidden_states"].shape[1]
    return [] if ids is None else shifted(rasters(ids[:, :3]), before)


def _chroma_keys(model: Any, arguments: Arguments) -> Tensor | None:
    mask = arguments["attention_mask"]
    return mask if mask is not None and mask.dtype == torch.bool else None


def _chroma_mask(model: Any, arguments: Arguments) -> Tensor | None:
    # Its pipeline's is of numbers, which attention adds: padding weighs less, and is not left out.
    mask = arguments["attention_mask"]
    return None if mask is None or mask.dtype == torch.bool else mask[:, None] * mask[:, :, None]


def _qwen_grids(arguments: Arguments) -> list[LatentGrid]:
    """The new image, and behind it images to edit and other layers."""
    shapes = arguments["img_shapes"][0]
    return [LatentGrid.of(shape) for shape in (shapes if isinstance(shapes, list) else [shapes])]


def _qwen(model: Any, arguments: Arguments) -> LatentGrid | None:
    return _qwen_grids(arguments)[0]


def _qwen_others(model: Any, arguments: Arguments) -> Places:
    return in_a_row(text_before(model, arguments), _qwen_grids(arguments))[1:]


def _qwen21(model: Any, arguments: Arguments) -> LatentGrid | None:
    # Without the cache, and while it is filled, text and images to edit are attended causally.
    return _qwen_grids(arguments)[-1] if arguments["kv_cache_mode"] == "cached" else None


def _qwen21_others(model: Any, arguments: Arguments) -> Places:
    """Images to edit, each where its first token stands: a slot of the text's mask is for four tokens."""
    slots = arguments["img_mask"][0].cpu()
    places = torch.repeat_interleave(slots, torch.where(slots, 4, 1)).nonzero()[:, 0]
    grids = _qwen_grids(arguments)
    return [(int(places[at]), grid) for at, grid in in_a_row(0, grids)[:-1]]


def _krea(model: Any, arguments: Arguments) -> LatentGrid | None:
    places = rasters(arguments["position_ids"][text_before(model, arguments) :])
    return places[0][1] if len(places) == 1 else None


def _z_image(model: Any, arguments: Arguments) -> LatentGrid | None:
    # With images to edit (omni), and for images of several sizes, each item has its tokens elsewhere.
    latents = arguments["x"]
    if any(isinstance(x, list) or x.shape != latents[0].shape for x in latents):
        return None
    frames, height, width = latents[0].shape[1:]
    size = arguments["patch_size"] or 2
    return LatentGrid(frames // (arguments["f_patch_size"] or 1), height // size, width // size)


def _lumina2(model: Any, arguments: Arguments) -> LatentGrid | None:
    # The image stands right behind each item's own text.
    lengths = arguments["encoder_attention_mask"].sum(1)
    return picture(model, arguments) if bool((lengths == lengths[0]).all()) else None


def _all_of_picture(model: Any, arguments: Arguments) -> Tensor:
    # Its mask over all pairs of tokens leaves none out: pictures of a batch are of one size.
    latents, grid = arguments["hidden_states"], picture(model, arguments)
    return torch.ones(len(latents), grid.tokens if grid else 0, dtype=torch.bool, device=latents.device)


def _first_shape(model: Any, arguments: Arguments) -> LatentGrid | None:
    shapes = arguments["img_shapes"]
    while isinstance(shapes, list):
        shapes = shapes[0]
    return LatentGrid.of(shapes)


_IDEOGRAM_IMAGE = 2  # in `indicator`, as its checkpoints count


def _ideogram(model: Any, arguments: Arguments) -> LatentGrid | None:
    """Of the image that each sequence ends with, behind padding and text, if it is in one segment."""
    is_image = (arguments["indicator"] == _IDEOGRAM_IMAGE).cpu()
    tokens = int(is_image[0].sum())
    last = slice(is_image.shape[1] - tokens, None)
    segments = arguments["segment_ids"][:, last].cpu()
    is_last = bool((is_image.sum(1) == tokens).all() & is_image[:, last].all() & (segments == segments[:, :1]).all())
    places = rasters(arguments["position_ids"][0, last]) if is_last else []
    return places[0][1] if len(places) == 1 else None


def _ideogram_keys(model: Any, arguments: Arguments) -> Tensor:
    """The image's segment. Padding is one of its own, which nothing reads."""
    segments = arguments["segment_ids"]
    return segments == segments[:, -1:]


def _prx_keys(model: Any, arguments: Arguments) -> Tensor | None:
    # Earlier releases of diffusers repeat the mask for each query.
    text, grid = arguments["attention_mask"], picture(model, arguments)
    return None if text is None or grid is None else F.pad(text.bool(), (0, grid.tokens), value=True)


def _joy_items(model: Any, arguments: Arguments) -> tuple[LatentGrid, int]:
    """Grid of one item and the number of items: the new image, which the model puts first, and those to edit."""
    latents = arguments["hidden_states"]
    is_several = latents.ndim == 6
    return patched(model, latents, (3, 4, 5) if is_several else (2, 3, 4)), latents.shape[1] if is_several else 1


def _joy(model: Any, arguments: Arguments) -> LatentGrid | None:
    return _joy_items(model, arguments)[0]


def _joy_others(model: Any, arguments: Arguments) -> Places:
    grid, items = _joy_items(model, arguments)
    return in_a_row(0, [grid] * items)[1:]


def _joy_plus(model: Any, arguments: Arguments) -> LatentGrid | None:
    shapes = arguments["shape_list"]
    return LatentGrid.of(shapes[0][0]) if all(item == shapes[0] for item in shapes) else None


def _joy_plus_others(model: Any, arguments: Arguments) -> Places:
    return in_a_row(0, [LatentGrid.of(shape) for shape in arguments["shape_list"][0]])[1:]


def _fibo2(model: Any, arguments: Arguments) -> LatentGrid | None:
    # For prompts of different lengths the model may put the text behind the image, to pad it.
    mask = arguments["encoder_attention_mask"]
    lengths = None if mask is None else mask.sum(1)
    return picture(model, arguments) if lengths is None or bool((lengths == lengths[0]).all()) else None


def _fibo2_lead(model: Any, arguments: Arguments) -> int:
    """The most that a text may become; `Layout.lead` says what becomes of less."""
    return model.config.max_num_gist_tokens


def _fibo2_others(model: Any, arguments: Arguments) -> Places:
    images, size = [arguments["hidden_states"], *(arguments["context_latents"] or [])], model.config.patch_size
    grids = [LatentGrid(1, x.shape[2] // size, x.shape[3] // size) for x in images]
    return in_a_row(_fibo2_lead(model, arguments), grids)[1:]


def _glm(model: Any, arguments: Arguments) -> LatentGrid | None:
    # Images to edit pass through once, to fill the cache, before the first step.
    caches = arguments["kv_caches"]
    return None if caches is not None and caches[0].mode == "write" else picture(model, arguments)


def _of_ids(family: str, note: str = "") -> Layout:
    """Models that are called as FLUX.1 is."""
    return Layout(family, JOINT_AND_SINGLE, _flux, "around", lead=text_before, others=_flux_others, note=note)


_ATTN = r"transformer_blocks\.\d+\.attn"
_REFERENCES = "references are grids of their own"

IMAGE: dict[str, Layout] = {
    "FluxTransformer2DModel": _of_ids("FLUX.1", note=f"Kontext too: {_REFERENCES}"),
    "Flux2Transformer2DModel": Layout(
        "FLUX.2",
        JOINT_AND_SINGLE,
        _flux2,
        "around",
        lead=_flux2_lead,
        others=_flux_others,
        queries="ends",
        note=f"{_REFERENCES}, exact where they are cached (klein-KV; its first step is dense)",
    ),
    # Blocks for the references alone, or the text, are dense.
    "Flux3Transformer2DModel": Layout(
        "FLUX.3",
        r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn",
        _flux,
        "around",
        lead=text_before,
        others=_flux3_others,
        note=_REFERENCES,
    ),
    "QwenImageTransformer2DModel": Layout(
        "Qwen-Image",
        _ATTN,
        _qwen,
        "around",
        lead=text_before,
        others=_qwen_others,
        note="editing and layers too: images to edit and other layers are grids of their own",
    ),
    "QwenImage21Transformer2DModel": Layout(
        "Qwen-Image 2.1",
        _ATTN,
        _qwen21,
        "first",
        others=_qwen21_others,
        queries="last",
        note="dense without the cache of text and images to edit, and in the step that fills it",
    ),
    "Krea2Transformer2DModel": Layout("Krea 2", _ATTN, _krea, "first"),
    "ZImageTransformer2DModel": Layout(
        "Z-Image",
        r"(layers|noise_refiner)\.\d+\.attention",
        _z_image,
        "last",
        inputs=("x", "t"),
        note="dense with images to edit (omni)",
    ),
    "LongCatImageTransformer2DModel": _of_ids("LongCat-Image"),
    "OvisImageTransformer2DModel": _of_ids("Ovis-Image"),
    "BriaTransformer2DModel": _of_ids("Bria"),
    "BriaFiboTransformer2DModel": _of_ids("Bria Fibo"),
    "BriaFibo2Transformer2DModel": Layout(
        "Bria Fibo 2",
        r"(layers|noise_refiner)\.\d+\.attention",
        _fibo2,
        "around",
        lead=_fibo2_lead,
        others=_fibo2_others,
        note="dense for a batch of prompts of different lengths",
    ),
    "ChromaTransformer2DModel": Layout(
        "Chroma",
        JOINT_AND_SINGLE,
        _flux,
        "around",
        lead=text_before,
        others=_flux_others,
        keys=_chroma_keys,
        mask=_chroma_mask,
        note="the mask of its pipeline, whose numbers are added to the scores, is honoured",
    ),
    "CogView4Transformer2DModel": Layout("CogView4", SELF, picture, "first", "sdpa"),
    "CogView3PlusTransformer2DModel": Layout("CogView3+", SELF, picture, "first", "sdpa"),
    "GlmImageTransformer2DModel": Layout(
        "GLM-Image", SELF, _glm, "first", queries="last", note="cached images to edit are attended exactly"
    ),
    "HunyuanImageTransformer2DModel": Layout("HunyuanImage 2.1", JOINT_AND_SINGLE, picture, "last"),
    "SD3Transformer2DModel": Layout(
        "Stable Diffusion 3 / 3.5", r"transformer_blocks\.\d+\.attn2?", picture, "last", "sdpa"
    ),
    "HiDreamImageTransformer2DModel": Layout(
        "HiDream-I1",
        r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        picture,
        "last",
        "sdpa",
        inputs=("hidden_states", "timesteps"),
    ),
    "NucleusMoEImageTransformer2DModel": Layout("Nucleus-Image", _ATTN, _first_shape, "last", queries="first"),
    "PRXTransformer2DModel": Layout("PRX", r"blocks\.\d+\.attention", picture, "first", keys=_prx_keys, queries="last"),
    "Ideogram4Transformer2DModel": Layout(
        "Ideogram 4", r"layers\.\d+\.attention", _ideogram, "first", keys=_ideogram_keys
    ),
    "Lumina2Transformer2DModel": Layout(
        "Lumina 2",
        r"(layers|noise_refiner)\.\d+\.attn",
        _lumina2,
        "first",
        "sdpa",
        note="dense for a batch of prompts of different lengths",
    ),
    "LuminaNextDiT2DModel": Layout("Lumina-Next", r"layers\.\d+\.attn1", picture, route="sdpa", keys=_all_of_picture),
    "PixArtTransformer2DModel": Layout("PixArt", SELF, picture, route="sdpa"),
    "HunyuanDiT2DModel": Layout("Hunyuan-DiT", r"blocks\.\d+\.attn1", picture, route="sdpa"),
    "AuraFlowTransformer2DModel": Layout(
        "AuraFlow", r"(joint|single)_transformer_blocks\.\d+\.attn", picture, "first", "sdpa"
    ),
    "ErnieImageTransformer2DModel": Layout("ERNIE-Image", r"layers\.\d+\.self_attention", picture, "last"),
    "JoyImageEditTransformer3DModel": Layout(
        "JoyImage-Edit", r"double_blocks\.\d+\.attn", _joy, "last", others=_joy_others, note=_REFERENCES
    ),
    "JoyImageEditPlusTransformer3DModel": Layout(
        "JoyImage-Edit Plus",
        r"double_blocks\.\d+\.attn",
        _joy_plus,
        "last",
        others=_joy_plus_others,
        note=f"{_REFERENCES}; dense for a batch with different ones",
    ),
}
