"""Filters and draws against their definitions."""

import pytest
import torch

from draftdiff.var.sampling import Draws, filter_logits


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
