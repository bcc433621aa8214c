"""Exact laws of the verification rules: every outcome of every random choice is walked, with its probability."""

import itertools

import pytest
import torch

from draftdiff.llm import verify

CASES = [(sampler, verifier) for sampler, verifiers in verify.VERIFIERS.items() for verifier in verifiers]


def distributions(vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(2, vocabulary, generator=generator)).double().softmax(-1)
    return p, q


def draws(q, count, sampler):
    """(tokens, probability) of all that a sampler may give."""
    vocabulary = len(q)
    if sampler == "with_replacement":
        for tokens in itertools.product(range(vocabulary), repeat=count):
            yield list(tokens), float(q[list(tokens)].prod())
    elif sampler == "without_replacement":
        for tokens in itertools.permutations(range(vocabulary), count):
            chance, left = 1.0, 1.0
            for token in tokens:
                chance *= float(q[token]) / left
                left -= float(q[token])
            yield list(tokens), chance
    else:
        best = q.topk(count - 1).indices.tolist()
        rest = q.clone()
        rest[best] = 0
        for token in range(vocabulary):
            yield [*best, token], float(rest[token] / rest.sum())


def law_of(rule, vocabulary, monkeypatch):
    """Distribution of what `rule` returns: all its random choices are made in turn."""
    law = torch.zeros(vocabulary, dtype=torch.float64)
    scripts = [[]]
    while scripts:
        script = scripts.pop()
        taken, weight = 0, 1.0

        def choose(chances, script=script):
            nonlocal taken, weight
            if taken == len(script):
                scripts.extend([*script, other] for other in range(1, len(chances)) if chances[other] > 0)
                script.append(0)
            choice = script[taken]
            taken += 1
            weight *= float(chances[choice])
            return choice

        def accepts(p, q, token, choose=choose):
            chance = min(1.0, float(p[token] / q[token]))
            return choose([chance, 1 - chance]) == 0

        monkeypatch.setattr(verify, "_accepts", accepts)
        monkeypatch.setattr(verify, "draw", lambda p, choose=choose: choose((p / p.sum()).tolist()))
        law[rule()] += weight
    return law


@pytest.mark.parametrize(("sampler", "verifier"), CASES)
@pytest.mark.parametrize(("vocabulary", "count", "seed"), [(5, 2, 0), (4, 3, 1), (5, 1, 2), (4, 4, 3)])
def test_every_rule_gives_exactly_the_targets_law(sampler, verifier, vocabulary, count, seed, monkeypatch):
    p, q = distributions(vocabulary, seed)
    law = torch.zeros(vocabulary, dtype=torch.float64)
    for tokens, chance in draws(q, count, sampler):
        if chance > 0:
            rule = lambda tokens=tokens: verify.reject(p, q, tokens, sampler, verifier)  # noqa: E731
            law += chance * law_of(rule, vocabulary, monkeypatch)
    torch.testing.assert_close(law, p, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampler", verify.SAMPLERS)
def test_samplers_draw_as_enumerated(sampler):
    _, q = distributions(4, 0)
    expected = {tuple(tokens): chance for tokens, chance in draws(q, 3, sampler)}
    n = 6000
    seen: dict[tuple, int] = {}
    for _ in range(n):
        tokens = tuple(verify.sample(q.float(), 3, sampler))
        seen[tokens] = seen.get(tokens, 0) + 1
    assert set(seen) <= {tokens for tokens, chance in expected.items() if chance > 0}
    for tokens, chance in expected.items():
        assert abs(seen.get(tokens, 0) / n - chance) < 5 * (chance * (1 - chance) / n) ** 0.5 + 1e-9


def test_no_more_tokens_are_sampled_than_have_a_chance():
    q = torch.tensor([0.0, 0.7, 0.0, 0.3])
    assert sorted(verify.sample(q, 4, "without_replacement")) == [1, 3]
    assert verify.sample(q, 4, "greedy") == [1, 3]


def test_a_token_whose_chance_is_barely_above_zero_is_drawn_before_those_of_none():
    q = torch.tensor([0.0, -95.0, -200.0, -200.0, -200.0, -200.0]).softmax(-1)  # a sure draft at a low temperature
    assert 0 < q[1] < 1e-38 and not q[2:].any()
    assert all(verify.sample(q, 2, "without_replacement") == [0, 1] for _ in range(50))


@pytest.mark.parametrize(("sampler", "verifier"), CASES)
def test_a_draft_that_knows_no_allowed_token_proposes_none(sampler, verifier):
    p = torch.tensor([0.0, 1.0, 0.0])
    nothing = torch.full((3,), -torch.inf).softmax(-1)
    assert verify.sample(nothing, 2, sampler) == []
    assert verify.reject(p, nothing, [], sampler, verifier) == 1


def test_a_token_of_zero_chance_is_never_drawn():
    p = torch.tensor([0.0, 1.0, 0.0])
    assert {verify.draw(p) for _ in range(200)} == {1}


def test_identical_distributions_accept_the_first_draft():
    p = torch.rand(6).softmax(-1)
    for sampler, verifier in CASES:
        if verifier in ("rrs", "greedy"):
            tokens = verify.sample(p, 2 if sampler != "greedy" else 1, sampler)
            assert verify.reject(p, p, tokens, sampler, verifier) == tokens[0]


@pytest.mark.parametrize(
    ("sampler", "verifier"), [("without_replacement", "k_seq"), ("greedy", "rrs"), ("beam", "rrs")]
)
def test_a_rule_that_would_be_biased_is_refused(sampler, verifier):
    p = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="must be one of"):
        verify.reject(p, p, [0, 1], sampler, verifier)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_is_no_distribution_is_not_drawn_from(value):
    with pytest.raises(ValueError, match="finite and not all 0"):
        verify.draw(torch.full((4,), value))
