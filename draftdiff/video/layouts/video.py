"""Rows of video models."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torch import Tensor

from draftdiff.core.grid import LatentGrid
from draftdiff.video.layouts.grids import (
    channels_first,
    frames_first,
    in_a_row,
    last_channels,
    last_of,
    patched,
    rasters,
    shifted,
)
from draftdiff.video.layouts.layout import Arguments, Layout, Places


def _skyreels_blocks(model: Any, arguments: Arguments) -> int:
    # Blocks of one frame are not masked.
    frames = model.config.num_frame_per_block
    return frames if frames > 1 else 0


def _far(model: Any, arguments: Arguments) -> LatentGrid | None:
    # Only a block that is made behind a cache sees all that is before it.
    flag = arguments["kv_cache_flag"]
    return None if flag is None or flag["is_cache_step"] else frames_first(model, arguments)


def _far_cached(model: Any, arguments: Arguments) -> Places:
    """Keys of earlier blocks: the oldest in coarser patches, then the latest as they were made."""
    blocks = arguments["chunk_partition"][: arguments["kv_cache_flag"]["num_cached_chunks"]]
    coarse = max(0, len(blocks) + 1 - model.config.full_chunk_limit)
    height, width = arguments["hidden_states"].shape[3:]
    parts = (blocks[:coarse], model.config.compressed_patch_size), (blocks[coarse:], model.config.patch_size)
    grids = [LatentGrid(sum(frames), height // size[1], width // size[2]) for frames, size in parts if frames]
    return in_a_row(0, grids)


def _far_lead(model: Any, arguments: Arguments) -> int:
    return sum(grid.tokens for _, grid in _far_cached(model, arguments))


def _animate2(model: Any, arguments: Arguments) -> LatentGrid | None:
    # Blocks are laid into a buffer of the whole video's frames and one more. Only behind the cache are they made.
    if arguments["kv_cache_mode"] != "cached":
        return None
    grid = LatentGrid(_animate2_own(model, arguments) + 1, *(size // 16 for size in arguments["origin_area"]))
    blocks = [patched(model, latents, (1, 2, 3)) for latents in arguments["hidden_states"]]
    is_raster = all(block.shape[1:] == grid.shape[1:] and block.frames <= grid.frames for block in blocks)
    return grid if is_raster else None


def _animate2_own(model: Any, arguments: Arguments) -> int:
    return arguments["origin_len"] // 4 + 1


def _by_patches_of_8(model: Any, arguments: Arguments) -> LatentGrid:
    # Tokens of 8 x 8 places of a frame stand side by side: as in the raster of a frame of 8 columns.
    grid = last_channels(model, arguments)
    return LatentGrid(grid.frames, grid.height * grid.width // 8, 8)


def _framepack(model: Any, arguments: Arguments) -> LatentGrid:
    # Clean frames (start image, latest history) stand right in front of the new ones, in the same resolution.
    grid, clean = channels_first(model, arguments), patched(model, arguments["latents_clean"])
    return LatentGrid(clean.frames + grid.frames, grid.height, grid.width)


def _framepack_lead(model: Any, arguments: Arguments) -> int:
    """Tokens of the older history, which is embedded in coarser patches and stands before the clean frames."""
    coarse = {2: arguments["latents_history_2x"], 4: arguments["latents_history_4x"]}
    grids = {factor: patched(model, latents) for factor, latents in coarse.items()}
    return sum(math.prod(math.ceil(size / factor) for size in grid.shape) for factor, grid in grids.items())


def _allegro(model: Any, arguments: Arguments) -> LatentGrid | None:
    # The mask is over video tokens; no pipeline passes one.
    return None if arguments["attention_mask"] is not None else channels_first(model, arguments)


def _told(model: Any, arguments: Arguments) -> LatentGrid | None:
    """Of tokens packed by the pipeline, which tells their grid unless it gives coordinates alone."""
    sizes = [arguments[name] for name in ("num_frames", "height", "width")]
    return None if None in sizes else LatentGrid.of(sizes)


def _ltx_places(arguments: Arguments) -> Places:
    # Frames that the video is conditioned on stand before it; they begin later than it does.
    return rasters(arguments["video_coords"][0].T, stacked=True)


def _ltx(model: Any, arguments: Arguments) -> LatentGrid | None:
    if arguments["video_coords"] is None:
        return _told(model, arguments)
    return last_of(_ltx_places(arguments), arguments["hidden_states"].shape[1])


def _ltx_others(model: Any, arguments: Arguments) -> Places:
    return [] if arguments["video_coords"] is None else _ltx_places(arguments)[:-1]


def _ltx2_mask(model: Any, arguments: Arguments) -> Tensor | None:
    # Strengths of IC-LoRA, as the model makes them numbers to add.
    strength = arguments["video_self_attention_mask"]
    return None if strength is None else (1 - strength.to(arguments["hidden_states"].dtype)) * -10_000.0


def _ltx2_others(model: Any, arguments: Arguments) -> Places:
    # References (IC-LoRA) and keyframes follow the video; a token's coordinates are where it starts and ends.
    coordinates, grid = arguments["video_coords"], _told(model, arguments)
    if coordinates is None or grid is None:
        return []
    return shifted(rasters(coordinates[0, :, grid.tokens :, 0].T, stacked=True), grid.tokens)


def _h3_places(arguments: Arguments) -> Places:
    """Keyframes or references, and the new video last: runs of rows that the indices of video tokens name."""
    positions, rows = arguments["position_ids"], arguments["video_indices"].cpu()
    edges = [0, *((rows[1:] != rows[:-1] + 1).nonzero()[:, 0] + 1).tolist(), len(rows)]
    places: Places = []
    for start, stop in pairwise(edges):
        at = int(rows[start])
        places += shifted(rasters(positions[at : at + stop - start], stacked=True), at)
    return places


def _h3(model: Any, arguments: Arguments) -> LatentGrid | None:
    return last_of(_h3_places(arguments), len(arguments["position_ids"]))


def _h3_lead(model: Any, arguments: Arguments) -> int:
    return _h3_places(arguments)[-1][0]


def _h3_others(model: Any, arguments: Arguments) -> Places:
    return _h3_places(arguments)[:-1]


def _cosmos3_places(arguments: Arguments) -> Places:
    """Each item of vision tokens, if they stand as one stretch."""
    rows = arguments["vision_sequence_indexes"]
    grids = [LatentGrid.of(shape) for shape in arguments["vision_token_shapes"]]
    in_order = sum(grid.tokens for grid in grids) == len(rows) == int(rows[-1]) - int(rows[0]) + 1
    return in_a_row(int(rows[0]), grids) if in_order else []


def _cosmos3(model: Any, arguments: Arguments) -> LatentGrid | None:
    places = _cosmos3_places(arguments)
    # The understanding pathway attends causally to itself, at lengths that may be those of a picture: never to us.
    return max((grid for _, grid in places), key=lambda grid: grid.tokens, default=None)


def _cosmos3_lead(model: Any, arguments: Arguments) -> int:
    grid = _cosmos3(model, arguments)
    return next(start for start, other in _cosmos3_places(arguments) if other == grid)


def _cosmos3_others(model: Any, arguments: Arguments) -> Places:
    lead = _cosmos3_lead(model, arguments)
    return [(start, grid) for start, grid in _cosmos3_places(arguments) if start != lead]


_WAN = r"blocks\.\d+\.attn1"
JOINT_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"
SELF = r"transformer_blocks\.\d+\.attn1"


def _wan(family: str, attention: str = _WAN, note: str = "") -> Layout:
    return Layout(family, attention, channels_first, note=note)


VIDEO: dict[str, Layout] = {
    "WanTransformer3DModel": _wan("Wan 2.1 / 2.2", note="text and image to video, Wan 2.2 14B and 5B"),
    "WanVACETransformer3DModel": _wan("Wan VACE", r"(vace_)?blocks\.\d+\.attn1", note="main and control blocks"),
    "WanAnimateTransformer3DModel": _wan("Wan 2.2 Animate", note="face adapters stay dense"),
    "WanAnimate2Transformer3DModel": Layout(
        "Wan Animate 2",
        r"blocks\.\d+\.self_attn",
        _animate2,
        "last",
        "flex",
        own_frames=_animate2_own,
        queries="first",
        note="each frame's own one of the reference is attended exactly; dense where the cache is filled",
    ),
    "ChronoEditTransformer3DModel": _wan("ChronoEdit"),
    "SkyReelsV2Transformer3DModel": Layout(
        "SkyReels-V2",
        r"blocks\.\d+\.attn1",
        channels_first,
        causal=_skyreels_blocks,
        note="blocks of frames that are causal (causal_block_size > 1) too, but not over ring processes",
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        "HunyuanVideo", JOINT_AND_SINGLE, channels_first, "last", note="text and image to video"
    ),
    "HunyuanVideoFramepackTransformer3DModel": Layout(
        "FramePack",
        JOINT_AND_SINGLE,
        _framepack,
        "around",
        lead=_framepack_lead,
        note="tokens of the coarse history are attended exactly",
    ),
    "HunyuanVideo15Transformer3DModel": Layout(
        "HunyuanVideo 1.5", r"transformer_blocks\.\d+\.attn", channels_first, "last", "own"
    ),
    "CogVideoXTransformer3DModel": Layout("CogVideoX 1.0 / 1.5", SELF, frames_first, "first", "sdpa"),
    "ConsisIDTransformer3DModel": Layout("ConsisID", SELF, frames_first, "first", "sdpa"),
    "LTXVideoTransformer3DModel": Layout(
        "LTX-Video",
        SELF,
        _ltx,
        "first",
        others=_ltx_others,
        one_stream=True,
        note="conditions of LTXConditionPipeline are grids of their own",
    ),
    "LTX2VideoTransformer3DModel": Layout(
        "LTX-2",
        SELF,
        _told,
        "last",
        others=_ltx2_others,
        mask=_ltx2_mask,
        one_stream=True,
        note="video only; references with an attention strength (IC-LoRA) keep it, and are attended exactly",
    ),
    "MochiTransformer3DModel": Layout("Mochi 1", SELF, channels_first, "last", "sdpa"),
    "AllegroTransformer3DModel": Layout("Allegro", SELF, _allegro, route="sdpa"),
    "Kandinsky5Transformer3DModel": Layout(
        "Kandinsky 5",
        r"visual_transformer_blocks\.\d+\.self_attention",
        last_channels,
        replaces=("sparse_params",),
        note="their own sparse attention (NABLA) is replaced in the forwards that ours is on in",
    ),
    # Cosmos calls the dispatcher without its processor's backend, so only the kernel underneath can be reached.
    "CosmosTransformer3DModel": Layout("Cosmos 1 / 2 / 2.5", SELF, channels_first, route="sdpa"),
    "Cosmos3OmniTransformer": Layout(
        "Cosmos 3",
        r"layers\.\d+\.self_attn",
        _cosmos3,
        "around",
        lead=_cosmos3_lead,
        others=_cosmos3_others,
        queries="last",
        inputs=("vision_tokens", "vision_timesteps"),
        note="the understanding pathway is dense; sound and actions are attended exactly",
    ),
    "EasyAnimateTransformer3DModel": Layout("EasyAnimate 5.1", SELF, channels_first, "first", "sdpa"),
    "MiniMaxH3Transformer3DModel": Layout(
        "MiniMax-H3",
        r"transformer_blocks\.\d+\.attn",
        _h3,
        "around",
        lead=_h3_lead,
        others=_h3_others,
        one_stream=True,
        note="text and audio are attended exactly; keyframes and references are grids of their own",
    ),
    "Kandinsky6Transformer3DModel": Layout(
        "Kandinsky 6", r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", last_channels
    ),
    "Kandinsky6SRTransformer3DModel": Layout(
        "Kandinsky 6 SR",
        r"visual_transformer_blocks\.\d+\.self_attention",
        _by_patches_of_8,
        route="flex",
        note="their own sparse attention (NABLA) is replaced in the forwards that ours is on in",
    ),
    "HeliosTransformer3DModel": Layout(
        "Helios", _WAN, channels_first, "first", one_stream=True, note="the history is attended exactly"
    ),
    "AnyFlowTransformer3DModel": Layout("AnyFlow", _WAN, frames_first),
    "AnyFlowFARTransformer3DModel": Layout(
        "AnyFlow FAR",
        _WAN,
        _far,
        "around",
        "flex",
        lead=_far_lead,
        others=_far_cached,
        queries="last",
        note="dense where the cache is filled",
    ),
    "MotifVideoTransformer3DModel": Layout("Motif-Video", JOINT_AND_SINGLE, channels_first, "last"),
}
