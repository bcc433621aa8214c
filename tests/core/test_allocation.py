"""Work goes where it saves most, and the line of allocations has nothing on it that another beats."""

import itertools

import pytest
import torch

from draftdiff.core.allocation import allocations, finer

LADDER = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
COST = torch.tensor([[0.2, 0.4, 1.1]], dtype=torch.float64)


def loss_of(*per_head):
    """[1 single, rungs, 1 stretch, 1 layer, heads] from (loss at each rung) of each head."""
    return torch.tensor(per_head, dtype=torch.float64).T[None, :, None, None]


def test_a_head_that_loses_much_gets_more_than_one_that_loses_nothing():
    line = allocations(LADDER, loss_of((10.0, 1.0, 0.0), (1e-3, 1e-4, 0.0)), COST, 1.0, (0.0,))
    densities = [one.density.flatten().tolist() for one in line]
    assert densities[0] == [0.1, 0.1] and densities[1] == [0.3, 0.1] and densities[-1] == [1.0, 1.0]


def test_the_line_starts_at_the_least_work_ends_dense_and_never_loses_more_for_more_work():
    torch.manual_seed(0)
    loss = torch.rand(2, 3, 2, 3, 4, dtype=torch.float64).sort(1, descending=True).values
    line = allocations(LADDER, loss, torch.cat([COST, COST * 1.1]), 1.0, (0.0, 0.05))
    assert line[0].work == pytest.approx(0.2) and line[-1].work == pytest.approx(1.0) and line[-1].loss == 0
    for one, more in itertools.pairwise(line):
        assert one.work < more.work and one.loss > more.loss
    assert {one.single for one in line[:-1]} <= {0.0, 0.05}


def test_no_other_choice_of_as_much_work_loses_less():
    torch.manual_seed(1)
    loss = torch.rand(1, 3, 1, 1, 4, dtype=torch.float64).sort(1, descending=True).values
    line = allocations(LADDER, loss, COST, 2.0, (0.0,))
    for choice in itertools.product(range(3), repeat=4):
        work = COST[0, list(choice)].mean().item() / 2.0
        lost = sum(loss[0, rung, 0, 0, head].item() for head, rung in enumerate(choice))
        assert not any(work <= one.work + 1e-12 and lost < one.loss - 1e-12 for one in line)


def test_a_layer_is_left_to_dense_attention_where_that_takes_less_time():
    loss = loss_of((10.0, 9.0, 0.0), (10.0, 9.0, 0.0))
    last = allocations(LADDER, loss, COST, 1.0, (0.0,))[-1]
    assert last.work == 1.0 and last.density.eq(1).all()
    cheaper = allocations(LADDER, loss, COST, 2.0, (0.0,))[-1]
    assert cheaper.work == pytest.approx(0.55) and cheaper.density.eq(1).all()


def test_between_two_densities_time_and_the_length_of_an_error_run_straight_and_what_was_recorded_stays():
    torch.manual_seed(2)
    slope = torch.rand(1, 1, 2, 3, 4, dtype=torch.float64)
    loss = (slope * (1 - LADDER)[:, None, None, None]).square()
    ladder, lost, cost = finer(LADDER, loss, 2 * LADDER[None] + 0.1)
    assert len(ladder) == lost.shape[1] == cost.shape[1] > len(LADDER) and (ladder.diff() > 0).all()
    kept = (ladder[:, None] == LADDER).any(1)
    assert kept.sum() == len(LADDER) and torch.equal(lost[:, kept], loss)
    torch.testing.assert_close(lost, (slope * (1 - ladder)[:, None, None, None]).square())
    torch.testing.assert_close(cost, 2 * ladder[None] + 0.1)
