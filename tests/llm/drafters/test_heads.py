"""Drafters that read hidden states, in generations: batches, short prompts, acceptance, cost, and other targets."""

import math
from itertools import cycle

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import Chain, EagleDrafter, HydraDrafter, KBest, MedusaDrafter, Pace, Sampled, StaticTree, report
from draftdiff.llm.heads.hydra import HydraHeads
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.pace import Pacer
from tests.llm.generation import both
from tests.llm.tabular import tabular_model
from tests.llm.tiny_heads import eagle, eagle_head, falcon, hydra, longspec, medusa
from tests.llm.tiny_models import FAMILIES, prompt, tiny_hybrid, tiny_model

MAKERS = {
    "Hydra": hydra,
    "Hydra++": lambda target: hydra(target, layers=4, prefix=True),
    "Medusa": medusa,
    "EAGLE-3": eagle,
    "LongSpec": longspec,
    "Falcon": falcon,
    "Falcon, three at once, recurrent": lambda target: falcon(target, k=3, recurrent=True),
}


@pytest.fixture(params=MAKERS, name="make")
def _make(request):
    return MAKERS[request.param]


class Watched:
    """Passes a drafter's proposals on and keeps them, by what the row's text was."""

    def __init__(self, drafter):
        self.drafter, self.proposals = drafter, {}

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def propose(self, context):
        trees = self.drafter.propose(context)
        for row, tree in enumerate(trees):
            if tree.tokens:
                self.proposals[tuple(context.ids[row][0, context.padding[row] :].tolist())] = tree
        return trees


def test_a_row_of_a_padded_batch_gets_the_drafts_that_it_gets_alone(make):
    target = tiny_model(layers=4)
    ids = prompt(12, batch=3)
    padding = torch.tensor([0, 4, 11])  # the last row has one token, of which no state is known at first
    mask = (torch.arange(12) >= padding[:, None]).long()
    together = Watched(make(target))
    plain, fast = both(target, together, ids * mask, attention_mask=mask, max_new_tokens=14)
    assert torch.equal(plain, fast)
    found = 0
    for row, skipped in enumerate(padding.tolist()):
        alone = Watched(make(target))
        both(target, alone, ids[row : row + 1, skipped:], max_new_tokens=14)
        for text, tree in alone.proposals.items():
            other = together.proposals[text]
            assert (tree.tokens, tree.parents) == (other.tokens, other.parents)
        found += len(alone.proposals)
    assert found > 12


# Falcon's blocks begin where a round did: after other rounds blocks of several tokens say something else.
STEADY = {name: make for name, make in MAKERS.items() if "Falcon" not in name}
STEADY["Falcon, one at once"] = lambda target: falcon(target, k=1, recurrent=True)


@pytest.mark.parametrize("make", STEADY.values(), ids=STEADY)
def test_rounds_without_drafts_are_read_when_drafts_go_on(make, monkeypatch):
    target = tiny_model(layers=4)
    ids = prompt(12, batch=2)
    always, sometimes = Watched(make(target)), Watched(make(target))
    both(target, always, ids, max_new_tokens=40)
    turns = cycle([0, 0, math.inf, 0, math.inf, 2, 0, 0, 0])
    monkeypatch.setattr(Pacer, "depth", lambda self: next(turns))
    monkeypatch.setattr(Pacer, "saw", lambda *_: None)
    plain, fast = both(target, sometimes, ids, max_new_tokens=40, pace=Pace(cost=0.1))
    assert torch.equal(plain, fast)
    same = [text for text in sometimes.proposals if text in always.proposals]
    for text in same:
        tree, other = sometimes.proposals[text], always.proposals[text]
        assert tree.tokens[0] == other.tokens[0]  # others differ as the first rounds had more room
    assert len(same) > 5


