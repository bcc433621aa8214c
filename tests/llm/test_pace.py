"""When drafts are made, and how deep: against rounds of known cost and chance, and text that does not follow."""

import itertools
import math
import random

import pytest
import torch

from draftdiff.llm import Chain, KBest, ModelDrafter, NGramDrafter, Pace, Sampled, report, speculative
from draftdiff.llm import speculation as loop
from draftdiff.llm.pace import Pacer
from draftdiff.llm.reporting import Report
from tests.llm.generation import both
from tests.llm.tiny_models import prompt


def simulate(pacer, chance, cost, rounds, *, verify=0.0, deepest=8, seed=0, noise=0.0):
    """(depths, tokens per unit of time) of rounds in which each level is accepted by `chance(round)`."""
    draws, depths, tokens, spent = random.Random(seed), [], 0, 0.0
    for turn in range(rounds):
        depth = min(pacer.depth(), deepest)
        taken = next((n for n in range(depth) if draws.random() >= chance(turn)), depth)
        seconds = (1 + depth * (cost + verify)) * (1 + noise * draws.random())
        pacer.saw([depth], [taken], taken + 1, seconds)
        depths.append(depth)
        tokens, spent = tokens + taken + 1, spent + seconds
    return depths, tokens / spent


def best(chance, cost):
    """The depth of most tokens per unit of time, and how many."""
    speeds = [(sum(chance**k for k in range(n + 1)) / (1 + n * cost), n) for n in range(9)]
    return max(speeds)[::-1]


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("measured", [False, True])
def test_the_speed_is_nearly_that_of_the_best_length(chance, cost, measured):
    pacer = Pacer(None if measured else cost, 0.05, whole=False)
    _, speed = simulate(pacer, lambda _: chance, cost, 1500, noise=0.1)
    assert speed * 1.05 > 0.9 * best(chance, cost)[1]  # the noise alone takes 5 %


def test_drafts_that_do_not_pay_cost_little_from_the_start():
    speeds = []
    for seed in range(20):
        pacer = Pacer(None, 0.19, whole=False)
        speeds.append(simulate(pacer, lambda _: 0.3, 0.25, 60, verify=0.15, seed=seed)[1])
    assert sum(speeds) / 20 > 0.95


def test_what_one_generation_learned_the_next_one_need_not_find_out():
    earlier, trials = None, []
    for seed in range(12):
        pacer = Pacer(None, 0.19, whole=False, earlier=earlier)
        depths, speed = simulate(pacer, lambda _: 0.1, 0.25, 60, verify=0.15, seed=seed)
        trials.append(sum(map(bool, depths)))
        pacer.tell(earlier := Report(level_cost=pacer.level_cost))
    assert sum(trials[1:]) / 11 < 0.4 * trials[0] and speed > 0.97
    changed = Pacer(None, 0.19, whole=False, earlier=earlier)
    depths, _ = simulate(changed, lambda _: 0.95, 0.05, 600)
    assert min(depths[-200:]) >= 3


def test_what_was_learned_counts_by_the_clock_alone_or_the_text_would_hang_on_it():
    learned = Report(level_cost=0.9, rest=200, wait=256, tried=[9, 1], accepted=[1, 0])
    one, other = (Pacer(0.1, 0.1, whole=False, earlier=earlier) for earlier in (None, learned))
    assert simulate(one, lambda _: 0.7, 0.1, 100) == simulate(other, lambda _: 0.7, 0.1, 100)


def test_after_a_while_drafts_are_tried_again_later_each_time():
    pacer = Pacer(None, 0.1, whole=False)
    depths, _ = simulate(pacer, lambda _: 0.0, 0.5, 2000)
    rests = [len(list(group)) for drafted, group in itertools.groupby(depths, key=bool) if not drafted]
    assert rests[-2] > 4 * rests[2] and max(rests) <= 257
    text_changes = Pacer(None, 0.1, whole=False)
    depths, _ = simulate(text_changes, lambda turn: 0.0 if turn < 200 else 0.95, 0.2, 1200)
    assert sum(depths[50:200]) < 40 and min(depths[-200:]) >= 3


def test_a_drafter_with_a_length_of_its_own_is_let_or_not():
    for chance, lets in ((0.95, True), (0.1, False)):
        pacer = Pacer(None, 0.2, whole=True)
        depths, _ = simulate(pacer, lambda _, chance=chance: chance, 0.2, 300, deepest=6)
        assert set(depths) <= {0, 6} and (depths.count(6) > 250) == lets
    unmeasured = Pacer(0.2, 0.2, whole=True)  # it may draft beside the target
    assert set(simulate(unmeasured, lambda _: 0.1, 0.2, 50, deepest=6)[0]) == {6}


def test_rows_that_have_ended_or_have_no_room_do_not_count():
    pacer = Pacer(0.1, 0.1, whole=False)
    assert pacer.depth() > 2
    pacer.saw([2, 0], [2, 0], 4, 1.0)
    assert pacer._reached[:3] == [1, 1, 0] and pacer._accepted[:3] == [1, 1, 0]


class Stutter:
    """A clock by which every round takes as long as chance has it."""

    def __init__(self, seed):
        self.draws, self.now = random.Random(seed), 0.0

    def perf_counter(self):
        self.now += self.draws.random() ** 4
        return self.now


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda draft: ModelDrafter(draft, Chain(4)),
        lambda draft: ModelDrafter(draft, KBest(4, 3, 16)),
        lambda draft: ModelDrafter(draft, Sampled((3, 2, 1))),
        lambda draft: NGramDrafter(nodes=8),
    ],
    ids=["chain", "best paths", "sampled", "n-grams"],
)
def test_the_text_does_not_depend_on_the_clock(pair, make, sampling, monkeypatch):
    target, draft = pair
    texts, pauses = [], set()
    for seed in range(3):
        monkeypatch.setattr(loop, "time", Stutter(seed))
        torch.manual_seed(5)
        drafter = make(draft)
        options = {"do_sample": sampling, "top_k": 0, "max_new_tokens": 60}
        texts.append(target.generate(prompt(12), custom_generate=speculative, drafter=drafter, **options))
        pauses.add(report(drafter).pauses)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    samples = sampling and getattr(drafter, "samples", True)
    assert (len(pauses) == 1) == samples


def test_a_perfect_draft_that_costs_as_much_as_its_target_is_left_aside(pair):
    drafter = ModelDrafter(pair[0], Chain(4))
    plain, fast = both(pair[0], drafter, prompt(12), max_new_tokens=100, pace=Pace(cost=1.0))
    assert torch.equal(plain, fast) and report(drafter).pauses > 60
    plain, fast = both(pair[0], drafter, prompt(12), max_new_tokens=100, pace=Pace(cost=0.1))
    assert torch.equal(plain, fast) and report(drafter).pauses == 0


def test_a_second_generation_of_a_drafter_writes_what_a_first_one_does(pair):
    target, draft = pair
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "custom_generate": speculative}
    texts, drafter = [], ModelDrafter(draft, Chain(4))
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(target.generate(prompt(12), drafter=drafter, **options))
    assert torch.equal(*texts)


def test_a_batch_has_one_pace(pair):
    drafter = ModelDrafter(pair[1], Chain(4))
    plain, fast = both(pair[0], drafter, prompt(12, batch=3), max_new_tokens=60, pace=Pace(cost="clock"))
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("cost", ["time", -1.0, math.inf])
def test_costs_are_checked(cost):
    with pytest.raises(ValueError, match="cost must be a number from 0 on or one of auto, clock, bytes"):
        Pace(cost=cost)
