"""Tiny random instances of every supported transformer class of diffusers, with inputs for a given token grid.

`MODEL_CASES` is the list that model tests are parametrized over. Sizes are chosen to be awkward: odd grids, text
lengths that fill no tile, batch items whose text is padded differently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    QwenImageTransformer2DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor, nn

Grid = tuple[int, int, int]
Inputs = dict[str, Any]

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
ROPE_AXES = (8, 12, 12)
TEXT = 10
TEXT_PADDED = 7
TEXT_WIDTH = 16
CHANNELS = 4
# Wan's image-to-video cross-attention takes what exceeds 512 tokens for the image.
WAN_TEXT = 512


@dataclass(frozen=True)
class ModelCase:
    """One transformer in one mode.

    build: a seeded model in eval mode.  inputs: (model, token grid, batch) -> keyword arguments of its forward.
    pixels: (inputs, token grid, token as (frame, row, column)) -> view of the input values that token is made of.
    layers: number of video self-attentions.  text: tokens outside the grid in one attention call, for even and odd
    batch items.  per_item: the model attends once per batch item.  tolerance: what counts as equal.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Any, Grid, int], Inputs]
    pixels: Callable[[Inputs, Grid, Grid], Tensor]
    grid: Grid = (5, 6, 9)
    layers: int = 2
    text: tuple[int, int] = (0, 0)
    per_item: bool = False
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name


def bound_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of a forward call by name, defaults included."""
    bound = inspect.signature(type(model).forward).bind(model, **inputs)
    bound.apply_defaults()
    return dict(bound.arguments)


def output_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The denoised video of a forward call (Kandinsky 5 returns it bare, the others in a tuple)."""
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def lively_(model: nn.Module) -> nn.Module:
    """Re-draw weights so that attention matters: spread logits, no gate or output layer that starts at zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2] if "." in name else ""
        if owner in ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm"):
            if name.endswith("weight"):
                nn.init.uniform_(parameter, 0.8, 1.8)
        elif parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def tiny(model_class: type[nn.Module], **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.no_grad():
            return lively_(model_class(**config)).eval().requires_grad_(False)

    return build


def tiny_wan(layers: int, heads: int = 2, channels: int = 4) -> Callable[[], nn.Module]:
    """A Wan transformer of a chosen depth, for tests that need one of their own."""
    return tiny(
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
    )


class Noise:
    """Seeded standard normal tensors."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def timesteps(batch: int, scale: float = 1.0) -> Tensor:
    return torch.tensor([700.0, 400.0]).repeat(batch)[:batch] * scale


def text_mask(batch: int) -> Tensor:
    """[batch, TEXT] int64: the text of odd batch items is padded."""
    lengths = torch.tensor([TEXT, TEXT_PADDED]).repeat(batch)[:batch]
    return (torch.arange(TEXT) < lengths[:, None]).long()


def video(noise: Noise, batch: int, grid: Grid, channels: int = CHANNELS) -> Tensor:
    """Latents [B, C, F, H, W] that become the grid after patching by (1, 2, 2)."""
    frames, height, width = grid
    return noise(batch, channels, frames, 2 * height, 2 * width)


def channels_first_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


def packed_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, (frame * grid[1] + row) * grid[2] + column]


# Wan and its kin

WAN = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
WAN_IMAGE = WAN | {"image_dim": 8, "added_kv_proj_dim": WIDTH}


def wan_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid),
        "timestep": timesteps(batch).long(),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def wan_image_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return wan_inputs(model, grid, batch) | {
        "hidden_states": video(noise, batch, grid, model.config.in_channels),
        "encoder_hidden_states": noise(batch, WAN_TEXT, TEXT_WIDTH),
        "encoder_hidden_states_image": noise(batch, 5, 8),
    }


def wan_token_timestep_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    per_token = timesteps(batch)[:, None].repeat(1, frames * height * width)
    per_token[:, : height * width] = 0
    return wan_inputs(model, grid, batch) | {"timestep": per_token}


def wan_vace_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    control = video(noise, batch, grid, model.config.vace_in_channels)
    return wan_inputs(model, grid, batch) | {"control_hidden_states": control}


def wan_animate_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    frames, height, width = grid
    # The face encoder halves the frames twice; one reference frame has no pose and no face.
    return wan_image_inputs(model, grid, batch) | {
        "pose_hidden_states": video(noise, batch, (frames - 1, height, width), model.config.latent_channels),
        "face_pixel_values": noise(batch, 3, 4 * (frames - 1), 16, 16),
    }