@pytest.mark.parametrize("name", ["mistral sliding", "gemma3_text", "qwen3"])
def test_heads_draft_for_other_families_too(name, make):
    target = tiny_model(name, layers=4)
    assert name in FAMILIES
    ids = prompt(20, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    plain, fast = both(target, make(target), ids * mask, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(plain, fast)


def test_chains_are_drafted_for_models_with_linear_attention():
    target, chain = tiny_hybrid(), StaticTree.from_widths((1, 1, 1))
    for drafter in (hydra(target, prefix=True, tree=chain), medusa(target, tree=chain), eagle(target, Chain(3))):
        plain, fast = both(target, drafter, prompt(9), max_new_tokens=20)
        assert torch.equal(plain, fast) and report(drafter).drafted > 20


@pytest.mark.parametrize("shape", [Chain(3), KBest(3, 2, 6), Sampled((2, 1)), Chain(5, confidence=0.2)], ids=str)
@pytest.mark.parametrize("sampling", [False, True])
def test_an_eagle_head_drafts_in_any_shape(shape, sampling):
    target = tiny_model(layers=4)
    drafter = eagle(target, shape, vocabulary=50)
    ids = prompt(9)
    plain, fast = both(target, drafter, ids, do_sample=sampling, max_new_tokens=16)
    done = report(drafter)
    assert fast.shape == plain.shape and (sampling or torch.equal(plain, fast))
    assert done.draft_forwards >= done.target_forwards - 1 and done.drafted > 0


def knowing():
    """A tabular target and heads that know its law of pairs by heart: head i reads the last two tokens it is shown."""
    target = tabular_model(0, 8)
    target.embedding.weight.data = torch.cat([torch.eye(8), torch.zeros(8, 8)], dim=1)

    class Knowing(HydraHeads):
        def guess(self, head, read):
            *_, before, last = read.unflatten(-1, (-1, 16)).unbind(-2)
            pair = (before[..., 8:] if head == 0 else before[..., :8]).argmax(-1), last[..., :8].argmax(-1)
            return target.table[pair]

    return target, Knowing(hydra(target).heads.settings, target)


def test_heads_that_know_the_target_are_always_accepted():
    target, heads = knowing()
    drafter = HydraDrafter(heads, StaticTree.from_widths((1, 1, 1)))
    plain, fast = both(target, drafter, prompt(4, vocab_size=8), max_new_tokens=41)
    done = report(drafter)
    assert torch.equal(plain, fast)
    assert done.acceptance == [1.0, 1.0, 1.0] and done.tokens_per_forward > 3.7
    wide = HydraDrafter(heads, StaticTree.from_widths((8, 8)))  # all there is
    both(target, wide, prompt(4, vocab_size=8), do_sample=True, top_k=0, max_new_tokens=31)
    assert report(wide).acceptance == [1.0, 1.0]


def test_the_report_counts_the_heads_that_ran_and_what_they_read():
    target = tiny_model(layers=2)
    drafter = hydra(target, tree=StaticTree.from_widths((2, 2)))
    both(target, drafter, prompt(6), max_new_tokens=12)
    done = report(drafter)
    assert done.draft_forwards <= 2 * done.target_forwards
    own = sum(p.numel() * 4 for p in drafter.heads.parameters())
    assert done.cost == pytest.approx(own / 3 / bytes_per_forward(target))
    shared = HydraDrafter.from_target(target, heads=2, own_output=False)
    own = sum(p.numel() * 4 for p in shared.heads.parameters()) + 2 * 4 * target.lm_head.weight.numel()
    assert shared.cost(target) == pytest.approx(own / 2 / bytes_per_forward(target))
    head = eagle_head(target, vocabulary=20, layers=(0, 1))
    assert EagleDrafter(head).cost(target) == pytest.approx(
        sum(p.numel() * 4 for p in head.parameters()) / bytes_per_forward(target)
    )


def test_other_targets_and_trees_that_do_not_fit_are_refused(make):
    target, other = tiny_model(layers=4), tiny_model(layers=3)
    with pytest.raises(UserError, match=r"for hidden size, layers and vocabulary \(64, 4, 96\), .* has \(64, 3, 96\)"):
        both(other, make(target), prompt(5))


def test_trees_that_do_not_fit_the_heads_are_refused():
    target = tiny_model(layers=1, vocab_size=8)
    with pytest.raises(UserError, match="the tree must be at most 2 deep, one level a head, got 3"):
        MedusaDrafter.from_target(target, tree=StaticTree.from_widths((1, 1, 1)), heads=2)
    with pytest.raises(UserError, match="the tree has 9 children of a node, the vocabulary 8 tokens"):
        HydraDrafter.from_target(target, tree=StaticTree.from_widths((9,)), heads=2)
    assert MedusaDrafter.from_target(target, heads=1).tree.depth == 1
    with pytest.raises(UserError, match="heads must be a whole number from 1 on, got 0"):
        HydraDrafter.from_target(target, heads=0)
