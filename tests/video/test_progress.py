"""Steps are counted from timesteps, whatever their form and direction."""

import pytest
import torch

from draftdiff.video.progress import Progress


def steps_of(progress, timesteps):
    return [progress.observe(torch.as_tensor(t)) for t in timesteps]


def test_cfg_branches_of_one_step_count_once():
    assert steps_of(Progress(), [999.0, 999.0, 800.0, 800.0, 600.0]) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("timesteps", [[999, 500, 100], [0, 400, 900]], ids=["falling", "rising"])
def test_a_move_back_is_a_new_run(timesteps):
    progress = Progress()
    assert steps_of(progress, timesteps * 2) == [0, 1, 2, 0, 1, 2]
    assert progress.run == 2


def test_a_run_that_was_broken_off_does_not_count_into_the_next():
    progress = Progress()
    steps_of(progress, [999, 900, 800])
    assert steps_of(progress, [999, 900]) == [0, 1]


def test_reset_starts_a_new_run_even_at_the_same_timestep():
    progress = Progress()
    steps_of(progress, [999.0])
    progress.reset()
    assert steps_of(progress, [999.0, 500.0]) == [0, 1]
    assert progress.run == 2


def test_timesteps_per_token_count_by_their_mean():
    tokens = [torch.tensor([[0.0, t, t]]) for t in (999.0, 999.0, 700.0)]
    assert steps_of(Progress(), tokens) == [0, 0, 1]