def skyreels_forcing_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    per_frame = timesteps(batch)[:, None] * torch.linspace(0.2, 1.0, grid[0])
    return wan_inputs(model, grid, batch) | {"timestep": per_frame.long(), "enable_diffusion_forcing": True}


WAN_CASES = [
    ModelCase("wan_t2v", tiny(WanTransformer3DModel, **WAN), wan_inputs, channels_first_pixels),
    ModelCase(
        "wan_i2v",
        tiny(WanTransformer3DModel, **WAN_IMAGE | {"in_channels": 2 * CHANNELS}),
        wan_image_inputs,
        channels_first_pixels,
    ),
    ModelCase("wan_ti2v", tiny(WanTransformer3DModel, **WAN), wan_token_timestep_inputs, channels_first_pixels),
    ModelCase(
        "wan_vace",
        tiny(WanVACETransformer3DModel, **WAN, vace_layers=[0, 1], vace_in_channels=6),
        wan_vace_inputs,
        channels_first_pixels,
        layers=4,
    ),
    ModelCase(
        "wan_animate",
        tiny(
            WanAnimateTransformer3DModel,
            **WAN_IMAGE | {"in_channels": 2 * CHANNELS + 4, "latent_channels": CHANNELS},
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        wan_animate_inputs,
        channels_first_pixels,
    ),
    ModelCase("chronoedit", tiny(ChronoEditTransformer3DModel, **WAN), wan_inputs, channels_first_pixels),
    ModelCase("skyreels_v2", tiny(SkyReelsV2Transformer3DModel, **WAN), wan_inputs, channels_first_pixels),
    ModelCase(
        "skyreels_v2_forcing",
        tiny(SkyReelsV2Transformer3DModel, **WAN),
        skyreels_forcing_inputs,
        channels_first_pixels,
    ),
]


# HunyuanVideo and its kin

HUNYUAN = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": 8,
    "rope_axes_dim": ROPE_AXES,
}
FRAMEPACK_CLEAN = 2
FRAMEPACK_IMAGE = 3
# Two frames of history at half the resolution and four at a quarter, of a 6 x 9 grid: 3 x 5 and 2 x 3 tokens.
FRAMEPACK_COARSE = 15 + 6


def hunyuan_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid, model.config.in_channels),
        "timestep": timesteps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "pooled_projections": noise(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def framepack_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    frames, height, width = grid
    new = (frames - FRAMEPACK_CLEAN, height, width)
    return hunyuan_inputs(model, new, batch) | {
        "image_embeds": noise(batch, FRAMEPACK_IMAGE, 8),
        "indices_latents": torch.arange(8, 8 + new[0]),
        "latents_clean": video(noise, batch, (FRAMEPACK_CLEAN, height, width)),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": video(noise, batch, (2, height, width)),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": video(noise, batch, (4, height, width)),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def framepack_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    if frame < FRAMEPACK_CLEAN:
        return channels_first_pixels({"hidden_states": inputs["latents_clean"]}, grid, token)
    return channels_first_pixels(inputs, grid, (frame - FRAMEPACK_CLEAN, row, column))


HUNYUAN15_BYT5 = 5
HUNYUAN15_IMAGE = 3
HUNYUAN15_TEXT = TEXT + HUNYUAN15_BYT5 + HUNYUAN15_IMAGE


def hunyuan15_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": noise(batch, CHANNELS, *grid),
        "timestep": timesteps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "encoder_hidden_states_2": noise(batch, HUNYUAN15_BYT5, 8),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).repeat(batch, 1)[:batch],
        "image_embeds": torch.zeros(batch, HUNYUAN15_IMAGE, 8),
        "return_dict": False,
    }


def hunyuan15_image_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    return hunyuan15_inputs(model, grid, batch) | {"image_embeds": Noise()(batch, HUNYUAN15_IMAGE, 8)}


def hunyuan15_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, :, frame, row, column]


HUNYUAN15 = tiny(
    HunyuanVideo15Transformer3DModel,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    num_layers=2,
    num_refiner_layers=1,
    text_embed_dim=TEXT_WIDTH,
    text_embed_2_dim=8,
    image_embed_dim=8,
    rope_axes_dim=ROPE_AXES,
)

