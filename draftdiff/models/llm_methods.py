"""Every method of draftdiff.llm as one call on a loaded pair of models."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm.drafters.cross_vocab import CrossVocabDrafter
from draftdiff.llm.drafters.merging import NGramCache
from draftdiff.llm.drafters.model import ModelDrafter
from draftdiff.llm.drafters.ngram import NGramDrafter
from draftdiff.llm.drafters.pearl import PearlDrafter
from draftdiff.llm.drafters.shapes import Chain, KBest, Sampled
from draftdiff.llm.reporting import Report
from draftdiff.llm.spec_kv import SpecKVConfig, speckv
from draftdiff.llm.spec_kv_pc import speckv_pc
from draftdiff.llm.spec_pc import SpecPCConfig, specpc
from draftdiff.llm.speculation import speculative
from draftdiff.llm.train.trim import trim
from draftdiff.models.llm import LanguageModel

LEAST_TEMPERATURE = 1e-6  # logits over much less would be infinite in fp32


@dataclass
class Run:
    """What a method made of one prompt. tokens: new ones, int64 [n].  report: of its speculation.  cache: most bytes of
    the target's keys and values.  logits: a function that gives the target's logits [n, vocabulary] before each of n
    given tokens, as this method sees the prompt."""

    tokens: Tensor
    seconds: float
    cache: int
    report: Report | None = None
    logits: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Method:
    """title: for people.  lossless: whether its output is the target's own.  run: (model, ids [1, tokens], arguments of
    generate, capacity of a cut cache in tokens) -> Run."""

    title: str
    lossless: bool
    run: Callable[[LanguageModel, Tensor, dict[str, Any], int], Run]


def _generate(
    model: LanguageModel, ids: Tensor, options: dict[str, Any], drafter: Any = None, cache: Any = None
) -> Run:
    """One generation, timed. options: arguments of generate, of which `pace` is for drafters alone."""
    given = dict(options)
    pace = {"pace": given.pop("pace")} if "pace" in given else {}
    if drafter is not None:
        given |= {"custom_generate": speculative, "drafter": drafter, **pace}
    if cache is not None:
        given[cache_argument(model.target)] = cache
    start = time.perf_counter()
    out = model.target.generate(ids, **given, return_dict_in_generate=True)
    tokens = out.sequences[0, ids.shape[1] :].cpu()  # waits for the device
    seconds = time.perf_counter() - start
    held = getattr(out, cache_argument(model.target))
    # Linear-attention layers hold no keys, nor do those that use another layer's.
    layers = [layer for layer in held.layers if getattr(layer, "keys", None) is not None]
    size = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    return Run(tokens, seconds, size, getattr(drafter, "last_report", None))


def _speculation(make: Callable[[LanguageModel], Any]) -> Callable[..., Run]:
    def run(model: LanguageModel, ids: Tensor, options: dict[str, Any], capacity: int) -> Run:
        drafter = make(model)
        drafter.last_report = model.reports.get(make)  # it is new for each prompt, but not the knowledge what pays
        found = _generate(model, ids, options, drafter)
        model.reports[make] = found.report
        return found

    return run


def _plain(model: LanguageModel, ids: Tensor, options: dict[str, Any], capacity: int) -> Run:
    return _generate(model, ids, options)


def _cut(
    model: LanguageModel,
    ids: Tensor,
    options: dict[str, Any],
    capacity: int,
    *,
    compress: bool,
    evict: bool,
    drafter: Callable[[LanguageModel], Any] | None = None,
) -> Run:
    """SpecPC, SpecKV or both, then decoding, with drafts or without."""
    start = time.perf_counter()
    cache, window, wanted = None, min(32, capacity, ids.shape[1]), options["max_new_tokens"]
    if compress and evict:
        kept = min(2 * capacity, ids.shape[1])
        shorter = SpecPCConfig(capacity=kept, window=window, lookahead=8)
        ids, cache, _ = speckv_pc(
            model.target, model.draft, ids, SpecKVConfig(capacity=min(capacity, kept), window=window), shorter
        )
    elif compress:
        ids = ids[:, specpc(model.draft, ids, SpecPCConfig(capacity=capacity, window=window))]
    else:
        config = SpecKVConfig(capacity=capacity, window=window)
        cache, _ = speckv(model.target, model.draft, ids, config, max_new_tokens=wanted)
    before = time.perf_counter() - start
    fresh = copy.deepcopy(cache)
    run = _generate(model, ids, options, drafter(model) if drafter else None, cache)
    run.seconds += before
    run.logits = partial(_logits, model, ids, fresh)
    return run


@torch.no_grad()
def _logits(model: LanguageModel, ids: Tensor, cache: Any, tokens: Tensor) -> Tensor:
    """The target's logits before each of the tokens, after a prompt of which the cache holds a part."""
    held = 0 if cache is None else cache.get_seq_length()
    fed = torch.cat([ids[0, held:], tokens[:-1].to(ids)])[None]
    given = {} if cache is None else {cache_argument(model.target): cache}
    return model.target(fed, use_cache=cache is not None, **given).logits[0, -len(tokens) :]


def _from_draft(model: LanguageModel, shape: Any, draft: Any = None) -> ModelDrafter:
    return ModelDrafter(model.draft if draft is None else draft, shape, same_tokenizer=model.same_tokenizer)


def _chain(model: LanguageModel) -> ModelDrafter:
    return _from_draft(model, Chain(model.length))


