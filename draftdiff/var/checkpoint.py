"""Reading the original checkpoints of VAR, CoDe and Infinity.

For each parameter of ours a table of patterns says which original tensor it is; so whatever is missing, left over or
mis-shaped can be named as it stands in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

VAR_NAMES = (
    (r"^class_embed\.", "class_emb."),
    (r"^start_embed$", "pos_start"),
    (r"^pos_embed$", "pos_1LC"),
    (r"^level_embed\.", "lvl_embed."),
    (r"^proj_in\.", "word_embed."),
    (r"^proj_out\.", "head."),
    (r"^norm_out\.linear\.", "head_nm.ada_lin.1."),
    (r"^adaln\.", "shared_ada_lin.1."),
    (r"\.adaln\.", ".ada_lin.1."),
    (r"\.adaln_offset$", ".ada_gss"),
    (r"\.to_qkv\.weight$", ".mat_qkv.weight"),
    (r"\.log_scale$", ".scale_mul_1H11"),
    (r"\.to_out\.", ".proj."),
    (r"\.ff\.linear_in\.", ".ffn.fc1."),
    (r"\.ff\.linear_out\.", ".ffn.fc2."),
)
VQ_NAMES = (
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
    (r"^quantize\.phi\.", "quantize.quant_resi.qresi_ls."),
)
# Buffers that follow from the configuration, or that only training reads.
DERIVED = re.compile(
    r"(^|\.)(lvl_1L|attn_bias_for_masking|zero_k_bias|ema_vocab_hit_SV)$|^quantizer?\.lfq\.|^quantize\.mask$"
)


def rename(key: str, names: Iterable[tuple[str, str]]) -> str:
    """Apply every pattern of a table."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], names: Iterable[tuple[str, str]], optional: tuple[str, ...] = ()
) -> None:
    """Load the parameters of a model, in its dtype, from the tensors of an original checkpoint.

    optional: prefixes of parameters of ours that may be absent and then stay as they are.
    Raises ValueError that names missing, unexpected or mis-shaped tensors of the checkpoint.
    """
    names = tuple(names)
    decoder: Any = getattr(model, "decoder", None)
    levels = len(decoder.up_blocks) if decoder else 0
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for key, ours in model.state_dict().items():
        sources, assemble = _origin(key, names, levels)
        absent = [source for source in sources if source not in tensors]
        if absent:
            missing += [] if optional and key.startswith(optional) else absent
            continue
        used.update(sources)
        theirs = assemble(*(tensors[source] for source in sources))
        if _without_ones(theirs) != _without_ones(ours):
            misshapen.append(f"{' + '.join(sources)} is {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
            continue
        state[key] = theirs.reshape(ours.shape).to(ours.dtype)
    left = [name for name in tensors if name not in used and not DERIVED.search(name)]
    problems = [
        f"{what}: {_listed(found)}"
        for what, found in (("missing", missing), ("unexpected", left), ("wrong shape", misshapen))
        if found
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit this {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(state, strict=not optional)


def _origin(key: str, names: Iterable[tuple[str, str]], levels: int) -> tuple[tuple[str, ...], Callable[..., Tensor]]:
    """The original tensors that make up a parameter, and how they do.

    levels: of a decoder, which counts them from the coarsest here and from the finest there.
    """
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", key)
    original = rename(key, names)
    prefix, _, last = original.rpartition("to_")
    if last == "qkv.bias":
        return (f"{prefix}q_bias", f"{prefix}v_bias"), lambda q, v: torch.cat([q, torch.zeros_like(v), v])
    if last == "kv.bias":
        return (f"{prefix}v_bias",), lambda v: torch.cat([torch.zeros_like(v), v])
    if last[:2] in ("q.", "k.", "v.") and levels:
        return (f"{prefix}qkv.{last[2:]}",), lambda qkv: qkv.chunk(3)["qkv".index(last[0])]
    return (original,), lambda tensor: tensor


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    return tuple(n for n in tensor.shape if n != 1)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
