"""Random generations: greedy decoding with drafts writes what `generate` writes without, token for token, in fp64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from hypothesis import strategies as st

from draftdiff.llm import (
    Beams,
    Chain,
    KBest,
    ModelDrafter,
    NGramDrafter,
    NGramTable,
    Reranked,
    Sampled,
    StaticTree,
    assisted,
    report,
    speculative,
    trim,
)
from draftdiff.llm.verify import VERIFIERS
from tests.fuzz.engine import Case, Family
from tests.llm.tiny_heads import eagle, falcon, hydra, longspec, medusa
from tests.llm.tiny_models import tiny_model

VOCABULARY = 32  # small, so that drafts are right now and then


@dataclass(frozen=True, repr=False)
class DecodingCase(Case):
    """Calls of generate on random prompts, one after another with the same drafter.

    drafter: a kind of DRAFTERS and its arguments.  noise: between target and draft, None for another model.
    prompts: for each call the tokens of each row; shorter rows are padded on the left.  end: which token of the plain
    text ends it, None for none.  guessed: no mask is given, and the padding token stands anywhere in the prompts.
    options: more arguments of generate.
    """

    seed: int
    drafter: tuple
    prompts: tuple[tuple[int, ...], ...]
    model: tuple[str, int, int] = ("llama", 2, 2)
    noise: float | None = 0.05
    new: int = 12
    end: int | None = None
    guessed: bool = False
    options: tuple[tuple[str, float], ...] = ()


@lru_cache(maxsize=64)
def _model(family: str, layers: int, key_heads: int, seed: int):
    small = {"hidden": 32, "heads": 4, "vocab_size": VOCABULARY}
    return tiny_model(family, layers=layers, key_heads=key_heads, seed=seed, **small).double()


def _draft(case: DecodingCase):
    family, layers, key_heads = case.model
    if case.noise is None:
        return _model("llama", 1, 2, case.seed + 1)
    draft = copy.deepcopy(_model(family, layers, key_heads, case.seed))
    generator = torch.Generator().manual_seed(case.seed)
    for weight in draft.parameters():
        weight.data += case.noise * torch.randn(weight.shape, generator=generator)
    return draft


def _trimmed(case: DecodingCase, shape, size: int):
    counts = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(case.seed))
    return ModelDrafter(trim(_draft(case), counts, size), shape)


def _ngrams(case: DecodingCase, search: str, depth: int, nodes: int, known: int):
    text = torch.randint(0, VOCABULARY, (known,), generator=torch.Generator().manual_seed(case.seed)).tolist()
    table = NGramTable([text], successors=3) if known else None
    return NGramDrafter(table, search=search, depth=depth, nodes=nodes, iterations=20)


def _heads(case: DecodingCase, kind: str, *widths: int):
    target = _model(*case.model, case.seed)
    if kind == "EAGLE-3":
        drafter = eagle(target, Reranked(4, *widths), vocabulary=20)
        drafter.head.double()
        return drafter
    if kind == "LongSpec":
        drafter = longspec(target, Beams(widths))
        drafter.head.double()
        return drafter
    if kind.startswith("Falcon"):
        drafter = falcon(
            target, k=2 + len(widths) % 2, recurrent=kind.endswith("recurrent"), tree=StaticTree.from_widths(widths)
        )
        drafter.head.double()
        return drafter
    given = {"heads": len(widths), "tree": StaticTree.from_widths(widths)}
    if kind == "Medusa":
        drafter = medusa(target, **given)
    else:
        drafter = hydra(target, prefix=kind == "Hydra++", layers=2, **given)
    drafter.heads.double()
    return drafter


DRAFTERS = {
    "heads": _heads,
    "chain": lambda case, *given: ModelDrafter(_draft(case), Chain(*given)),
    "best": lambda case, *given: ModelDrafter(_draft(case), KBest(*given)),
    "best of all": lambda case, *given: ModelDrafter(_draft(case), Reranked(*given)),
    "tree": lambda case, *given: ModelDrafter(_draft(case), Sampled(*given)),
    "trimmed chain": lambda case, size, *given: _trimmed(case, Chain(*given), size),
    "trimmed tree": lambda case, size, *given: _trimmed(case, KBest(*given), size),
    "n-grams": _ngrams,
    "assisted": _ngrams,
}
_sure = st.sampled_from([0.0, 0.1, 0.4])
_chain = st.tuples(st.integers(1, 7), _sure)
_best = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(12, 20), _sure)
_pairs = [(sampler, verifier) for sampler, verifiers in VERIFIERS.items() for verifier in verifiers]
_branching = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
_tree = st.tuples(_branching, st.sampled_from(_pairs), _sure).map(lambda given: (given[0], *given[1], given[2]))
_table = st.tuples(
    st.sampled_from(["best_first", "puct"]), st.integers(1, 6), st.integers(1, 20), st.sampled_from([0, 40, 300])
)
_size = st.integers(4, VOCABULARY)
_kinds = st.sampled_from(["Hydra", "Hydra++", "Medusa", "LongSpec", "Falcon", "Falcon, recurrent"])
_widths = st.lists(st.integers(1, 4), min_size=1, max_size=3)
_heads_drawn = st.one_of(
    st.tuples(_kinds, _widths).map(lambda given: ("heads", given[0], *given[1])),
    st.tuples(st.integers(1, 4), st.integers(1, 12)).map(lambda given: ("heads", "EAGLE-3", *given)),
)
_drafters = st.one_of(
    _chain.map(lambda given: ("chain", *given)),
    _best.map(lambda given: ("best", *given)),
    _tree.map(lambda given: ("tree", *given)),
    st.tuples(_size, _chain).map(lambda given: ("trimmed chain", given[0], *given[1])),
    st.tuples(_size, _best).map(lambda given: ("trimmed tree", given[0], *given[1])),
    _best.map(lambda given: ("best of all", given[0], given[1], given[2])),
    _heads_drawn,
    _table.map(lambda given: ("n-grams", *given)),
    _table.map(lambda given: ("assisted", *given)),
)


@st.composite
def decoding_cases(draw: st.DrawFn) -> DecodingCase:
    drafter = draw(_drafters)
    lengths = st.lists(st.integers(1, 20), min_size=1, max_size=1 if drafter[0] == "assisted" else 3).map(tuple)
    model = st.sampled_from(["llama", "llama", "llama", "qwen3", "mistral sliding", "gemma3_text"])
    options = st.sampled_from(
        [(), (), (), (("repetition_penalty", 1.3),), (("no_repeat_ngram_size", 2),), (("min_new_tokens", 5),)]
    )
    return DecodingCase(
        seed=draw(st.integers(0, 7)),
        drafter=drafter,
        prompts=tuple(draw(st.lists(lengths, min_size=1, max_size=3))),
        model=(draw(model), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))),
        noise=draw(st.sampled_from([0.0, 0.02, 0.05, 0.2, None])),
        new=draw(st.integers(1, 30)),
        end=draw(st.none() | st.integers(0, 12)),
        guessed=drafter[0] != "assisted" and draw(st.sampled_from([False, False, False, True])),
        options=draw(options),
    )


def check_decoding(case: DecodingCase) -> str:
    """Raise unless drafts change nothing; returns the kind of drafter."""
    kind, *given = case.drafter
    target, drafter = _model(*case.model, case.seed), DRAFTERS[kind](case, *given)
    generator = torch.Generator().manual_seed(case.seed)
    for lengths in case.prompts:
        ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        options = {"attention_mask": mask.long(), "do_sample": False, "max_new_tokens": case.new, **dict(case.options)}
        ids = ids * mask
        if case.guessed:
            del options["attention_mask"]
            ids[torch.rand(ids.shape, generator=generator) < 0.3] = 0
        plain = target.generate(ids, **options)
        if case.end is not None and case.end < case.new:
            options["eos_token_id"] = int(plain[0, max(lengths) + case.end])
            plain = target.generate(ids, **options)
        way = assisted if kind == "assisted" else speculative
        fast = target.generate(ids, custom_generate=way, drafter=drafter, **options)
        assert torch.equal(plain, fast), f"{plain.tolist()} without drafts, {fast.tolist()} with"
        if kind != "assisted":
            done = report(drafter)
            assert done.target_forwards <= done.rounds <= done.tokens
    return kind


DECODING = Family("decoding", decoding_cases(), check_decoding, batch=25)