def _best_paths(model: LanguageModel) -> ModelDrafter:
    width = max(2, model.nodes // (2 * model.length))
    return _from_draft(model, KBest(model.length, width, max(model.nodes, width * (model.length - 1))))


def _sampled(model: LanguageModel) -> ModelDrafter:
    return _from_draft(model, Sampled((2, 2, 1) if model.nodes < 24 else (4, 2, 2, 1)))


def _trimmed(model: LanguageModel) -> ModelDrafter:
    assert model.counts is not None, "checked by check_method"
    return _from_draft(model, Chain(model.length), trim(model.draft, model.counts, len(model.counts) // 4))


def _omnidraft(model: LanguageModel) -> CrossVocabDrafter:
    assert model.cross is not None, "checked by check_method"
    drafter = copy.copy(model.cross)  # what it knows of the tokenizers stays, what it learned does not
    drafter.cache = NGramCache()
    return drafter


def _universal(model: LanguageModel, ids: Tensor, options: dict[str, Any], capacity: int) -> Run:
    """The host's own way with another tokenizer."""
    assert model.cross is not None, "checked by check_method"
    draft, own = model.cross.model, model.cross.vocabularies.tokenizer
    given = {"assistant_model": draft, "assistant_tokenizer": own, "tokenizer": model.tokenizer}
    forwards = {"target": 0, "draft": 0}

    def count(name: str) -> Callable[..., None]:
        def counted(*_: Any) -> None:
            forwards[name] += 1

        return counted

    hooks = [one.register_forward_pre_hook(count(name)) for name, one in (("target", model.target), ("draft", draft))]
    try:
        run = _generate(model, ids, options | given)
    finally:
        for hook in hooks:
            hook.remove()
    run.report = Report(
        rounds=forwards["target"],
        tokens=len(run.tokens),
        target_forwards=forwards["target"],
        draft_forwards=forwards["draft"],
        cost=model.cross.cost(model.target),
    )
    return run


def _heads(model: LanguageModel, kind: str) -> Any:
    return model.heads[kind]


# Drafters of a target's own heads.
HEADS = {
    "hydra": "Hydra heads",
    "medusa": "Medusa heads",
    "longspec": "LongSpec layer",
    "falcon": "Falcon layer",
}

METHODS: dict[str, Method] = {
    "plain": Method("plain decoding", True, _plain),
    "chain": Method("chain", True, _speculation(_chain)),
    "adaptive": Method(
        "chain, adaptive", True, _speculation(lambda m: _from_draft(m, Chain(2 * m.length, confidence=0.3)))
    ),
    "tree": Method("tree of best paths", True, _speculation(_best_paths)),
    "sampled": Method("sampled tree, RRS", True, _speculation(_sampled)),
    "trimmed": Method("chain, VocabTrim 1/4", True, _speculation(_trimmed)),
    "pearl": Method("PEARL", True, _speculation(lambda m: PearlDrafter(m.draft, same_tokenizer=m.same_tokenizer))),
    "omnidraft": Method("OmniDraft, another tokenizer", True, _speculation(_omnidraft)),
    "universal": Method("transformers' own for another tokenizer", True, _universal),
    **{kind: Method(title, True, _speculation(partial(_heads, kind=kind))) for kind, title in HEADS.items()},
    "ngram": Method("n-grams, best first", True, _speculation(lambda m: NGramDrafter(nodes=m.nodes))),
    "ngram-puct": Method("n-grams, PUCT", True, _speculation(lambda m: NGramDrafter(search="puct", nodes=m.nodes))),
    "speckv": Method("SpecKV", False, partial(_cut, compress=False, evict=True)),
    "specpc": Method("SpecPC", False, partial(_cut, compress=True, evict=False)),
    "speckv-pc": Method("SpecKV-PC", False, partial(_cut, compress=True, evict=True)),
    "speckv-chain": Method("SpecKV + chain", False, partial(_cut, compress=False, evict=True, drafter=_chain)),
}


_UNIVERSAL = Version("5.24")  # known to work; 5.8 fails
_ALONE = ("plain", *HEADS, "ngram", "ngram-puct")  # that need no draft


def check_method(model: LanguageModel, name: str) -> Method:
    """The method of that name. Raises UserError for another name, or one that this model cannot have."""
    if name not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    lacking = _lacking(model, name)
    if lacking is not None:
        raise UserError(f"method {name!r} needs {lacking}")
    return METHODS[name]


def methods_of(model: LanguageModel) -> list[str]:
    """The names of all methods that a model can have."""
    return [name for name in METHODS if _lacking(model, name) is None]


def _lacking(model: LanguageModel, name: str) -> str | None:
    """What a method needs and a model has not; None where it can have it."""
    if name == "universal" and Version(transformers.__version__) < _UNIVERSAL:
        return f"transformers {_UNIVERSAL} or newer: older ones lose count of the draft's cache"
    if name in ("omnidraft", "universal"):
        return None if model.cross is not None else "a draft with another tokenizer, by --draft"
    if name not in _ALONE and model.draft is None:
        return "a draft with the target's tokenizer, by --draft; omnidraft and universal take others"
    if name == "trimmed" and model.counts is None:
        return "to know how often the target writes each token"
    if name in HEADS and name not in model.heads:
        return f"{name} heads, which {model.name} has not"
    return None


def generate_options(tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of generate. temperature: 0 takes the likeliest token each time.

    Raises UserError for fewer tokens than 1 and temperatures below 0, not finite, or too small to divide logits by.
    """
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be at least 0 and finite, got {temperature}")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise UserError(f"temperature must be 0 or at least {LEAST_TEMPERATURE:g}, got {temperature:g}")
    if temperature == 0:
        return {"max_new_tokens": tokens, "do_sample": False}
    return {"max_new_tokens": tokens, "do_sample": True, "temperature": temperature, "top_k": 0}
