"""Checks of arguments that both next-scale pipelines take."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from draftdiff.errors import UserError
from draftdiff.var.sampling import DRAWS

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt!r}")
    for name, value, allowed in (("output_type", output_type, OUTPUT_TYPES), ("rng", rng, tuple(DRAWS))):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    for value in callback_tensors:
        if value not in known_tensors:
            raise UserError(f"callback tensors must be of {', '.join(known_tensors)}, got {value!r}")
    pictures = prompts * num_images_per_prompt
    if isinstance(generator, Sequence) and len(generator) != pictures:
        raise UserError(f"{pictures} pictures need one generator or a list of {pictures}, got {len(generator)}")


def check_sampling(scales: int, top_p: float | None, **per_scale: Any) -> None:
    """Raise ValueError unless top_p is a share and each other setting is one number or one per scale; temperatures must
    be positive and top_k not negative. None stands for a default."""
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserError(f"top_p must be from 0 to 1, got {top_p!r}")
    for name, setting in per_scale.items():
        single = setting is None or isinstance(setting, Real)
        if not single and (not isinstance(setting, (list, tuple)) or len(setting) != scales):
            raise UserError(f"{name} must be one number or one for each of {scales} scales, got {setting!r}")
        for value in [setting] if single else setting:
            if value is not None and not isinstance(value, Real):
                raise UserError(f"{name} must hold numbers, got {value!r}")
            if name == "temperature" and value is not None and value <= 0:
                raise UserError(f"temperature must be positive, got {value!r}")
            if name == "top_k" and value is not None and (value < 0 or value % 1):
                raise UserError(f"top_k must be a whole number, 0 for all, got {value!r}")
