"""Where the video tokens are: one table row per transformer class of diffusers.

A row names the self-attentions that see the whole video, says how many video tokens a forward call brings and in which
grid they lie, and where the other tokens of the joint sequence stand. A call whose attention does not fit this picture
(a mask over video tokens, tokens in another order, a second image) gets no grid and stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError

Arguments = dict[str, Any]
GridFunction = Callable[[Any, Arguments], LatentGrid | None]


@dataclass(frozen=True)
class Layout:
    """How one transformer class lays out its video tokens.

    family: name of the model family for people.
    attention: regular expression; modules whose whole name matches are the video self-attentions.
    grid: (transformer, arguments of its forward by name) -> token grid, or None to leave the call dense.
    text: where the tokens outside the grid stand; "around" means on both sides.
    route: how the processor reaches its kernel. "dispatch": by `dispatch_attention_fn` with the processor's backend;
        "sdpa": by `torch.nn.functional.scaled_dot_product_attention`; "own": we replace the stock processor.
    lead: number of tokens in front of the grid, for text="around" only; a call that has fewer has none.
    others: further grids in the sequence, each with the position of its first token.
    keys: which tokens of the sequence may be read, bool [batch, tokens], if the model makes a mask over pairs of them.
    queries: in a call with more keys than queries, where the queries' tokens stand among those of the keys; "all" if
        the model makes none such.
    inputs: names of the forward's arguments that hold the latents, a tensor or a list of them, and the timestep.
    one_stream: the other tokens come in the video's own stream, so that processes which share a sequence (Ulysses) each
        bring a stretch of the whole; else each brings a stretch of the text and one of the video.
    note: what a user should know, such as calls that stay dense.
    """

    family: str
    attention: str
    grid: GridFunction
    text: Literal["none", "first", "last", "around"] = "none"
    route: Literal["dispatch", "sdpa", "own"] = "dispatch"
    lead: Callable[[Any, Arguments], int] | None = None
    others: Callable[[Any, Arguments], list[tuple[int, LatentGrid]]] | None = None
    keys: Callable[[Any, Arguments], Tensor | None] | None = None
    queries: Literal["all", "first", "last"] = "all"
    inputs: tuple[str, str] = ("hidden_states", "timestep")
    one_stream: bool = False
    note: str = ""


def layout_for(transformer: nn.Module) -> Layout:
    """The table row of a transformer, a subclass of it, or its `torch.compile` wrapper.

    Raises ValueError for a class that is not in the table.
    """
    return LAYOUTS[layout_name(transformer)]


def layout_name(transformer: nn.Module) -> str:
    """The supported class that a transformer is of. Raises ValueError as `layout_for` does."""
    model = getattr(transformer, "_orig_mod", transformer)
    for cls in type(model).__mro__:
        if cls.__name__ in LAYOUTS:
            return cls.__name__
    raise UserError(f"{type(model).__name__} is not supported; supported transformers: {', '.join(LAYOUTS)}")


def supported_models() -> list[tuple[str, str, str]]:
    """(family, class name, note) of every supported transformer, in table order."""
    return [(layout.family, name, layout.note) for name, layout in LAYOUTS.items()]


def _patched(model: Any, video: Tensor, axes: tuple[int, int, int] = (2, 3, 4)) -> LatentGrid:
    """Grid of a latent video after patching. axes: its frame, row and column dimensions."""
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (model.config.get("patch_size_t") or 1, patch, patch)
    return LatentGrid(*(video.shape[axis] // size for axis, size in zip(axes, patch)))


def _channels_first(model: Any, arguments: Arguments) -> LatentGrid:
    return _patched(model, arguments["hidden_states"])


def _frames_first(model: Any, arguments: Arguments) -> LatentGrid:
    return _patched(model, arguments["hidden_states"], axes=(1, 3, 4))


def _last_channels(model: Any, arguments: Arguments) -> LatentGrid:
    return _patched(model, arguments["hidden_states"], axes=(1, 2, 3))


def _skyreels(model: Any, arguments: Arguments) -> LatentGrid | None:
    # Blocks of frames attended causally come as a mask over all pairs of tokens.
    return None if model.config.num_frame_per_block > 1 else _channels_first(model, arguments)


def _framepack(model: Any, arguments: Arguments) -> LatentGrid:
    # Clean frames (start image, latest history) stand right in front of the new ones, in the same resolution.
    grid, clean = _channels_first(model, arguments), _patched(model, arguments["latents_clean"])
    return LatentGrid(clean.frames + grid.frames, grid.height, grid.width)


def _framepack_lead(model: Any, arguments: Arguments) -> int:
    """Tokens of the older history, which is embedded in coarser patches and stands before the clean frames."""
    coarse = {2: arguments["latents_history_2x"], 4: arguments["latents_history_4x"]}
    grids = {factor: _patched(model, latents) for factor, latents in coarse.items()}
    return sum(math.prod(math.ceil(size / factor) for size in grid.shape) for factor, grid in grids.items())


def _allegro(model: Any, arguments: Arguments) -> LatentGrid | None:
    # The mask is over video tokens; no pipeline passes one.
    return None if arguments["attention_mask"] is not None else _channels_first(model, arguments)


def _kandinsky(model: Any, arguments: Arguments) -> LatentGrid | None:
    # With its own sparse attention the model reorders tokens and passes a block mask.
    return None if arguments["sparse_params"] is not None else _last_channels(model, arguments)


def _packed(model: Any, arguments: Arguments) -> LatentGrid | None:
    """Tokens packed by the pipeline, which tells their grid unless it gives coordinates alone."""
    sizes = [arguments[name] for name in ("num_frames", "height", "width")]
    return None if None in sizes else LatentGrid.of(sizes)


def _ltx2(model: Any, arguments: Arguments) -> LatentGrid | None:
    # IC-LoRA may weigh pairs of tokens with a mask over all of them.
    return None if arguments.get("video_self_attention_mask") is not None else _packed(model, arguments)


def _raster(positions: Tensor) -> LatentGrid | None:
    """The grid of tokens at these positions (frame, row, column) [tokens, 3], None if they are not all of one in raster
    order."""
    start = positions[0]
    frame = int((positions[:, 0] == start[0]).sum())
    width = int((positions[:, :2] == start[:2]).all(-1).sum())
    if len(positions) % frame or frame % width:
        return None
    cube = positions.unflatten(0, (-1, frame // width, width))
    corner = (cube[:, :1, :1, 0], cube[:1, :, :1, 1], cube[:1, :1, :, 2])
    is_regular = all(bool((cube[..., axis] == along).all()) for axis, along in enumerate(corner))
    return LatentGrid(*cube.shape[:3]) if is_regular else None


def _flux(model: Any, arguments: Arguments) -> LatentGrid | None:
    if arguments.get("kv_cache") is not None:  # FLUX.2 klein may bring keys of references without their queries
        return None
    ids = arguments["img_ids"]
    rows = (ids[0] if ids.ndim == 3 else ids)[:, :3]
    # References (Kontext, FLUX.2) follow the new image and count in the first id.
    return _raster(rows[rows[:, 0] == rows[0, 0]])


def _qwen(model: Any, arguments: Arguments) -> LatentGrid | None:
    shapes = arguments["img_shapes"][0]
    # Images to edit and layers follow the new image.
    return LatentGrid.of(shapes[0] if isinstance(shapes, list) else shapes)


def _text_before(model: Any, arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _krea(model: Any, arguments: Arguments) -> LatentGrid | None:
    return _raster(arguments["position_ids"][_text_before(model, arguments) :])


def _minimax(model: Any, arguments: Arguments) -> LatentGrid | None:
    # The new video stands last, behind text, keyframes or references, and audio.
    before = [int(arguments[name].max()) + 1 for name in ("text_indices", "audio_indices") if len(arguments[name])]
    return _raster(arguments["position_ids"][max(before, default=0) :])


def _picture(model: Any, arguments: Arguments) -> LatentGrid | None:
    latents, patch = arguments["hidden_states"], model.config.patch_size
    if latents.ndim != 4:
        return None
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return LatentGrid(1, latents.shape[2] // rows, latents.shape[3] // columns)


_WAN = r"blocks\.\d+\.attn1"


def _wan(family: str, attention: str = _WAN, note: str = "") -> Layout:
    return Layout(family, attention, _channels_first, note=note)


_JOINT_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"
_SELF = r"transformer_blocks\.\d+\.attn1"

LAYOUTS: dict[str, Layout] = {
    "WanTransformer3DModel": _wan("Wan 2.1 / 2.2", note="text and image to video, Wan 2.2 14B and 5B"),
    "WanVACETransformer3DModel": _wan("Wan VACE", r"(vace_)?blocks\.\d+\.attn1", note="main and control blocks"),
    "WanAnimateTransformer3DModel": _wan("Wan 2.2 Animate", note="face adapters stay dense"),
    "ChronoEditTransformer3DModel": _wan("ChronoEdit"),
    "SkyReelsV2Transformer3DModel": Layout(
        "SkyReels-V2",
        r"blocks\.\d+\.attn1",
        _skyreels,
        note="dense while blocks of frames are causal (causal_block_size > 1)",
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        "HunyuanVideo", _JOINT_AND_SINGLE, _channels_first, "last", note="text and image to video"
    ),
    "HunyuanVideoFramepackTransformer3DModel": Layout(
        "FramePack",
        _JOINT_AND_SINGLE,
        _framepack,
        "around",
        lead=_framepack_lead,
        note="tokens of the coarse history are attended exactly",
    ),
    "HunyuanVideo15Transformer3DModel": Layout(
        "HunyuanVideo 1.5", r"transformer_blocks\.\d+\.attn", _channels_first, "last", "own"
    ),
    "CogVideoXTransformer3DModel": Layout("CogVideoX 1.0 / 1.5", _SELF, _frames_first, "first", "sdpa"),
    "LTXVideoTransformer3DModel": Layout(
        "LTX-Video", _SELF, _packed, note="dense in LTXConditionPipeline, which does not tell the grid"
    ),
    # Keyframes and references that a pipeline appends to the video tokens are attended exactly, like text.
    "LTX2VideoTransformer3DModel": Layout(
        "LTX-2",
        _SELF,
        _ltx2,
        "last",
        one_stream=True,
        note="video only; dense under an attention-strength mask (IC-LoRA)",
    ),
    "MochiTransformer3DModel": Layout("Mochi 1", _SELF, _channels_first, "last", "sdpa"),
    "AllegroTransformer3DModel": Layout("Allegro", _SELF, _allegro, route="sdpa"),
    "Kandinsky5Transformer3DModel": Layout(
        "Kandinsky 5",
        r"visual_transformer_blocks\.\d+\.self_attention",
        _kandinsky,
        note="models with their own sparse attention (NABLA) keep it",
    ),
    # Cosmos calls the dispatcher without its processor's backend, so only the kernel underneath can be reached.
    "CosmosTransformer3DModel": Layout("Cosmos 1 / 2 / 2.5", _SELF, _channels_first, route="sdpa"),
    "EasyAnimateTransformer3DModel": Layout("EasyAnimate 5.1", _SELF, _channels_first, "first", "sdpa"),
    "MiniMaxH3Transformer3DModel": Layout(
        "MiniMax-H3",
        r"transformer_blocks\.\d+\.attn",
        _minimax,
        "first",
        one_stream=True,
        note="text, audio, keyframes and references are attended exactly",
    ),
    "Kandinsky6Transformer3DModel": Layout(
        "Kandinsky 6", r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", _last_channels
    ),
    "HeliosTransformer3DModel": Layout(
        "Helios", _WAN, _channels_first, "first", one_stream=True, note="the history is attended exactly"
    ),
    "AnyFlowTransformer3DModel": Layout("AnyFlow", _WAN, _frames_first),
    "MotifVideoTransformer3DModel": Layout("Motif-Video", _JOINT_AND_SINGLE, _channels_first, "last"),
    # Images. References, images to edit and layers are attended exactly, like text.
    "FluxTransformer2DModel": Layout(
        "FLUX.1", _JOINT_AND_SINGLE, _flux, "around", lead=_text_before, note="Kontext too: references are exact"
    ),
    "Flux2Transformer2DModel": Layout(
        "FLUX.2", _JOINT_AND_SINGLE, _flux, "around", lead=_text_before, note="dense with cached references (klein-KV)"
    ),
    "QwenImageTransformer2DModel": Layout(
        "Qwen-Image",
        r"transformer_blocks\.\d+\.attn",
        _qwen,
        "around",
        lead=_text_before,
        note="editing and layers too: images to edit and other layers are exact",
    ),
    "Krea2Transformer2DModel": Layout("Krea 2", r"transformer_blocks\.\d+\.attn", _krea, "first"),
    "LongCatImageTransformer2DModel": Layout("LongCat-Image", _JOINT_AND_SINGLE, _flux, "around", lead=_text_before),
    "OvisImageTransformer2DModel": Layout("Ovis-Image", _JOINT_AND_SINGLE, _flux, "around", lead=_text_before),
    "BriaTransformer2DModel": Layout("Bria", _JOINT_AND_SINGLE, _flux, "around", lead=_text_before),
    "CogView4Transformer2DModel": Layout("CogView4", _SELF, _picture, "first", "sdpa"),
    "CogView3PlusTransformer2DModel": Layout("CogView3+", _SELF, _picture, "first", "sdpa"),
    "HunyuanImageTransformer2DModel": Layout("HunyuanImage 2.1", _JOINT_AND_SINGLE, _picture, "last"),
    "SD3Transformer2DModel": Layout(
        "Stable Diffusion 3 / 3.5", r"transformer_blocks\.\d+\.attn2?", _picture, "last", "sdpa"
    ),
}
