"""PEARL: steps of draft and target side by side, the same tokens on one thread and on two, and what a step takes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from draftdiff.llm import Chain, ModelDrafter, PearlDrafter, report, speculative
from tests.llm.generation import both
from tests.llm.tabular import TabularModel, tabular_model, tabular_pair
from tests.llm.tiny_models import prompt, tiny_model


@pytest.fixture(name="threads", scope="module")
def _threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_two_threads_write_what_one_does(pair, threads, sampling, rows):
    texts, reports = [], []
    for executor in (None, threads):
        drafter = PearlDrafter(pair[1], 3, executor=executor)
        torch.manual_seed(3)
        options = {"do_sample": sampling, "top_k": 0, "temperature": 0.4, "max_new_tokens": 40, "pace": None}
        ids = prompt(12, batch=rows)
        texts.append(pair[0].generate(ids, custom_generate=speculative, drafter=drafter, **options))
        reports.append(report(drafter))
    assert torch.equal(*texts)
    one, two = reports
    assert (one.accepted, one.rounds, one.draft_forwards) == (two.accepted, two.rounds, two.draft_forwards)
    assert sum(one.accepted) > 0


def test_a_perfect_draft_grows_without_bound(pair):
    """After the first step, which verifies one token, each verifies gamma."""
    for gamma in (2, 4):
        drafter = PearlDrafter(pair[0], gamma)
        plain, fast = both(pair[0], drafter, prompt(12), max_new_tokens=1 + 5 * gamma)
        done = report(drafter)
        assert torch.equal(plain, fast)
        assert done.target_forwards == 6 and done.acceptance == [1] * gamma


def test_a_useless_draft_costs_no_step(pair):
    """Rejected in its first step, the draft never makes the target wait for a token: one a step."""
    drafter = PearlDrafter(tiny_model(seed=9), 3)
    plain, fast = both(pair[0], drafter, prompt(12), max_new_tokens=20)
    assert torch.equal(plain, fast) and report(drafter).target_forwards <= 20


@pytest.mark.parametrize("new", [1, 2, 3, 5, 8])
def test_no_token_too_many_and_none_that_was_not_verified(pair, new):
    plain, fast = both(pair[0], PearlDrafter(pair[1], 4), prompt(12), max_new_tokens=new)
    assert torch.equal(plain, fast) and fast.shape[1] == 12 + new


def test_the_end_token_ends_a_row_in_the_middle_of_a_chain(pair):
    plain = pair[0].generate(prompt(12, batch=2), do_sample=False, max_new_tokens=30)
    for place in range(13, 24):
        options = {"eos_token_id": int(plain[0, place]), "max_new_tokens": 30}
        plain_now, fast = both(pair[0], PearlDrafter(pair[1], 3), prompt(12, batch=2), **options)
        assert torch.equal(plain_now, fast)


def test_processors_and_prompts_as_short_as_a_token(pair):
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    plain, fast = both(pair[0], PearlDrafter(pair[1], 4), prompt(1), max_new_tokens=40, **options)
    assert torch.equal(plain, fast)


def test_rounds_without_drafts_in_between_lose_nothing(pair):
    class Now(PearlDrafter):
        turn = 0

        def propose(self, context):
            self.turn += 1
            room = [min(most, 100 if self.turn % 7 < 4 else 0 if self.turn % 7 < 6 else 1) for most in context.room]
            object.__setattr__(context, "room", room)
            return super().propose(context)

    plain, fast = both(pair[0], Now(pair[1], 3), prompt(12, batch=2), max_new_tokens=60)
    assert torch.equal(plain, fast)


def test_gamma_is_how_many_drafts_fit_into_a_forward_of_the_target():
    target, draft = tabular_pair()
    large, small = (_slow(model, seconds) for model, seconds in ((target, 0.03), (draft, 0.006)))
    drafter = PearlDrafter(small)
    both(large, drafter, torch.tensor([[3, 5]]), max_new_tokens=40)
    done = report(drafter)
    assert 4 <= done.draft_forwards / done.target_forwards <= 6
    torch.manual_seed(0)  # by bytes when sampling, the same each time
    counts = set()
    for _ in range(2):
        both(target, drafter, torch.tensor([[3, 5]]), do_sample=True, max_new_tokens=10)
        counts.add(report(drafter).draft_forwards / report(drafter).target_forwards)
    assert max(counts) <= 2


class Slow(TabularModel):
    """A model that takes its time, in which others may work."""

    seconds = 0.0

    def forward(self, input_ids, **given):
        time.sleep(self.seconds)
        return super().forward(input_ids, **given)


def _slow(model, seconds):
    slow = tabular_model(vocab_size=model.config.vocab_size)
    slow.__class__, slow.seconds = Slow, seconds
    slow.load_state_dict(model.state_dict())
    return slow


@pytest.mark.parametrize(("target_seconds", "draft_seconds"), [(0.04, 0.01), (0.02, 0.02)])
def test_a_step_takes_the_longer_of_the_two(threads, target_seconds, draft_seconds):
    """Sleeping models: beside each other as long as one alone, after each other as long as both. The difference is 40
    ms a step, and what else a step takes counts on both sides."""
    target, draft = tabular_pair()
    large, small = _slow(target, target_seconds), _slow(draft, draft_seconds)
    steps = {}
    for name, executor in (("one thread", None), ("two threads", threads)):
        drafter = PearlDrafter(small, 4, executor=executor)
        both(large, drafter, torch.tensor([[3, 5]]), max_new_tokens=24)
        done = report(drafter)
        steps[name] = (done.seconds - done.prompt_seconds) / done.target_forwards
    longer = max(target_seconds, 4 * draft_seconds)
    both_of_them = target_seconds + 4 * draft_seconds
    assert longer * 0.8 < steps["two threads"] < (longer + both_of_them) / 2 < steps["one thread"]


def test_fewer_steps_than_a_chain_has_rounds_and_drafts(pair):
    """A chain's round waits for its drafts; a step does not."""
    chain, pearl = ModelDrafter(pair[1], Chain(4)), PearlDrafter(pair[1], 4)
    for drafter in (chain, pearl):
        both(pair[0], drafter, prompt(12), max_new_tokens=60)
    rounds, steps = report(chain), report(pearl)
    t_target, t_draft = 4.0, 1.0
    alone = rounds.target_forwards * t_target + rounds.draft_forwards * t_draft
    assert steps.target_forwards * max(t_target, 4 * t_draft) < alone


@pytest.mark.parametrize("gamma", [0, -1, "many"])
def test_gamma_is_checked(pair, gamma):
    with pytest.raises(ValueError, match="gamma must be a number from 1 on or 'auto'"):
        PearlDrafter(pair[1], gamma)


def test_an_error_of_the_target_waits_for_the_draft(pair, threads):
    class Broken(ValueError):
        pass

    def fail(*_):
        raise Broken

    target, drafter = tiny_model(), PearlDrafter(_slow(tabular_model(0, 96), 0.05), 3, executor=threads)
    handle = []
    options = {"max_new_tokens": 9, "do_sample": False}
    target.register_forward_pre_hook(lambda *_: fail() if len(handle) > 1 else handle.append(1))
    with pytest.raises(Broken):
        target.generate(prompt(6), custom_generate=speculative, drafter=drafter, **options)
    assert drafter._session is None
