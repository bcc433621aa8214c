"""Where the video tokens of an attention call of ComfyUI's models stand.

A model may tell it (`grid_sizes`, `minimax_h3_layout` in its transformer_options); else it follows from the latent, the
patch size and the order in which the model's class puts its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from draftdiff.core.grid import LatentGrid
from draftdiff.integrations.call import Places

Arguments = Mapping[str, Any]


def find(model: Any, arguments: Arguments, options: Mapping[str, Any], tokens: int) -> Places | str | None:
    """Places of a call over so many tokens, None if it is not over the video, or why they cannot be told.

    model: ComfyUI's diffusion model.  arguments: of its forward, by name.  options: its transformer_options.
    """
    layout = options.get("minimax_h3_layout")
    if layout is not None:
        return _packed(layout, tokens)
    told = options.get("grid_sizes")
    order = next((_ORDERS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _ORDERS), None)
    if told is not None:
        grid = LatentGrid(*map(int, told))
        return None if tokens < grid.tokens else (order or _frames)(model, arguments, grid, tokens)
    if order is None:
        return f"{type(model).__name__} is not in the table of models and does not tell the grid of its tokens"
    latent = arguments["x"]
    grid = _patched(model, latent if isinstance(latent, Tensor) else latent[0])
    if (more := arguments.get("time_dim_concat")) is not None:
        grid = LatentGrid(grid.frames + _patched(model, more).frames, grid.height, grid.width)
    return None if tokens < grid.tokens else order(model, arguments, grid, tokens)


def _patched(model: Any, latent: Tensor) -> LatentGrid:
    """Grid of a latent [batch, channels, frames, height, width], or of a picture's without frames. Models pad it to
    whole patches."""
    patch = getattr(model, "patch_size", None) or model.patchifier.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    sizes = [math.ceil(size / step) for size, step in zip(latent.shape[-len(patch) :], patch)]
    return LatentGrid(*[1] * (3 - len(sizes)), *sizes)


def _packed(layout: Any, tokens: int) -> Places | str | None:
    """MiniMax-H3: text, conditions, references and audio, then the video. Keyframes have the video's frame size."""
    if tokens != layout.seq_len:
        return None
    _, frames, height, width, _ = layout.signature
    grid = LatentGrid(frames, height // 2, width // 2)
    area = grid.height * grid.width
    lead = next((start for start, _, kind in layout.segments if kind == "video"), None)
    if lead is None or lead + grid.tokens > tokens:
        return f"the video of MiniMax-H3's layout {layout.signature} is not where its segments say"
    stretches = [(start, stop - start) for start, stop, kind in layout.segments if kind == "cond"]
    others = [(start, LatentGrid(size // area, grid.height, grid.width)) for start, size in stretches if size >= area]
    return Places(grid, lead, tuple(others))


def _frames(model: Any, arguments: Arguments, grid: LatentGrid, tokens: int) -> Places:
    """Wan: whatever else stands in the sequence (a reference, poses, clips in context) has the video's frame size, or
    stands behind the video, but for the reference of `ref_conv`."""
    area = grid.height * grid.width
    if tokens % area == 0:
        return Places(LatentGrid(tokens // area, grid.height, grid.width))
    reference = arguments.get("reference_latent") if getattr(model, "ref_conv", None) is not None else None
    lead = 0
    if reference is not None:  # a picture, without frames
        lead = math.prod(math.ceil(size / step) for size, step in zip(reference.shape[-2:], model.patch_size[1:]))
    return Places(grid, min(lead, tokens - grid.tokens))


def _video_then_text(model: Any, arguments: Arguments, grid: LatentGrid, tokens: int) -> Places | str:
    """HunyuanVideo: [reference, video, text]."""
    if (reference := arguments.get("ref_latent")) is None:
        return Places(grid)
    first = _patched(model, reference)
    if first.tokens + grid.tokens > tokens:
        return f"{tokens} tokens are fewer than the video's {grid} and its reference's {first}"
    return Places(grid, first.tokens, ((0, first),))


def _text_then_picture(model: Any, arguments: Arguments, grid: LatentGrid, tokens: int) -> Places | str:
    """Flux: [text, picture, references]."""
    references = [_patched(model, latent) for latent in arguments.get("ref_latents") or ()]
    lead = tokens - grid.tokens - sum(reference.tokens for reference in references)
    if lead < 0:
        return f"{tokens} tokens are fewer than those of the picture {grid} and its references"
    others, at = [], lead + grid.tokens
    for reference in references:
        others.append((at, reference))
        at += reference.tokens
    return Places(grid, lead, tuple(others))


def _alone(model: Any, arguments: Arguments, grid: LatentGrid, tokens: int) -> Places | str | None:
    """LTX: the video alone, keyframes as further frames of its latent; audio has calls of its own."""
    return Places(grid) if tokens == grid.tokens else f"{tokens} tokens are not those of the video {grid}"


# By class in comfy/ldm. Subclasses (VACE, Animate, S2V of Wan; the audio model of LTX) are found by their base.
_ORDERS: dict[str, Callable[[Any, Arguments, LatentGrid, int], Places | str | None]] = {
    "WanModel": _frames,
    "HunyuanVideo": _video_then_text,
    "LTXVModel": _alone,
    "LTXBaseModel": _alone,
    "Flux": _text_then_picture,
}
