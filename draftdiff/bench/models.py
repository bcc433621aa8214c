"""The video transformers of `draftdiff bench dit`: real configurations, with random weights made on the device.

Each model has its full size, of the released checkpoint at the resolution it is known for, and a small one of the same
class, head_dim and proportions that a CPU can run in seconds.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

LATENT_CHANNELS = 16
TIMESTEP = 500  # of 1000
_QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Size:
    """config: arguments of the transformer class.  frames, height, width: of the video, in pixels.

    text: number of other tokens.
    """

    config: dict[str, Any]
    frames: int
    height: int
    width: int
    text: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, rows and columns after a VAE that takes 4 frames and 8x8 pixels to one, as most do."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens (frames, rows, columns): patches of (1, 2, 2) latents."""
        frames, height, width = self.latent
        return frames, height // 2, width // 2

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def layers(self) -> int:
        """Attention layers over the video."""
        return self.config["num_layers"] + self.config.get("num_single_layers", 0)

    @property
    def heads(self) -> tuple[int, int]:
        """(number of heads, head_dim)"""
        return self.config["num_attention_heads"], self.config["attention_head_dim"]

    def with_layers(self, layers: int) -> Size:
        """The same model with so many layers (at least 2), its two kinds of layers in proportion."""
        single = self.config.get("num_single_layers", 0)
        singles = min(layers - 1, max(1, round(layers * single / self.layers))) if single else 0
        depth = {"num_layers": layers - singles} | ({"num_single_layers": singles} if single else {})
        return replace(self, config=self.config | depth)


class MiniMaxSize(Size):
    """A VAE that takes 17 frames to 5 and 16x16 pixels to one. Half of the other tokens are sound."""

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.frames - 5) // 17 * 5 + 2, self.height // 16, self.width // 16


Inputs = Callable[[Size, int, Callable[..., Tensor]], dict[str, Any]]


@dataclass(frozen=True)
class BenchModel:
    """inputs: (size, batch, noise of a shape) -> arguments of a forward, as the pipeline gives them.

    batch, calls_per_step: of one denoising step with classifier-free guidance, as the pipeline runs it.
    joint_text: whether text tokens are part of the video's self-attention.
    cached: whether diffusers' First Block Cache knows the class.
    """

    title: str
    transformer: type[nn.Module]
    inputs: Inputs
    full: Size
    small: Size
    batch: int = 1
    calls_per_step: int = 1
    joint_text: bool = False
    cached: bool = True

    def about(self, size: Size) -> dict[str, Any]:
        """Facts of a size for the results."""
        heads, head_dim = size.heads
        text = size.text if self.joint_text else 0
        pairs = self.calls_per_step * self.batch * heads * (size.tokens + text) ** 2
        return {
            "title": self.title,
            "class": self.transformer.__name__,
            "video": [size.frames, size.height, size.width],
            "grid": size.grid,
            "tokens": size.tokens,
            "text_tokens": text,
            "heads": heads,
            "head_dim": head_dim,
            "layers": size.layers,
            "batch": self.batch,
            "calls_per_step": self.calls_per_step,
            "dense_attention_flop_per_step": 4 * head_dim * pairs * size.layers,
        }


def wan_inputs(size: Size, batch: int, noise: Callable[..., Tensor]) -> dict[str, Any]:
    latents = noise(batch, LATENT_CHANNELS, *size.latent)
    return {
        "hidden_states": latents,
        "timestep": torch.full((batch,), TIMESTEP, device=latents.device),
        "encoder_hidden_states": noise(batch, size.text, size.config["text_dim"]),
    }


def hunyuan_inputs(size: Size, batch: int, noise: Callable[..., Tensor]) -> dict[str, Any]:
    latents = noise(batch, LATENT_CHANNELS, *size.latent)
    # A prompt of middle length; the rest of the text is padding, and the model masks it.
    valid = torch.arange(size.text, device=latents.device) < size.text // 2
    return {
        "hidden_states": latents,
        "timestep": torch.full((batch,), TIMESTEP, device=latents.device),
        "encoder_hidden_states": noise(batch, size.text, size.config["text_embed_dim"]),
        "encoder_attention_mask": valid.long().expand(batch, -1),
        "pooled_projections": noise(batch, size.config["pooled_projection_dim"]),
        "guidance": torch.full((batch,), 6000.0, device=latents.device, dtype=latents.dtype),
    }


def cogvideox_inputs(size: Size, batch: int, noise: Callable[..., Tensor]) -> dict[str, Any]:
    frames, height, width = size.latent
    latents = noise(batch, frames, LATENT_CHANNELS, height, width)
    _, rows, columns = size.grid
    rotary = get_3d_rotary_pos_embed(
        size.heads[1], ((0, 0), (rows, columns)), (rows, columns), frames, device=latents.device
    )
    return {
        "hidden_states": latents,
        "timestep": torch.full((batch,), TIMESTEP, device=latents.device),
        "encoder_hidden_states": noise(batch, size.text, size.config["text_embed_dim"]),
        "image_rotary_emb": rotary,
    }


