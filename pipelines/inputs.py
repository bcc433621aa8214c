"""Checks of arguments that both next-scale pipelines take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Generator, Tensor

from draftdiff.errors import UserError
from draftdiff.var.sampling import DRAWS

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# What a setting of sampling must be, and whether it is so. Beyond these bounds fp32 logits overflow.
_LARGEST, _LEAST_HEAT = 1e6, 1e-6
_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "guidance_scale": (f"from {-_LARGEST:g} to {_LARGEST:g}", lambda value: abs(value) <= _LARGEST),
    "temperature": (f"positive, from {_LEAST_HEAT:g} to {_LARGEST:g}", lambda value: _LEAST_HEAT <= value <= _LARGEST),
    "top_k": ("a whole number, 0 for all", lambda value: isinstance(value, int) and value >= 0),
    "top_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
}


def check_call(
    *,
    num_images_per_prompt: int,
    prompts: int,
    generator: Any,
    rng: str,
    output_type: str,
    callback_tensors: Sequence[str],
    known_tensors: Sequence[str],
) -> None:
    """Raise ValueError for what cannot be.

    num_images_per_prompt: a positive whole number.  generator: one, none, or one per picture.  rng,
    output_type: words that are known.  callback_tensors: of those known.
    """
    check_count("num_images_per_prompt", num_images_per_prompt)
    for name, value, allowed in (("output_type", output_type, OUTPUT_TYPES), ("rng", rng, tuple(DRAWS))):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if isinstance(callback_tensors, str) or not isinstance(callback_tensors, Sequence):
        raise UserError(f"callback tensors must be a list of names, got {callback_tensors!r}")
    for value in callback_tensors:
        if value not in known_tensors:
            raise UserError(f"callback tensors must be of {', '.join(known_tensors)}, got {value!r}")
    pictures = prompts * num_images_per_prompt
    several = isinstance(generator, (list, tuple))
    if not all(isinstance(one, Generator) for one in (generator if several else [generator]) if one is not None):
        raise UserError(f"generator must be a torch.Generator, as torch.Generator().manual_seed(42), got {generator!r}")
    if several and (len(generator) != pictures or None in generator):
        raise UserError(f"{pictures} pictures need one generator or a list of {pictures}, got {len(generator)}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless it is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name} must be a whole number, at least 1, got {value!r}")


def plain_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose tensors and arrays are numbers and lists of Python's."""
    return {
        name: value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value
        for name, value in settings.items()
    }


def check_sampling(
    settings: Mapping[str, Any], scales: int, *, defaults: Sequence[str], per_scale: Sequence[str]
) -> None:
    """Raise ValueError for a setting, of `plain_numbers`, that is no finite number of its range.

    defaults: those that may be None, which stands for a default.  per_scale: those that may be a list of one number for
    each scale.
    """
    for name, setting in settings.items():
        if setting is None and name in defaults:
            continue
        several = name in per_scale and isinstance(setting, (list, tuple))
        shape = "one number" + (f" or one for each of {scales} scales" if name in per_scale else "")
        if several and len(setting) != scales:
            raise UserError(f"{name} must be {shape}, got {setting!r}")
        words, fits = _SETTINGS[name]
        for value in setting if several else [setting]:
            if isinstance(value, bool) or not isinstance(value, Real):
                raise UserError(f"{name} must be {shape}, got {setting!r}")
            if not math.isfinite(value) or not fits(value):
                raise UserError(f"{name} must be {words}, got {value!r}")


def check_embeds(name: str, embeds: Any, mask: Any, channels: int, most: int) -> None:
    """Raise ValueError unless embeds are finite numbers [prompts, 1 to `most` tokens, channels], and mask is None or of
    False and True, or 0 and 1, [prompts, tokens] with a token for each prompt. name: of the prompt they stand for."""
    if not isinstance(embeds, Tensor):
        raise UserError(f"{name}_embeds must be a tensor, got a {type(embeds).__name__}")
    if embeds.ndim != 3 or embeds.shape[-1] != channels or 0 in embeds.shape:
        raise UserError(f"{name}_embeds must be [prompts, tokens, {channels}], got {tuple(embeds.shape)}")
    if embeds.shape[1] > most:
        raise UserError(f"{name}_embeds must have at most {most} tokens, got {embeds.shape[1]}")
    if not embeds.is_floating_point():
        raise UserError(f"{name}_embeds must be of floating-point numbers, got {embeds.dtype}")
    if not embeds.isfinite().all():
        raise UserError(f"{name}_embeds hold NaN or inf")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise UserError(f"{name}_mask must be a tensor, got a {type(mask).__name__}")
    if mask.shape != embeds.shape[:2]:
        raise UserError(f"{name}_mask must be {tuple(embeds.shape[:2])} like its embeddings, got {tuple(mask.shape)}")
    if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
        raise UserError(
            f"{name}_mask must hold 1 for tokens and 0 for padding, or True and False; it holds other numbers"
        )
    if not mask.bool().any(1).all():
        raise UserError(f"{name}_mask leaves a prompt without any token")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name} must be True or False, got {value!r}")
