"""What is special about single models, layers, processors, settings and arguments of transformers: a table row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

Kind = Literal["model", "layer", "config", "module", "processor", "setting", "argument"]
Effect = Literal[
    "refused", "chains", "reads one way", "one row", "ignored", "ignored if empty", "text if zero", "table"
]

BY_PLACE = "attends by place, not by position"
FORGETS = "its recurrent layers forget the past when tokens come at once"


@dataclass(frozen=True)
class Quirk:
    """of: what kind of name it is; "model" is a config's model_type, "layer" one of its layer_types, "config" a field
    of it, "module" a module's or buffer's own name, "processor" a class of generation.logits_process, "setting" a field
    of GenerationConfig and "argument" what generate hands to a callable.
    effect: "refused"; "chains", drafts are chains for one row; "reads one way", whatever is_decoder says; "one row",
    refused in a batch; "ignored", as decoding makes it itself or does without; "ignored if empty"; "text if zero",
    ignored where a model of several media says that all is text; "table", holds an entry for each position.
    why: to be said to a user.  before: the first version without the quirk.
    """

    of: Kind
    name: str
    effect: Effect
    why: str = ""
    before: str | None = None


QUIRKS = (
    Quirk("model", "bloom", "chains", BY_PLACE),
    Quirk("model", "gpt_neo", "chains", BY_PLACE),
    Quirk("model", "mpt", "chains", BY_PLACE),
    Quirk(
        "model", "falcon_h1", "refused", "older versions are not known to go on rightly from its states", before="5.24"
    ),
    Quirk("model", "jamba", "refused", FORGETS),
    Quirk("model", "minimax", "refused", "it has a cache of its own, which cannot be rolled back"),
    Quirk("model", "recurrent_gemma", "refused", FORGETS),
    Quirk("model", "zamba", "refused", FORGETS),
    Quirk("model", "zamba2", "refused", "it says something else to one token than to several"),
    Quirk("model", "gpt_neox", "reads one way"),
    Quirk("model", "gpt_neox_japanese", "reads one way"),
    Quirk("config", "alibi", "chains", BY_PLACE),
    Quirk("layer", "chunked_attention", "chains", "has chunked attention"),
    Quirk("layer", "conv", "refused", "its convolutions start anew when tokens come at once", before="5.15"),
    Quirk("module", "wpe", "table"),
    Quirk("module", "embed_positions", "table"),
    Quirk("module", "position_embeddings", "table"),
    Quirk("processor", "UnbatchedClassifierFreeGuidanceLogitsProcessor", "refused", "guidance_scale"),
    Quirk(
        "processor",
        "SynthIDTextWatermarkLogitsProcessor",
        "refused",
        "watermarking_config=SynthIDTextWatermarkingConfig",
    ),
    Quirk("processor", "EncoderRepetitionPenaltyLogitsProcessor", "one row", "encoder_repetition_penalty"),
    Quirk("processor", "EncoderNoRepeatNGramLogitsProcessor", "one row", "encoder_no_repeat_ngram_size"),
    Quirk("setting", "penalty_alpha", "refused"),
    Quirk("setting", "dola_layers", "refused"),
    Quirk("setting", "prompt_lookup_num_tokens", "refused"),
    Quirk("setting", "assistant_early_exit", "refused"),
    Quirk("argument", "attention_mask", "ignored"),
    Quirk("argument", "position_ids", "ignored"),
    Quirk("argument", "logits_to_keep", "ignored"),
    Quirk("argument", "use_cache", "ignored"),
    Quirk("argument", "cache_position", "ignored"),
    Quirk("argument", "cache", "ignored"),
    Quirk("argument", "past_key_values", "ignored"),
    Quirk("argument", "mm_encoder_outputs", "ignored if empty"),
    Quirk("argument", "token_type_ids", "text if zero"),
    Quirk("argument", "mm_token_type_ids", "text if zero"),
)
_ROWS = {(row.of, row.name): row for row in QUIRKS}


def quirk(of: Kind, name: str, *effects: Effect) -> Quirk | None:
    """The row of a name on the installed transformers, if it has one of these effects, or any where none is given."""
    row = _ROWS.get((of, name))
    if row is None or (effects and row.effect not in effects):
        return None
    return row if row.before is None or Version(transformers.__version__) < Version(row.before) else None


def quirks_of_model(model: PreTrainedModel, effect: Effect) -> list[Quirk]:
    """The rows of this effect that the model's type, its config's fields or its kinds of layers bring in."""
    config = model.config.get_text_config()
    names: list[tuple[Kind, str]] = [("model", config.model_type)]
    names += [("config", row.name) for row in QUIRKS if row.of == "config" and getattr(config, row.name, False)]
    names += [("layer", kind) for kind in layer_kinds(model)]
    return [row for of, name in names if (row := quirk(of, name, effect)) is not None]


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """The kinds of the model's layers, each once, as in its config's layer_types."""
    config = model.config.get_text_config()
    alone = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(dict.fromkeys(getattr(config, "layer_types", None) or (alone,)))


def other_arguments(model: PreTrainedModel, given: dict[str, Any]) -> list[str]:
    """Names of what generate handed to a callable beside token ids, where it says anything: other media, and what
    decoding from token ids alone cannot honour."""
    several_media = takes_media(model)

    def says_nothing(name: str, value: Any) -> bool:
        row = quirk("argument", name)
        if value is None or row is None:
            return value is None
        if row.effect == "text if zero":
            return several_media and isinstance(value, Tensor) and not bool(value.any())
        return row.effect == "ignored" or len(value) == 0

    return sorted(name for name, value in given.items() if not says_nothing(name, value))


def takes_media(model: PreTrainedModel) -> bool:
    """Whether the model reads pictures, videos or sounds too."""
    return model.config.get_text_config() is not model.config


def media_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that stand for pictures, videos and sounds in a prompt; none for a model of text alone."""
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    found = [getattr(model.config, name, None) for name in names] if takes_media(model) else []
    return [id for id in found if id is not None]


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has a table of; None where they are computed and have no end."""
    text = model.get_decoder()  # towers of other media have tables of their own
    modules = [name for name, module in text.named_modules() if isinstance(module, nn.Embedding)]
    names = {name.rpartition(".")[2] for name in [*modules, *(name for name, _ in text.named_buffers())]}
    known = any(quirk("module", name, "table") for name in names)
    return model.config.get_text_config().max_position_embeddings if known else None
