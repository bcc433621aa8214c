"""A language model with its draft and tokenizer, and every method of draftdiff.llm as one call on them."""

from __future__ import annotations

import copy
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftdiff.devices import DTYPES, find_device, one_line
from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm.drafters.model import ModelDrafter
from draftdiff.llm.drafters.ngram import NGramDrafter
from draftdiff.llm.drafters.shapes import Chain, KBest, Sampled
from draftdiff.llm.reporting import Report
from draftdiff.llm.spec_kv import SpecKVConfig, speckv
from draftdiff.llm.spec_kv_pc import speckv_pc
from draftdiff.llm.spec_pc import SpecPCConfig, specpc
from draftdiff.llm.speculation import speculative
from draftdiff.llm.train.trim import trim

EMBEDDED = "mini-llm"
LEAST_TEMPERATURE = 1e-6  # logits over much less would be infinite in fp32


@dataclass(frozen=True)
class LanguageModel:
    """A target and its draft. length, nodes: of a chain and of a tree that suit them and the device.  counts: how often
    the target writes each token, [vocabulary], None if unknown."""

    name: str
    target: Any
    draft: Any
    tokenizer: Any
    length: int = 5
    nodes: int = 48
    counts: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.target.device


def load(
    target: str | None, draft: str | None, *, dtype: str | None = None, device: str | None = None
) -> LanguageModel:
    """Load a pair and put it on its device.

    target, draft: folders or Hugging Face Hub ids; both None is the embedded pair.  dtype: float32, float16 or
    bfloat16; None is bfloat16 on a GPU, and float32 on a CPU and for the embedded pair.  device: as in torch; None is
    CUDA if there is. Raises ValueError, in one line, for what cannot be loaded or does not belong together.
    """
    place = find_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (target is None) != (draft is None):
        raise ValueError(f"--model and --draft come together, got {target or draft!r} alone")
    if target is None or draft is None:
        return _embedded(DTYPES[dtype or "float32"], place)
    kind = DTYPES[dtype or ("float32" if place.type == "cpu" else "bfloat16")]
    tokenizers = [pretrained("AutoTokenizer", name) for name in (target, draft)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise ValueError(f"draft {draft!r} has another tokenizer than model {target!r}: they must share one")
    models = [pretrained("AutoModelForCausalLM", name, dtype=kind).to(place).eval() for name in (target, draft)]
    return LanguageModel(target, models[0], models[1], tokenizers[0])


def pretrained(kind: str, name: str, **options: Any) -> Any:
    """What an Auto class of transformers, by its name, loads from a folder or the Hub; ValueError, in one line, if it
    cannot."""
    import transformers

    folder = Path(name).expanduser()
    try:
        return getattr(transformers, kind).from_pretrained(folder if folder.is_dir() else name, **options)
    except Exception as error:  # hub, tokenizers and safetensors each have their own
        raise ValueError(f"model {name!r} cannot be loaded: {one_line(error)}") from error


def _embedded(dtype: torch.dtype, device: torch.device) -> LanguageModel:
    from draftdiff.pipelines.mini_llm import load_mini_llm, mini_llm_defaults

    target, draft, tokenizer = load_mini_llm(dtype)
    known = mini_llm_defaults()
    counts = torch.tensor(known["token_counts"]) if "token_counts" in known else None
    return LanguageModel(EMBEDDED, target.to(device), draft.to(device), tokenizer, known["length"], 12, counts)


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
    """One generation, timed."""
    given = dict(options)
    if drafter is not None:
        given |= {"custom_generate": speculative, "drafter": drafter}
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
        return _generate(model, ids, options, make(model))

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


def _chain(model: LanguageModel) -> ModelDrafter:
    return ModelDrafter(model.draft, Chain(model.length))


def _best_paths(model: LanguageModel) -> ModelDrafter:
    width = max(2, model.nodes // (2 * model.length))
    return ModelDrafter(model.draft, KBest(model.length, width, max(model.nodes, width * (model.length - 1))))


def _sampled(model: LanguageModel) -> ModelDrafter:
    return ModelDrafter(model.draft, Sampled((2, 2, 1) if model.nodes < 24 else (4, 2, 2, 1)))


def _trimmed(model: LanguageModel) -> ModelDrafter:
    if model.counts is None:
        raise ValueError("method 'trimmed' needs to know how often the target writes each token")
    return ModelDrafter(trim(model.draft, model.counts, len(model.counts) // 4), Chain(model.length))


METHODS: dict[str, Method] = {
    "plain": Method("plain decoding", True, _plain),
    "chain": Method("chain", True, _speculation(_chain)),
    "adaptive": Method(
        "chain, adaptive", True, _speculation(lambda m: ModelDrafter(m.draft, Chain(2 * m.length, confidence=0.3)))
    ),
    "tree": Method("tree of best paths", True, _speculation(_best_paths)),
    "sampled": Method("sampled tree, RRS", True, _speculation(_sampled)),
    "trimmed": Method("chain, VocabTrim 1/4", True, _speculation(_trimmed)),
    "ngram": Method("n-grams, best first", True, _speculation(lambda m: NGramDrafter(nodes=m.nodes))),
    "ngram-puct": Method("n-grams, PUCT", True, _speculation(lambda m: NGramDrafter(search="puct", nodes=m.nodes))),
    "speckv": Method("SpecKV", False, partial(_cut, compress=False, evict=True)),
    "specpc": Method("SpecPC", False, partial(_cut, compress=True, evict=False)),
    "speckv-pc": Method("SpecKV-PC", False, partial(_cut, compress=True, evict=True)),
    "speckv-chain": Method("SpecKV + chain", False, partial(_cut, compress=False, evict=True, drafter=_chain)),
}


def check_method(model: LanguageModel, name: str) -> Method:
    """The method of that name. Raises ValueError for another name, or one that this model cannot have."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if name == "trimmed":
        _trimmed(model)
    return METHODS[name]


# Modules of the standard library that the embedded pair has not seen, nor any file much like them.
UNSEEN = ("statistics", "socket", "trace", "webbrowser", "dataclasses", "ftplib", "modulefinder", "turtle")


def example_prompts(model: LanguageModel, count: int, tokens: int) -> list[Tensor]:
    """Pieces of unseen program text, int64 [1, tokens] each. Raises ValueError for more than there are."""
    if not 1 <= count <= len(UNSEEN):
        raise ValueError(f"there are 1 to {len(UNSEEN)} example prompts, got {count}")
    if tokens < 1:
        raise ValueError(f"prompts must have at least 1 token, got {tokens}")
    prompts = []
    for name in UNSEEN[:count]:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        half = text.index("\n", len(text) // 2) + 1
        ids = encode(model, text[half : half + 16 * tokens])[:, :tokens]
        if ids.shape[1] < tokens:
            raise ValueError(f"example prompts must have at most {ids.shape[1]} tokens (module {name}), got {tokens}")
        prompts.append(ids)
    return prompts


def encode(model: LanguageModel, text: str) -> Tensor:
    """Token ids int64 [1, tokens] of a prompt. Raises ValueError for an empty one, or one that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text!r} is not valid UTF-8") from None
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise ValueError(f"the prompt {text!r} is empty: at least one token is needed")
    return ids.to(model.device)


def generate_options(tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of generate. temperature: 0 takes the likeliest token each time.

    Raises ValueError for fewer tokens than 1 and temperatures below 0, not finite, or too small to divide logits by.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"temperature must be 0 or at least {LEAST_TEMPERATURE:g}, got {temperature:g}")
    if temperature == 0:
        return {"max_new_tokens": tokens, "do_sample": False}
    return {"max_new_tokens": tokens, "do_sample": True, "temperature": temperature, "top_k": 0}
