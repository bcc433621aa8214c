"""Every private name of transformers that draftdiff.llm uses, each once, and what differs between 5.8 and 5.24.

tests/hosts/test_transformers.py uses them all on the installed version. What is special about single models, layers,
processors and arguments is in the table of `transformers_quirks`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.generation import CandidateGenerator, PrefixConstrainedLogitsProcessor
from transformers.generation.utils import GenerateDecoderOnlyOutput

Attention = Callable[..., tuple[Tensor, "Tensor | None"]]


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: not the "meta" of weights that accelerate loads when they are needed."""
    device = model.device
    if device.type != "meta":  # type: ignore[union-attr, operator]
        return device  # type: ignore[return-value]
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return device  # type: ignore[return-value]


def cache_argument(model: PreTrainedModel) -> str:
    """Under which name the model's forward and generate take and return a cache: it was renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def generate_output(sequences: Tensor, cache: Any, **fields: Any) -> GenerateDecoderOnlyOutput:
    """What generate returns with return_dict_in_generate."""
    name = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
    return GenerateDecoderOnlyOutput(sequences=sequences, **fields, **{name: cache})


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the forward can be told the tokens' positions."""
    return "position_ids" in inspect.signature(model.forward).parameters


def last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """The forward's arguments for the logits of the last token alone, if it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of a cache holds states of linear attention or a convolution, which cannot forget a token."""
    return hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states")


def borrows_keys(layer: Any) -> bool:
    """Whether a layer of a cache stands for a layer that uses another's keys."""
    return type(layer).__name__ == "DummyLayer"


def end_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end a text, of a config as generate hands it to a callable."""
    return [] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist()


def padding_token(config: GenerationConfig) -> Tensor | None:
    """The token that fills rows which have ended, of a config as generate hands it to a callable."""
    return config._pad_token_tensor


def allowed_tokens(processor: PrefixConstrainedLogitsProcessor) -> Callable[[int, Tensor], list[int]]:
    """The function (row, tokens so far) -> allowed tokens that the user gave."""
    return processor._prefix_allowed_tokens_fn


def given_to_generate(model: PreTrainedModel, name: str) -> Any:
    """What was given as an argument to the `generate` that is calling us; None without one.

    generate passes `streamer` and `assistant_model` to decoding methods of its own, but to no callable and on no object
    that a callable can see (5.8 to 5.24): a streamer would get the prompt from generate and then wait for ever.
    """
    frame = inspect.currentframe()
    while frame is not None and (frame.f_code.co_name != "generate" or frame.f_locals.get("self") is not model):
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)


class _Assisted:
    """A model that gives assisted decoding a candidate generator of ours where asked for one; it is not touched."""

    def __init__(self, model: PreTrainedModel, candidates: CandidateGenerator) -> None:
        self._model, self._candidates = model, candidates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)

    def _get_candidate_generator(self, **_: Any) -> CandidateGenerator:
        return self._candidates


def assisted_decoding(model: PreTrainedModel, candidates: CandidateGenerator, *arguments: Any, **given: Any) -> Any:
    """The host's assisted decoding, with the arguments that generate hands to a callable after the model."""
    return type(model)._assisted_decoding(_Assisted(model, candidates), *arguments, **given)


def attention_name(config: Any) -> str:
    """The attention that models of this config look up in the registry. Slow: through several layers of properties."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Of this config alone, unchecked; model.set_attn_implementation checks and sets the configs below it, too."""
    config._attn_implementation_internal = name


def dispatches_attention(model: PreTrainedModel) -> bool:
    """Whether all attention of the model is looked up in transformers' AttentionInterface."""
    homes = {type(module).__module__ for module in model.modules() if hasattr(module, "layer_idx")}
    return bool(homes) and all(hasattr(sys.modules[home], "ALL_ATTENTION_FUNCTIONS") for home in homes)


def attention_of(module: nn.Module, name: str) -> Attention:
    """The function that the module itself would have called: "eager" is each modelling file's own."""
    home = sys.modules[type(module).__module__]
    return home.ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(home, "eager_attention_forward", None))


def forget_attention(name: str) -> None:
    """Take a name out of the registries of attentions and of their masks, which have no public way to."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
