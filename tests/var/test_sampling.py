"""Filters and draws against their definitions."""

import pytest
import torch

from draftdiff.var.sampling import DRAWS, Draws, UpstreamDraws, filter_logits


def by_definition(row: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    kept = torch.ones_like(row, dtype=torch.bool)
    if top_k:
        kept &= row >= row.sort(descending=True).values[top_k - 1]
    if top_p:
        probabilities = row.masked_fill(~kept, -torch.inf).softmax(-1)
        total = 0.0
        for index in probabilities.argsort()[:-1]:
            total += float(probabilities[index])
            if total <= 1 - top_p:
                kept[index] = False
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 7, 40])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95])
def test_filters_keep_what_their_definition_keeps(top_k, top_p):
    logits = torch.randn(2, 5, 40) * 2
    kept = filter_logits(logits, top_k, top_p).isfinite()
    for row, mine in zip(logits.flatten(0, 1), kept.flatten(0, 1)):
        assert torch.equal(mine, by_definition(row, top_k, top_p))


def test_top_k_keeps_ties_and_may_exceed_the_vocabulary():
    logits = torch.tensor([[[1.0, 2.0, 2.0, 0.0]]])
    assert filter_logits(logits, 1).isfinite().sum() == 2
    assert torch.equal(filter_logits(logits, 900), logits)


def test_a_draw_is_that_of_torch_multinomial():
    logits = torch.randn(3, 7, 50)
    ours = Draws(torch.Generator().manual_seed(5)).codes(logits)
    theirs = torch.multinomial(
        logits.softmax(-1).view(-1, 50), 1, replacement=True, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(ours.flatten(), theirs.flatten())


def test_with_a_generator_per_item_an_item_does_not_depend_on_its_batch():
    logits = torch.randn(3, 7, 50)
    together = Draws([torch.Generator().manual_seed(seed) for seed in range(3)]).codes(logits)
    for seed in range(3):
        alone = Draws(torch.Generator().manual_seed(seed)).codes(logits[seed : seed + 1])
        assert torch.equal(together[seed : seed + 1], alone)


def test_the_originals_also_draw_what_they_do_not_use():
    logits = torch.randn(1, 7, 50)
    generator = torch.Generator().manual_seed(5)
    assert Draws(generator).unused_codes(logits) is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    expected = Draws(torch.Generator().manual_seed(5)).codes(logits)
    assert torch.equal(UpstreamDraws(generator).unused_codes(logits), expected)


@pytest.mark.parametrize("several", [False, True])
def test_at_a_hand_over_the_originals_start_from_the_seed_and_draw_labels_and_codes_again(several):
    logits = [torch.randn(2, tokens, 50) for tokens in (1, 4)]

    def generators():
        both = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        return both if several else both[0]

    fast, upstream = generators(), generators()
    draws, reference = UpstreamDraws(upstream), Draws(fast)
    for each in (draws, reference):
        each.labels(2, 10)
        for rows in logits:
            each.codes(rows)
    draws.mixture(logits[0], 1.0)  # noise that a refiner does not draw again
    draws.hand_over()
    assert torch.equal(draws.codes(logits[1]), reference.codes(logits[1]))
    before = reference.codes(logits[0])
    reference.hand_over()
    assert not torch.equal(reference.codes(logits[0]), before)  # it goes on


def test_bits_of_the_originals_are_draws_of_two_classes():
    logits = torch.randn(2, 30, 2)
    bits = DRAWS["upstream"](torch.Generator().manual_seed(5)).bits(logits, 0.9)
    expected = Draws(torch.Generator().manual_seed(5)).codes(filter_logits(logits, 0, 0.9))
    assert torch.equal(bits, expected)
