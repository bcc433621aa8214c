"""OmniDraft's formulas in exact fractions: no code was published, so the case is made from them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from draftdiff.llm.drafters.length_head import first_over
from draftdiff.llm.drafters.merging import NGramCache, merged_masses
from draftdiff.llm.retokenize import GrowingText, Vocabularies
from draftdiff.llm.verify import reject, residual
from tests.golden_cases import Case
from tests.llm.toy_tokenizers import greedy_tokenizer


def check_omnidraft(case: Case) -> None:
    """The law of merged tokens, acceptance and output law of both rules, merging, learning and stopping."""
    info = case.info
    vocabularies = Vocabularies(greedy_tokenizer(info["draft_vocab"]), greedy_tokenizer(info["target_vocab"]))
    direct = vocabularies.direct[: len(info["draft_vocab"])]  # not the tokenizer's own unknown token
    assert {str(d): t for d, t in enumerate(direct) if t >= 0} == info["direct_map"]
    assert [d for d, t in enumerate(direct) if t < 0] == info["unmapped_draft_tokens"]
    cache = NGramCache()
    for item in info["ngram_cache"]:
        assert cache.learn(item["target"], item["draft"])
    laws = {key: [Fraction(x) for x in law] for key, law in info["draft_law"].items()}

    def law(before):
        return laws[str(before[-1]) if before else "start"]

    q, unmapped = _merged_law(cache, direct, law, len(info["target_vocab"]))
    first = info["first_token"]
    assert q == [Fraction(x) for x in first["q_prime"]] and unmapped == Fraction(first["unmapped_mass"])
    assert sum(q) == Fraction(first["sum"])
    assert [float(x) for x in q] == pytest.approx(first["q_prime_float"], abs=1e-12)
    p = [Fraction(x) for x in info["target_law"]]
    assert sum(a * b for a, b in zip(p, q)) == Fraction(info["acceptance"]["match"])
    accepted = [min(pair) for pair in zip(p, q)]
    assert sum(accepted) == Fraction(info["acceptance"]["reject"])
    # The loop's own rule, with what cannot be proposed as one more token: its residual, then the law of what it emits.
    both = [torch.tensor([*map(float, x), rest], dtype=torch.float64) for x, rest in ((p, 0), (q, float(unmapped)))]
    emitted = torch.minimum(*both) + (1 - torch.minimum(*both).sum()) * residual(*both)
    expected = [float(Fraction(x)) for x in info["law_full_residual"]["law"]]
    assert emitted[:-1].tolist() == pytest.approx(expected, abs=1e-12) and emitted[-1] == 0
    assert reject(both[0][:-1].float(), both[1].float(), [len(p)], "with_replacement", "rrs") < len(p)
    for one in info["merge_sequences"]:
        _check_merging(one, cache, direct, law)
    for item in info["cache_fill"]:
        text = GrowingText(vocabularies)
        ids, aligned = text.update([item["target"]])
        assert ids == item["draft"] and [(a.start, a.stop) for a in aligned] == [(0, len(ids))]
        assert (len(ids) == 1 and direct[ids[0]] == item["target"]) == item["direct"]
        assert NGramCache().learn(item["target"], ids) == item["new_entry"]
    for one in info["stopping"]:
        assert first_over(one["a_hat"], one["threshold"]) == one["first_index_over"]


def _merged_law(cache, direct, law, size):
    masses = merged_masses((ngram for d in range(len(direct)) for ngram in cache.starting(d)), law)
    targets = {ngram: t for d in range(len(direct)) for ngram, t in cache.starting(d).items()}
    q, unmapped = [Fraction(0)] * size, Fraction(0)
    for d, t in enumerate(direct):
        mass = law(())[d] + masses.get((d,), 0)
        if t >= 0:
            q[t] += mass
        else:
            unmapped += mass
    for ngram, t in targets.items():
        q[t] += masses[ngram]
    return q, unmapped


def _check_merging(one, cache, direct, law):
    merged = cache.merge(one["draft"], direct)
    assert [m.token for m in merged] == one["target_ids"]
    for ours, theirs in zip(merged, one["merged"], strict=True):
        assert ours.token == theirs["target"] and one["draft"][ours.start : ours.stop] == theirs["draft"]
        product = Fraction(1)
        for place in range(ours.start, ours.stop):
            product *= law(tuple(one["draft"][:place]))[one["draft"][place]]
        assert product == Fraction(theirs["product"])
