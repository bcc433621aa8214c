"""Budgets multiply their weights and refuse what they cannot be."""

import pytest
import torch

from draftdiff.core.budget import Budget, check_cache_budget, scale_capacities


def test_a_plain_budget_is_the_same_everywhere():
    assert torch.equal(Budget(0.75).density(3, 2), torch.full((3, 2), 0.25, dtype=torch.float64))


def test_weights_of_steps_layers_and_heads_multiply():
    budget = Budget(0.8, steps=(2.0, 1.0), layers=(1.0, 1.5), heads=(1.0, 0.5))
    expected = 0.2 * torch.tensor([[2.0, 1.0], [3.0, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(budget.density(2, 2, progress=0.0), expected)
    torch.testing.assert_close(budget.density(2, 2, progress=0.6), expected / 2)


def test_heads_may_be_given_per_layer_and_density_stops_at_one():
    budget = Budget(0.5, heads=((1.0, 4.0), (0.5, 1.0)))
    assert budget.density(2, 2).tolist() == [[0.5, 1.0], [0.25, 0.5]]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_named(sparsity):
    with pytest.raises(ValueError, match=f"sparsity must be at least 0 and below 1, got {sparsity}"):
        Budget(sparsity)


@pytest.mark.parametrize("weights", [(0.0,), (-1.0, 1.0), (float("inf"),)])
def test_a_weight_that_is_not_positive_is_named(weights):
    with pytest.raises(ValueError, match="budget weights must be positive, got layers="):
        Budget(0.5, layers=weights)


def test_weights_for_another_model_are_refused():
    with pytest.raises(ValueError, match=r"budget weights layers must have shape \(4,\) for this model, got \(2,\)"):
        Budget(0.5, layers=(1.0, 1.0)).density(4, 2)


TOKENS_1M = [side**2 for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)]
# ScaleKV's published tables: after which scale (number from 0), keys of a drafter and of a refiner layer.
TABLES = {
    "2b": (32, [(0, 23)] * 4 + [(0,)], [(920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465)]),
    "8b": (40, [(0, 1, 2)] * 5, [(909, 629), (1464, 584), (2463, 503), (4054, 374), (6200, 200)]),
}


@pytest.mark.parametrize("name", TABLES)
def test_both_published_tables_of_cache_budgets_come_out(name):
    layers, drafters, table = TABLES[name]
    rows = scale_capacities(TOKENS_1M, 650, layers, [()] * 8 + drafters, floor=200)
    assert rows[:7] == [None] * 7
    for row, drafting, (drafter, refiner) in zip(rows[7:], drafters, table):
        assert row == [drafter if layer in drafting else refiner for layer in range(layers)]


@pytest.mark.parametrize("decay", [None, (600, 70.0)])
@pytest.mark.parametrize("drafting", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_layers_keep_the_mean_together(decay, drafting):
    rows = scale_capacities(TOKENS_1M, 650, 4, [drafting] * 13, floor=200, decay=decay)
    for row in rows[7:]:
        assert sum(row) <= 4 * 650
        if decay is None:
            assert sum(row) == 4 * 650


def test_refiners_shrink_linearly_if_asked_to():
    rows = scale_capacities(TOKENS_1M, 650, 32, [(0, 23)] * 13, floor=200, decay=(600, 70.0))
    assert [row[1] for row in rows[7:]] == [600, 530, 460, 390, 320]


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, True, "half"])
def test_a_cache_budget_outside_its_range_is_an_error(budget):
    with pytest.raises(ValueError, match=r"budget must be above 0 and at most 1, got"):
        check_cache_budget(budget)
