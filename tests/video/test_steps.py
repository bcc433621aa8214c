"""Steps are those of the request, whatever a scheduler repeats, splits or leaves out."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from draftdiff.video.steps import Run


def places(run, timesteps, scheduler=None, steps=None):
    return [run.place(scheduler, torch.as_tensor(t), steps) for t in timesteps]


def steps_of(run, timesteps, steps=10):
    return [step for _, step, _ in places(run, timesteps, steps=steps)]


def run_scheduler(scheduler, steps, skip=0, scale=1.0, branches=2, begin=None):
    """What a run sees of a pipeline that steps this scheduler, entries before `skip` left out."""
    scheduler.set_timesteps(steps)
    run, seen = Run(), []
    x = torch.zeros(1, 2, 2, 2)
    if begin is not None:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[skip:]:
        seen += places(run, [t * scale] * branches, scheduler)
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    return seen


def unipc(**options):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **options)


SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "unipc": lambda: unipc(flow_shift=3.0),
    "dpm++": DPMSolverMultistepScheduler,
    "ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
    "ddim without an index": CogVideoXDDIMScheduler,
    "heun, two stages a step": HeunDiscreteScheduler,
    "flow heun": FlowMatchHeunDiscreteScheduler,
    "kdpm2, a step between": KDPM2AncestralDiscreteScheduler,
}


@pytest.mark.parametrize("count", [4, 10, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_of_the_request_is_counted_once(name, count):
    seen = run_scheduler(SCHEDULERS[name](), count)
    assert sorted({step for _, step, _ in seen}) == list(range(count))
    assert {total for *_, total in seen} == {count}
    assert {passage for passage, *_ in seen} == {0}
    assert seen == sorted(seen)


def test_timesteps_that_round_to_the_same_number_are_two_steps():
    scheduler = unipc(flow_shift=12.0)
    seen = run_scheduler(scheduler, 100, begin=0)
    assert len(scheduler.timesteps.unique()) < 100
    assert [step for _, step, _ in seen] == [i for i in range(100) for _ in range(2)]


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), unipc(), CogVideoXDDIMScheduler()], ids=str)
def test_steps_that_a_strength_leaves_out_do_not_count(scheduler):
    seen = run_scheduler(scheduler, 10, skip=4)
    assert [(step, total) for _, step, total in seen[::2]] == [(i, 6) for i in range(6)]


def test_timesteps_in_another_unit_do_not_hide_the_scheduler():
    seen = run_scheduler(FlowMatchHeunDiscreteScheduler(), 10, scale=1e-3)
    assert sorted({step for _, step, _ in seen}) == list(range(10))


def test_a_pipeline_that_steps_copies_of_its_scheduler_is_counted_by_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    seen = places(Run(), [t - 0.5 for t in scheduler.timesteps for _ in range(2)], scheduler, steps=5)
    assert [(step, total) for _, step, total in seen[::2]] == [(i, 5) for i in range(5)]


def test_a_schedule_set_anew_is_the_next_pass_of_the_run():
    scheduler, run, seen = FlowMatchEulerDiscreteScheduler(), Run(), []
    for _ in range(3):
        scheduler.set_timesteps(1)
        seen += places(run, scheduler.timesteps, scheduler)
    assert seen == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]


def test_without_a_scheduler_branches_of_one_timestep_count_once():
    assert steps_of(Run(), [999.0, 999.0, 800.0, 800.0, 600.0]) == [0, 0, 1, 1, 2]


def test_branches_of_a_rising_schedule_are_no_move_back():
    assert places(Run(), [0.0, 0.0, 400.0, 400.0, 900.0, 900.0], steps=3) == [
        (0, step, 3) for step in range(3) for _ in range(2)
    ]


def test_a_scheduler_that_names_no_order_goes_one_entry_a_step():
    class Plain:
        timesteps = torch.tensor([900.0, 500.0, 100.0])

    assert places(Run(), Plain.timesteps, Plain()) == [(0, step, 3) for step in range(3)]


@pytest.mark.parametrize("timesteps", [[999, 500, 100], [0, 400, 900]], ids=["falling", "rising"])
def test_without_a_scheduler_a_move_back_is_the_next_pass(timesteps):
    seen = places(Run(), timesteps * 2, steps=3)
    assert seen == [(p, s, 3) for p in range(2) for s in range(3)]


def test_timesteps_per_token_count_by_their_mean():
    assert steps_of(Run(), [torch.tensor([[0.0, t, t]]) for t in (999.0, 999.0, 700.0)]) == [0, 0, 1]


def test_timesteps_told_upwards_from_zero_begin_at_the_first():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.sigma_min = 0.0
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[-1] == 0
    run, x = Run(), torch.zeros(1, 2, 2, 2)
    for step, t in enumerate(scheduler.timesteps):
        assert places(run, [(1000 - t) / 1000], scheduler) == [(0, step, 4)]
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
