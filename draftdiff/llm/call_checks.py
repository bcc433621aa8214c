"""What of a call of `generate` speculation cannot honour: each a ValueError in one line, before anything is decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from draftdiff.hosts.transformers import given_to_generate, padding_token
from draftdiff.hosts.transformers_quirks import QUIRKS, media_tokens, other_arguments, quirk, takes_media
from draftdiff.llm.checks import require


def check_call(model: PreTrainedModel, ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that hold media of the prompt, such as pictures. kwargs: all that generate handed to a callable."""
    _check_model(model)
    _check_config(config, len(ids))
    media = {name: kwargs[name] for name in other_arguments(model, kwargs)}
    _check_media(model, ids, media)
    require(ids.shape[1] > 0, "the prompt is empty: speculative needs at least one token")
    require(kwargs.get("use_cache", True), "speculative needs a cache, got use_cache=False")
    guessed = (given_to_generate(model, "kwargs") or {}).get("attention_mask") is None
    _check_positions(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), guessed)
    require(
        given_to_generate(model, "assistant_model") is None,
        "speculative takes a drafter in place of an assistant_model, got both",
    )
    return media


def _check_model(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    require(not config.is_encoder_decoder, f"speculative takes decoder-only models, got {name}")
    one_way = getattr(config, "is_decoder", None) is not False or quirk("model", config.model_type, "reads one way")
    require(bool(one_way), f"{name} reads text both ways: set is_decoder=True in its config")


def _check_config(config: GenerationConfig, rows: int) -> None:
    settings = [row.name for row in QUIRKS if row.of == "setting" and getattr(config, row.name, None)]
    require(not settings, f"speculative is a way of decoding of its own, got {', '.join(settings)}, too")
    require((config.num_beams or 1) == 1, f"speculative decodes without beams, got num_beams={config.num_beams}")
    for name in ("output_attentions", "output_hidden_states"):
        require(not getattr(config, name), f"speculative cannot return {name.removeprefix('output_')}, got {name}=True")
    require(
        rows == 1 or not (config.output_scores or config.output_logits),
        f"speculative returns scores and logits of one row only, got a batch of {rows}",
    )
    require(
        rows == 1 or padding_token(config) is not None,
        "rows of a batch end at different lengths: set pad_token_id in the generation config",
    )


def _check_positions(ids: Tensor, mask: Tensor | None, positions: Tensor | None, guessed: bool) -> None:
    """Only whole prompts, padded on the left, with positions that follow from the mask.

    A mask that generate has guessed from the padding token is taken as it is: the prompt may end with that token.
    """
    # generate drops a mask without padding, but makes positions of its length before.
    known = positions if mask is None else mask
    length = ids.shape[1] if known is None else known.shape[-1]
    require(
        length == ids.shape[1],
        f"speculative needs the whole prompt, also what the cache holds: got {ids.shape[1]} tokens and a mask of "
        f"{length}",
    )
    require(
        mask is None or guessed or bool(mask[:, -1].all()),
        "the padding must be on the left, and each row must have a token: the mask ends with a 0",
    )
    if positions is not None and positions.ndim == 2:
        real = torch.ones_like(ids) if mask is None else mask.long()
        require(
            bool(((positions == real.cumsum(-1) - 1) | (real == 0)).all()),
            "speculative counts positions by the attention mask, got other position_ids",
        )


def _check_media(model: PreTrainedModel, ids: Tensor, media: dict[str, Any]) -> None:
    """Media of the prompt, for models that read them."""
    for name in media:
        require(takes_media(model), f"speculative takes token ids only, got {', '.join(media)}")
        require(name != "inputs_embeds", "speculative takes token ids, got inputs_embeds")
    ends = torch.isin(ids[:, -1:], torch.tensor(media_tokens(model), device=ids.device))
    require(not media or not bool(ends.any()), "a prompt with media must end with text")
