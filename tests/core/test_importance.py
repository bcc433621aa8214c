"""Importance of keys against its definition, one row at a time."""

import math

import pytest
import torch

from draftdiff.core.importance import attention_mass, gather_kv, importance_order, keep_topk, smooth


def test_mass_is_the_sum_of_softmax_rows():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 11, 8)
    expected = torch.zeros(2, 3, 11)
    for row in range(5):
        scores = (query[:, :, row, None] * key).sum(-1) / math.sqrt(8)
        expected += scores.softmax(-1)
    torch.testing.assert_close(attention_mass(query, key), expected)
    torch.testing.assert_close(attention_mass(query, key).sum(-1), torch.full((2, 3), 5.0))


def test_query_heads_that_share_a_key_head_add_up():
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 11, 8)
    each = attention_mass(query, key.repeat_interleave(3, dim=1))
    torch.testing.assert_close(attention_mass(query, key), each.unflatten(1, (2, 3)).sum(2))


def test_smoothing_is_a_window_over_neighbours():
    scores = torch.randn(1, 1, 7)
    padded = torch.nn.functional.pad(scores, (1, 1))
    average = torch.stack([padded[..., i : i + 3].mean(-1) for i in range(7)], dim=-1)
    torch.testing.assert_close(smooth(scores, 3, "average"), average)
    high = torch.nn.functional.pad(scores, (1, 1), value=-torch.inf)
    assert torch.equal(smooth(scores, 3, "max"), torch.stack([high[..., i : i + 3].amax(-1) for i in range(7)], dim=-1))


def test_the_best_are_kept_in_order_and_the_chosen_always():
    scores = torch.tensor([[[0.1, 5.0, 3.0, -torch.inf, 4.0]]])
    assert keep_topk(scores, 3).tolist() == [[[1, 2, 4]]]
    assert keep_topk(scores, 3, torch.tensor([0, 3])).tolist() == [[[0, 1, 3]]]
    # Even where all that is left has no score at all, nothing is kept twice.
    assert keep_topk(torch.full((1, 1, 4), -torch.inf), 3, torch.tensor([2])).unique().numel() == 3


def test_what_is_gathered_is_those_rows_in_memory_of_their_own():
    key, value = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    indices = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(6)]).view(2, 3, 4)
    kept_key, kept_value = gather_kv(key, value, indices)
    for batch in range(2):
        for head in range(3):
            assert torch.equal(kept_key[batch, head], key[batch, head, indices[batch, head]])
            assert torch.equal(kept_value[batch, head], value[batch, head, indices[batch, head]])
    assert kept_key.untyped_storage().nbytes() == kept_key.numel() * 4


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "kernel must be positive"), ((5, "median"), "pooling must be")]
)
def test_other_windows_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        smooth(torch.zeros(1, 1, 3), *arguments)


def test_an_even_window_reaches_one_further_to_the_right():
    scores = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 4.0, 0.0]]])
    assert smooth(scores, 4, "max").tolist() == [[[0.0, 0.0, 4.0, 4.0, 4.0, 4.0]]]
    assert smooth(scores, 4, "average").tolist() == [[[0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_mass_under_a_mask_and_weights_is_that_of_single_rows(reduce):
    """Row by row: soft cap, a causal mask with padding, weights by batch, and query heads 0-2 on key head 0."""
    torch.manual_seed(0)
    query, key = 3 * torch.randn(2, 6, 4, 8), torch.randn(2, 2, 9, 8)
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5).expand(2, 1, 4, 9).clone()
    mask[1, :, :, :3] = False
    mask[1, :, 0] = False  # a padded query
    weights = torch.rand(2, 4)
    expected = torch.zeros(2, 2, 9)
    for batch in range(2):
        for head in range(2):
            rows = []
            for query_head in range(3 * head, 3 * head + 3):
                for row in range(4):
                    allowed = mask[batch, 0, row].nonzero()[:, 0]
                    scores = (key[batch, head, allowed] * query[batch, query_head, row]).sum(-1) * 0.5
                    attention = torch.zeros(9)
                    attention[allowed] = (2 * (scores / 2).tanh()).softmax(-1)
                    rows.append(attention * weights[batch, row])
            expected[batch, head] = {
                "sum": sum,
                "mean": lambda r: sum(r) / 12,
                "max": lambda r: torch.stack(r).amax(0),
            }[reduce](rows)
    got = attention_mass(query, key, scale=0.5, softcap=2.0, mask=mask, weights=weights, reduce=reduce)
    torch.testing.assert_close(got, expected)


def test_another_reduction_is_an_error():
    with pytest.raises(ValueError, match="reduce must be one of sum, mean, max, got 'median'"):
        attention_mass(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), reduce="median")


def test_of_equals_the_peak_comes_first():
    scores = torch.tensor([[0.0, 1.0, 3.0, 1.0, 0.0, 2.0]])
    assert importance_order(smooth(scores, 3, "max"), scores).tolist() == [[2, 1, 3, 5, 4, 0]]
    assert importance_order(torch.ones(1, 4), torch.ones(1, 4)).tolist() == [[0, 1, 2, 3]]
