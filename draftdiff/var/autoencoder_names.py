"""Original names of the autoencoders' parameters: both VAR's and Infinity's follow VQGAN's layout."""

from __future__ import annotations

import re

from draftdiff.var.checkpoint import Tensors, count, rename, shape

VQGAN_NAMES = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.attentions\.", r".up.\1.attn."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def vqgan_name(key: str, levels: int) -> str:
    """Original name of a parameter of the encoder or decoder; the decoder's levels count from the coarsest here, and
    from the finest there."""
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", key)
    return rename(key, VQGAN_NAMES)


def vqgan_config(tensors: Tensors, wrapper: str = "") -> dict[str, object]:
    """Channels per level and blocks per level of a checkpoint, read off its decoder.

    wrapper: what stands between a convolution's name and its weight.
    """
    levels = count(tensors, r"decoder\.up\.(\d+)\.")
    conv = f"conv1.{wrapper}weight"
    channels = [shape(tensors, f"decoder.up.{level}.block.0.{conv}", 4)[0] for level in range(levels)]
    return {
        "block_out_channels": tuple(channels),
        "layers_per_block": count(tensors, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
    }
