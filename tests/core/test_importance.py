"""Importance of keys against its definition, one row at a time."""

import math

import pytest
import torch

from draftdiff.core.importance import attention_mass, gather_kv, keep_topk, smooth


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


@pytest.mark.parametrize(("arguments", "message"), [((4,), "kernel must be odd"), ((5, "median"), "pooling must be")])
def test_other_windows_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        smooth(torch.zeros(1, 1, 3), *arguments)