HUNYUAN_CASES = [
    ModelCase(
        "hunyuan_video",
        tiny(HunyuanVideoTransformer3DModel, **HUNYUAN),
        hunyuan_inputs,
        channels_first_pixels,
        layers=4,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "hunyuan_video_i2v_token_replace",
        tiny(HunyuanVideoTransformer3DModel, **HUNYUAN, image_condition_type="token_replace"),
        hunyuan_inputs,
        channels_first_pixels,
        layers=4,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "hunyuan_video_i2v_latent_concat",
        tiny(
            HunyuanVideoTransformer3DModel,
            **HUNYUAN | {"in_channels": 2 * CHANNELS + 1},
            image_condition_type="latent_concat",
        ),
        hunyuan_inputs,
        channels_first_pixels,
        layers=4,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "framepack",
        tiny(
            HunyuanVideoFramepackTransformer3DModel,
            **HUNYUAN,
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        framepack_inputs,
        framepack_pixels,
        layers=4,
        text=(FRAMEPACK_COARSE + FRAMEPACK_IMAGE + TEXT,) * 2,
    ),
    ModelCase("hunyuan_video_15", HUNYUAN15, hunyuan15_inputs, hunyuan15_pixels, text=(HUNYUAN15_TEXT,) * 2),
    ModelCase("hunyuan_video_15_i2v", HUNYUAN15, hunyuan15_image_inputs, hunyuan15_pixels, text=(HUNYUAN15_TEXT,) * 2),
]


# CogVideoX and EasyAnimate

COGVIDEOX = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}


def cogvideox_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid).transpose(1, 2).contiguous(),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": timesteps(batch).long(),
        "return_dict": False,
    }


def cogvideox_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, frame, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


def cogvideox15_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    rope = get_3d_rotary_pos_embed(HEAD_DIM, None, (height, width), frames, grid_type="slice", max_size=(height, width))
    return cogvideox_inputs(model, (2 * frames, height, width), batch) | {"image_rotary_emb": rope}


def cogvideox15_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    video = inputs["hidden_states"]
    return video[:, 2 * frame : 2 * frame + 2, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


def easyanimate_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid),
        "timestep": timesteps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


COG_CASES = [
    ModelCase(
        "cogvideox_2b",
        tiny(CogVideoXTransformer3DModel, **COGVIDEOX),
        cogvideox_inputs,
        cogvideox_pixels,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "cogvideox_15",
        tiny(CogVideoXTransformer3DModel, **COGVIDEOX, patch_size_t=2, use_rotary_positional_embeddings=True),
        cogvideox15_inputs,
        cogvideox15_pixels,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "easyanimate",
        tiny(
            EasyAnimateTransformer3DModel,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=16,
            text_embed_dim=TEXT_WIDTH,
        ),
        easyanimate_inputs,
        channels_first_pixels,
        text=(TEXT, TEXT),
    ),
]


# LTX

LTX = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "cross_attention_dim": WIDTH,
    "num_layers": 2,
    "caption_channels": TEXT_WIDTH,
}
LTX2_APPENDED = 4


def ltx_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames * height * width, CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": timesteps(batch),
        "encoder_attention_mask": text_mask(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def ltx2_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames * height * width, CHANNELS),
        "audio_hidden_states": noise(batch, 7, CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "audio_encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": timesteps(batch),
        "encoder_attention_mask": text_mask(batch),
        "audio_encoder_attention_mask": text_mask(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": 7,
        "return_dict": False,
    }


def ltx2_keyframe_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    inputs = ltx2_inputs(model, grid, batch)
    coords = model.rope.prepare_video_coords(batch, *grid, torch.device("cpu"))
    return inputs | {
        "hidden_states": torch.cat([inputs["hidden_states"], noise(batch, LTX2_APPENDED, CHANNELS)], dim=1),
        "video_coords": torch.cat([coords, coords[:, :, :LTX2_APPENDED]], dim=2),
    }


LTX2 = tiny(
    LTX2VideoTransformer3DModel,
    **LTX,
    audio_in_channels=CHANNELS,
    audio_out_channels=CHANNELS,
    audio_num_attention_heads=HEADS,
    audio_attention_head_dim=16,
    audio_cross_attention_dim=HEADS * 16,
)

LTX_CASES = [
    ModelCase("ltx", tiny(LTXVideoTransformer3DModel, **LTX), ltx_inputs, packed_pixels),
    ModelCase("ltx2", LTX2, ltx2_inputs, packed_pixels),
    ModelCase("ltx2_keyframes", LTX2, ltx2_keyframe_inputs, packed_pixels, text=(LTX2_APPENDED,) * 2),
]


# The other video models


def mochi_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": timesteps(batch),
        "encoder_attention_mask": text_mask(batch).bool(),
        "return_dict": False,
    }


