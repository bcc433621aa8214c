"""Budgets multiply their weights and refuse what they cannot be."""

import numpy as np
import pytest
import torch

from draftdiff.core.budget import Budget, stretch_at
from draftdiff.errors import UserError


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


@pytest.mark.parametrize("sparsity", ["0.8", True, None, (0.5,)])
def test_a_sparsity_that_is_no_number_is_named(sparsity):
    with pytest.raises(UserError, match="sparsity must be at least 0 and below 1, got") as error:
        Budget(sparsity)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weights",
    [
        {"heads": 1.0},
        {"heads": "ab"},
        {"heads": ("a", "b")},
        {"heads": (True, True)},
        {"heads": (1j, 1.0)},
        {"heads": ((1.0, 2.0), (1.0,))},
        {"heads": ((1.0, 2.0), 3.0)},
        {"heads": np.zeros((40, 40))},
        {"layers": 1},
        {"layers": ((1.0,),)},
        {"steps": None},
        {"steps": ((1.0,), (2.0,))},
    ],
    ids=str,
)
def test_weights_of_another_kind_are_refused_when_the_budget_is_made(weights):
    with pytest.raises(UserError, match=r"budget weights must be .*, got") as error:
        Budget(0.5, **weights)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_lists_and_arrays_are_tuples():
    budget = Budget(np.float64(0.5), steps=[1, 2], layers=np.array([1.0, 2.0]), heads=[[1.0, 2.0], (3, 4)])
    assert budget == Budget(0.5, steps=(1, 2), layers=(1.0, 2.0), heads=((1.0, 2.0), (3, 4)))
    assert hash(budget)


def test_heads_may_be_given_for_each_stretch_of_the_steps():
    budget = Budget(0.0, heads=(((0.5, 1.0), (0.25, 0.5)), ((0.1, 0.2), (1.0, 2.0))))
    assert budget.density(2, 2, progress=0.49).tolist() == [[0.5, 1.0], [0.25, 0.5]]
    assert budget.density(2, 2, progress=0.5).tolist() == [[0.1, 0.2], [1.0, 1.0]]
    with pytest.raises(UserError, match=r"heads must have shape \(3, 2\) for this model, got \(2, 2\)"):
        budget.density(3, 2)


@pytest.mark.parametrize(
    "heads", [(((1.0,), (1.0, 2.0)),), (((1.0,),), ((1.0,), (1.0,))), ((((1.0,),),),), (((0.0,),),)]
)
def test_a_table_of_heads_that_is_uneven_too_deep_or_not_positive_is_refused(heads):
    with pytest.raises(UserError, match="budget weights must be"):
        Budget(0.5, heads=heads)


@pytest.mark.parametrize("stretches", [1, 3, 7, 50])
def test_every_stretch_of_the_steps_is_as_long_as_the_others(stretches):
    steps = 4 * stretches
    places = [stretch_at(step / steps, stretches) for step in range(steps)]
    assert places == [step // 4 for step in range(steps)]
    assert stretch_at(1.0, stretches) == stretches - 1