def minimax_inputs(size: Size, batch: int, noise: Callable[..., Tensor]) -> dict[str, Any]:
    """Text, sound and video in one sequence, each row with its position, kind and timestep."""
    text, sound = size.text - size.text // 2, size.text // 2
    config, latent = size.config, noise(batch, size.tokens, 4 * size.config["in_channels"])
    device = latent.device
    counts = torch.tensor([text, sound, size.tokens])
    kinds = torch.tensor([1, 2, 0]).repeat_interleave(counts).to(device)
    places = torch.zeros(len(kinds), 3, device=device)
    places[: text + sound, 0] = torch.arange(text + sound, device=device)
    places[text + sound :] = torch.cartesian_prod(*(torch.arange(float(n), device=device) for n in size.grid))
    places[text + sound :, 0] += text
    return {
        "hidden_states": latent,
        "audio_hidden_states": noise(batch, sound, config["audio_in_channels"]),
        "encoder_hidden_states": noise(batch, text, config["text_dim"]),
        "timestep": torch.tensor([0.0, TIMESTEP / 1000], device=device),
        "timestep_indices": (kinds != 1).long(),
        "token_tags": kinds,
        "position_ids": places,
        **{f"{name}_indices": (kinds == kind).nonzero()[:, 0] for kind, name in enumerate(("video", "text", "audio"))},
    }


def _wan(heads: int, ffn: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "ffn_dim": ffn,
        "num_layers": layers,
        "text_dim": 4096,
    }


def _hunyuan(heads: int, layers: int, singles: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
        "num_single_layers": singles,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
    }


def _cogvideox(heads: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "num_layers": layers,
        "text_embed_dim": 4096,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": True,
    }


def _minimax(heads: int, hidden: int, ffn: int, layers: int, width: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "hidden_size": hidden,
        "num_layers": layers,
        "ffn_dim": ffn,
        "in_channels": 24,
        "audio_in_channels": 32,
        "text_dim": width,
        "time_embed_hidden_dim": hidden,
        "time_embed_dim": hidden // 2,
    }


MODELS = {
    "wan-1.3b": BenchModel(
        "Wan 2.1 1.3B, 480p",
        WanTransformer3DModel,
        wan_inputs,
        full=Size(_wan(12, 8960, 30), 81, 480, 832, text=512),
        small=Size(_wan(2, 1536, 3), 17, 480, 832, text=512),
        calls_per_step=2,
    ),
    "wan-14b": BenchModel(
        "Wan 2.1 14B, 720p",
        WanTransformer3DModel,
        wan_inputs,
        full=Size(_wan(40, 13824, 40), 81, 720, 1280, text=512),
        small=Size(_wan(3, 1024, 2), 5, 720, 1280, text=512),
        calls_per_step=2,
    ),
    "hunyuan-13b": BenchModel(
        "HunyuanVideo 13B, 720p",
        HunyuanVideoTransformer3DModel,
        hunyuan_inputs,
        full=Size(_hunyuan(24, 20, 40), 129, 720, 1280, text=256),
        small=Size(_hunyuan(2, 1, 2), 5, 720, 1280, text=256),
        joint_text=True,
    ),
    "cogvideox-5b": BenchModel(
        "CogVideoX 5B, 480x720",
        CogVideoXTransformer3DModel,
        cogvideox_inputs,
        full=Size(_cogvideox(48, 42), 49, 480, 720, text=226),
        small=Size(_cogvideox(4, 2), 13, 480, 720, text=226),
        batch=2,
        joint_text=True,
    ),
}
if hasattr(diffusers, "MiniMaxH3Transformer3DModel"):
    MODELS["minimax-h3"] = BenchModel(
        "MiniMax-H3, 768p, 5 s",
        diffusers.MiniMaxH3Transformer3DModel,
        minimax_inputs,
        full=MiniMaxSize(_minimax(56, 5376, 14336, 50, 5120), 124, 768, 1344, text=826),
        small=MiniMaxSize(_minimax(2, 192, 512, 2, 256), 22, 768, 1344, text=200),
        joint_text=True,
        cached=False,
    )


def make_inputs(model: BenchModel, size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seeded arguments of one forward."""
    generator = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return model.inputs(size, model.batch, noise) | {"return_dict": False}


@torch.no_grad()
def build(model: BenchModel, size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with random weights, each made on the device, so that no second copy is ever held.

    Weights keep the scale of their inputs. Those of the query and key norms spread the logits: were attention flat, a
    wrong selection would hardly show in the output. A parameter's name is its seed.
    """
    with init_empty_weights(include_buffers=False):
        transformer = model.transformer(**size.config)
    in_fp32 = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for path, module in transformer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}"
            kept = torch.float32 if in_fp32 & set(full_name.split(".")) else dtype
            values = torch.empty(parameter.shape, device=device, dtype=kept)
            generator = torch.Generator(device).manual_seed(zlib.crc32(full_name.encode()))
            if values.ndim > 1:
                values.normal_(std=values[0].numel() ** -0.5, generator=generator)
            elif path.rpartition(".")[2] in _QK_NORMS and name == "weight":
                values.uniform_(1.5, 2.5, generator=generator)
            elif name == "weight":
                values.fill_(1.0)
            else:
                values.normal_(std=0.02, generator=generator)
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    return transformer.to(device).eval()


def twin(transformer: nn.Module) -> nn.Module:
    """A copy that shares every tensor: to be compiled, cached or enabled for itself."""
    return copy.deepcopy(transformer, {id(t): t for t in chain(transformer.parameters(), transformer.buffers())})
