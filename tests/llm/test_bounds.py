"""The bound against a linear-programming solver and brute force, each verifier's acceptance against enumeration."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from draftdiff.llm import bounds, verify
from draftdiff.llm.bounds import acceptance_upper_bound, expected_acceptance
from tests.llm.test_verify import CASES, distributions, draws, law_of

SIZES = [(4, 2), (5, 3), (6, 3), (5, 1), (5, 4)]


def transport(p, q, n, sampler):
    """The optimum by linear programming: how much of each target token can be given to each set of drafts."""
    proposals = [(set(tokens), chance) for tokens, chance in draws(q, n, sampler) if chance > 0]
    pairs = [(row, token) for row, (tokens, _) in enumerate(proposals) for token in tokens]
    limits = np.zeros((len(p) + len(proposals), len(pairs)))
    for column, (row, token) in enumerate(pairs):
        limits[token, column] = limits[len(p) + row, column] = 1
    given = np.concatenate([p.numpy(), [chance for _, chance in proposals]])
    return -linprog(-np.ones(len(pairs)), A_ub=limits, b_ub=given).fun


@pytest.mark.parametrize("sampler", verify.SAMPLERS)
@pytest.mark.parametrize(("vocabulary", "n"), SIZES)
def test_the_bound_is_the_linear_programs_optimum(sampler, vocabulary, n):
    for seed in range(4):
        p, q = distributions(vocabulary, seed)
        assert acceptance_upper_bound(p, q, n, sampler) == pytest.approx(transport(p, q, n, sampler), abs=1e-6)


@pytest.mark.parametrize(("sampler", "verifier"), CASES)
@pytest.mark.parametrize(("vocabulary", "n"), [(5, 2), (4, 3), (5, 1)])
def test_expected_acceptance_is_what_the_verifier_does(sampler, verifier, vocabulary, n, monkeypatch):
    p, q = distributions(vocabulary, 7)
    accepted = 0.0
    for tokens, chance in draws(q, n, sampler):

        def rule(tokens=tokens):
            """0 if one of the drafts was accepted, else 1."""
            final: list[int] = []
            draw = verify.draw
            verify.draw = lambda weights: final.append(draw(weights)) or final[-1]
            token = verify.reject(p, q, tokens, sampler, verifier)
            verify.draw = draw
            # A residual draw that meets a draft is an acceptance by the greedy rule and by matching only.
            return 0 if token in tokens and (not final or verifier in ("greedy", "match")) else 1

        if chance > 0:
            accepted += chance * float(law_of(rule, 2, monkeypatch)[0])
    tolerance = 3e-4 if (n, sampler, verifier) == (3, "without_replacement", "rrs") else 1e-6
    assert expected_acceptance(p, q, n, sampler, verifier) == pytest.approx(accepted, abs=tolerance)


def noisy_pair(vocabulary, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), (logits + torch.randn(vocabulary, generator=generator)).softmax(-1)


def all_in(q, n):
    """Chance that n draws without replacement are all among the first k tokens, for every k, by integrating races on a
    fine grid with every token convolved by itself."""
    t = torch.logspace(-6, 13, 6000, dtype=torch.float64)
    counts = torch.zeros(n, len(t), dtype=torch.float64)
    counts[0] = 1
    arrived = [1 - counts.sum(0)]
    for mass in q:
        stays = (-t * mass).exp()
        counts = counts * stays + torch.cat([torch.zeros(1, len(t), dtype=torch.float64), counts[:-1]]) * (1 - stays)
        arrived.append(1 - counts.sum(0))
    held = torch.cat([torch.zeros(1, dtype=torch.float64), q.cumsum(0)])
    rest = (1 - held).clamp(min=0)
    late = torch.stack(arrived)
    whole = torch.trapezoid(rest[:, None] * (-rest[:, None] * t).exp() * late * t, t.log(), dim=1)
    return torch.where(rest < 1e-9, 1.0, whole)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
def test_draws_without_replacement_are_counted_as_by_brute_force(n, spread):
    p, q = noisy_pair(150, spread)
    order = (q / p).argsort(descending=True)
    expected = all_in(q[order], n)
    got = bounds._Races(q[order], n).prefixes(torch.arange(151))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    inside = torch.cat([torch.zeros(1, dtype=torch.float64), p[order].cumsum(0)])
    bound = acceptance_upper_bound(p, q, n, "without_replacement")
    assert bound == pytest.approx(1 + float((inside - expected).min()), abs=2e-5)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_search_misses_no_prefix(n, spread):
    p, q = noisy_pair(700, spread)
    order = (q / p).argsort(descending=True)
    inside = torch.cat([torch.zeros(1, dtype=torch.float64), p[order].cumsum(0)])
    every = 1 + float((inside - bounds._Races(q[order], n).prefixes(torch.arange(701))).min())
    assert acceptance_upper_bound(p, q, n, "without_replacement") == pytest.approx(every, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_no_verifier_beats_the_bound_and_more_drafts_help(temperature):
    p, q = (noise.pow(1 / temperature) for noise in noisy_pair(4000, 3.0))
    p, q = p / p.sum(), q / q.sum()
    for sampler, verifiers in verify.VERIFIERS.items():
        last = 0.0
        for n in (1, 2, 3, 4):
            bound = acceptance_upper_bound(p, q, n, sampler)
            assert last <= bound + 1e-9 <= 1 + 2e-9
            last = bound
            for verifier in verifiers:
                assert expected_acceptance(p, q, n, sampler, verifier) <= bound + 2e-4
    for n in (2, 3):
        with_, without = (acceptance_upper_bound(p, q, n, s) for s in ("with_replacement", "without_replacement"))
        assert without >= with_ - 1e-9
    assert expected_acceptance(p, q, 3, "greedy", "greedy") == acceptance_upper_bound(p, q, 3, "greedy")


def normalised(law):
    total = sum(law)
    return [x / total for x in law] if total else law


def exact(p, q, n):
    """Bound, acceptance of recursive rejection and of matching, without replacement, in rational numbers."""
    p, q = (normalised([Fraction(float(x)) for x in law]) for law in (p, q))
    chances, recursive = {}, 0
    for tokens in itertools.permutations([token for token, x in enumerate(q) if x], n):
        chance, rejected, residual, left = 1, 1, p, q
        for token in tokens:
            chance *= left[token]
            rejected *= 1 - min(1, residual[token] / left[token])
            residual = normalised([max(x - y, 0) for x, y in zip(residual, left)])
            left = normalised([0 if other == token else x for other, x in enumerate(left)])
        recursive += chance * (1 - rejected)
        chances[frozenset(tokens)] = chances.get(frozenset(tokens), 0) + chance
    sets = [set(h) for k in range(len(p) + 1) for h in itertools.combinations(range(len(p)), k)]
    bound = 1 + min(sum(p[i] for i in h) - sum(c for drawn, c in chances.items() if drawn <= h) for h in sets)
    matched = sum(p[token] * c for drawn, c in chances.items() for token in drawn)
    return float(bound), float(recursive), float(matched)


SURE = [  # logits of p and q
    *(([0.3, 0.4, 0.2, 0.1], [0, low, low - 1, low - 2]) for low in (-5, -27, -29, -35, -60, -200)),
    ([0.3, 0.4, 0.2, 0.1], [0, -40, -80, -120]),
    ([0.3, 0.4, 0.2, 0.1], [-50, -90, -51, 0]),
    ([0.3, 0.4, 0.2, 0.1], [0, 0, -45, -45]),
    ([0.0, 0.6, 0.4, 0.0], [0, -np.inf, -50, -51]),
    ([1.0, 1e-14, 1e-30, 1e-300], [0, -33, -60, -70]),
]


@pytest.mark.parametrize(("p", "logits"), SURE)
def test_a_draft_that_is_sure_of_few_tokens_is_judged_as_in_rational_numbers(p, logits):
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(logits, dtype=torch.float64).softmax(-1)
    for n in range(1, 1 + int((q > 0).sum())):
        bound, recursive, matched = exact(p, q, n)
        given = (p, q, n, "without_replacement")
        assert acceptance_upper_bound(*given) == pytest.approx(bound, abs=1e-6)
        assert expected_acceptance(*given, "rrs") == pytest.approx(recursive, abs=2e-4 if n > 2 else 1e-9)
        assert expected_acceptance(*given, "match") == pytest.approx(matched, abs=1e-6)


@pytest.mark.parametrize("verifier", ["rrs", "match"])
def test_a_draft_of_all_possible_tokens_is_always_accepted(verifier):
    for low in (0.0, -10.0, -30.0, -90.0):
        p, q = torch.tensor([0.0, 1, 0, 3, 2]).softmax(-1), torch.tensor([low, 0, 2 * low, low - 1, low]).softmax(-1)
        count = int((q > 0).sum())
        p = p * (q > 0)
        assert acceptance_upper_bound(p, q, count, "without_replacement") == pytest.approx(1, abs=1e-6)
        assert expected_acceptance(p, q, count, "without_replacement", verifier) == pytest.approx(1, abs=1e-6)


def test_a_draft_of_one_token_or_of_the_targets_law_is_judged_right():
    p = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.float64)
    only = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for sampler, verifiers in verify.VERIFIERS.items():
        assert acceptance_upper_bound(p, only, 1, sampler) == pytest.approx(0.4)
        assert acceptance_upper_bound(p, p, 2, sampler) == pytest.approx(1)
        for verifier in verifiers:
            assert expected_acceptance(p, only, 1, sampler, verifier) == pytest.approx(0.4, abs=1e-6)
    for n in (1, 2, 3):
        assert expected_acceptance(p, p, n, "without_replacement", "rrs") == pytest.approx(1)


def test_one_draft_is_bounded_by_the_overlap():
    p, q = noisy_pair(500, 2.0)
    for sampler in verify.SAMPLERS:
        assert acceptance_upper_bound(p, q, 1, sampler) == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-9)


def test_large_vocabularies_are_handled():
    p, q = noisy_pair(128_256, 3.0)
    assert 0.5 < acceptance_upper_bound(p.float(), q.float(), 4, "without_replacement") < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"sampler": "beam"}, "sampler must be one of"),
        ({"p": torch.ones(3)}, "vectors of one size"),
        ({"sampler": "greedy", "n": 9}, "n must be at most the 4 tokens"),
    ],
)
def test_bad_input_is_named(given, message):
    p, q = distributions(4, 0)
    with pytest.raises(ValueError, match=message):
        acceptance_upper_bound(**{"p": p, "q": q, "n": 2, "sampler": "with_replacement"} | given)


def test_a_verifier_must_fit_the_sampler():
    p, q = distributions(4, 0)
    with pytest.raises(ValueError, match="verifier for sampler 'greedy' must be one of greedy, match, got 'rrs'"):
        expected_acceptance(p, q, 2, "greedy", "rrs")


@pytest.mark.parametrize("sampler", ["without_replacement", "greedy"])
def test_as_many_drafts_as_the_draft_can_give_are_allowed_and_one_more_is_not(sampler):
    p, q = distributions(5, 0)
    q = q.index_fill(0, torch.tensor([1, 3]), 0)
    assert acceptance_upper_bound(p, q, 3, sampler) <= 1
    with pytest.raises(ValueError, match="n must be at most the 3 tokens that q can give, got 4"):
        acceptance_upper_bound(p, q, 4, sampler)


@pytest.mark.parametrize("n", [2, 3])
def test_each_tokens_chance_to_be_drawn_is_that_of_enumeration(n):
    q = torch.tensor([0.6, 0.2, 0.1, 0.06, 0.03, 0.01], dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    for tokens in itertools.permutations(range(6), n):
        chance, left = 1.0, 1.0
        for token in tokens:
            chance, left = chance * float(q[token]) / left, left - float(q[token])
        expected[list(tokens)] += chance
    torch.testing.assert_close(bounds._Races(q, n).included(), expected, atol=1e-6, rtol=0)