def allegro_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    frames, height, width = grid
    head_dim = model.config.attention_head_dim
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        head_dim, ((0, 0), (height, width)), (height, width), frames
    )
    positions = torch.cartesian_prod(t.round().long(), h.round().long(), w.round().long()).T
    return {
        "hidden_states": video(noise, batch, grid),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": timesteps(batch).long(),
        "encoder_attention_mask": text_mask(batch),
        "image_rotary_emb": (tuple(frequencies), tuple(positions[:, None])),
        "return_dict": False,
    }


def kandinsky_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid).movedim(1, -1).contiguous(),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": timesteps(batch),
        "pooled_projections": noise(batch, 8),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(TEXT),
        "return_dict": False,
    }


def kandinsky_pixels(inputs: Inputs, grid: Grid, token: Grid) -> Tensor:
    frame, row, column = token
    return inputs["hidden_states"][:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


def cosmos_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    return {
        "hidden_states": video(noise, batch, grid),
        "timestep": timesteps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "fps": 24,
        "return_dict": False,
    }


def cosmos2_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    per_frame = timesteps(batch, scale=1e-3)[:, None] * torch.linspace(0.2, 1.0, grid[0])
    return cosmos_inputs(model, grid, batch) | {"timestep": per_frame[:, None, :, None, None]}


COSMOS = tiny(
    CosmosTransformer3DModel,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    num_layers=2,
    mlp_ratio=2,
    text_embed_dim=TEXT_WIDTH,
    adaln_lora_dim=8,
    max_size=(16, 32, 32),
    # Resizing the padding mask would need torchvision.
    concat_padding_mask=False,
)

VIDEO_CASES = [
    ModelCase(
        "mochi",
        tiny(
            MochiTransformer3DModel,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=2,
            pooled_projection_dim=24,
            in_channels=CHANNELS,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=16,
        ),
        mochi_inputs,
        channels_first_pixels,
        text=(TEXT, TEXT_PADDED),
        per_item=True,
    ),
    ModelCase(
        "allegro",
        tiny(
            AllegroTransformer3DModel,
            num_attention_heads=HEADS,
            # A multiple of three axes by pairs: not a power of two, like the model's own 96.
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            cross_attention_dim=HEADS * 24,
            caption_channels=TEXT_WIDTH,
        ),
        allegro_inputs,
        channels_first_pixels,
    ),
    ModelCase(
        "kandinsky5",
        tiny(
            Kandinsky5Transformer3DModel,
            in_visual_dim=CHANNELS,
            out_visual_dim=CHANNELS,
            in_text_dim=TEXT_WIDTH,
            in_text_dim2=8,
            time_dim=16,
            model_dim=WIDTH,
            ff_dim=96,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=ROPE_AXES,
        ),
        kandinsky_inputs,
        kandinsky_pixels,
        # It rounds queries and keys to bf16: an error of 1e-7 in one layer can be a bf16 step in the next.
        tolerance=1e-3,
    ),
    ModelCase("cosmos", COSMOS, cosmos_inputs, channels_first_pixels),
    ModelCase("cosmos2", COSMOS, cosmos2_inputs, channels_first_pixels),
]


# Image models

IMAGE = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": ROPE_AXES,
}


def flux_ids(height: int, width: int, image: int = 0) -> Tensor:
    ids = torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width))
    return ids.float()


def flux_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    _, height, width = grid
    return {
        "hidden_states": noise(batch, height * width, CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "pooled_projections": noise(batch, 8),
        "timestep": timesteps(batch, scale=1e-3),
        "img_ids": flux_ids(height, width),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((batch,), 3.5),
        "return_dict": False,
    }


def qwen_inputs(model: Any, grid: Grid, batch: int) -> Inputs:
    noise = Noise()
    _, height, width = grid
    return {
        "hidden_states": noise(batch, height * width, CHANNELS),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_hidden_states_mask": text_mask(batch),
        "timestep": timesteps(batch, scale=1e-3),
        "img_shapes": [[(1, height, width)]] * batch,
        "return_dict": False,
    }


IMAGE_CASES = [
    ModelCase(
        "flux",
        tiny(FluxTransformer2DModel, **IMAGE, num_single_layers=2, pooled_projection_dim=8, guidance_embeds=True),
        flux_inputs,
        packed_pixels,
        grid=(1, 15, 18),
        layers=4,
        text=(TEXT, TEXT),
    ),
    ModelCase(
        "qwen_image",
        tiny(QwenImageTransformer2DModel, **IMAGE),
        qwen_inputs,
        packed_pixels,
        grid=(1, 15, 18),
        text=(TEXT, TEXT),
    ),
]

MODEL_CASES = WAN_CASES + HUNYUAN_CASES + COG_CASES + LTX_CASES + VIDEO_CASES + IMAGE_CASES
