"""The tree that is chosen from all that the draft has seen, of a model as of an EAGLE-3 head."""

import itertools

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import KBest, ModelDrafter, Reranked, report
from draftdiff.llm.tree import ROOT, Tree
from tests.llm.generation import both
from tests.llm.tiny_models import prompt


def grown(shape, laws, room=9):
    """The tree that a shape grows from laws by the tokens so far."""
    trees = [Tree()]

    def expand(nodes):
        tree = trees[0]
        return [torch.stack([laws[tuple(tree.tokens[n] for n in tree.path(node))] for node in nodes[0]])]

    shape.grow(trees, [laws[()][None]], [room], False, expand)
    return trees[0]


def random_laws(vocabulary=4, depth=4):
    generator = torch.Generator().manual_seed(2)
    paths = itertools.chain(*(itertools.product(range(vocabulary), repeat=n) for n in range(depth)))
    return {path: torch.rand(vocabulary, generator=generator).pow(3).add(1e-3) for path in paths}


def normed(laws):
    return {path: law / law.sum() for path, law in laws.items()}


def test_it_is_the_likeliest_tree_where_nothing_was_left_unexpanded():
    laws = normed(random_laws())
    tree = grown(Reranked(4, 64, 15), laws)
    paths = [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree.tokens))]
    chances = {
        path: torch.stack([laws[path[:n]][path[n]] for n in range(len(path))]).prod().item()
        for n in range(1, 5)
        for path in itertools.product(range(4), repeat=n)
    }
    best = sorted(chances, key=chances.get, reverse=True)[:15]
    assert sorted(paths) == sorted(best)
    assert all(parent < node for node, parent in enumerate(tree.parents)) and tree.parents[0] == ROOT
    assert max(grown(Reranked(4, 64, 15), laws, room=2).depths()) <= 2


def test_it_may_leave_out_what_was_expanded():
    laws = normed(random_laws())
    few = grown(Reranked(4, 3, 4), laws)
    assert len(few.tokens) == 4
    with pytest.raises(UserError, match="nodes must be at least width"):
        KBest(4, 3, 4)
    with pytest.raises(UserError, match="width must be at least 1, got 0"):
        Reranked(4, 0, 4)


def test_a_model_keeps_what_it_has_read_of_a_tree_that_was_cut(pair):
    target, draft = pair
    ids = prompt(12, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    drafter = ModelDrafter(draft, Reranked(4, 3, 6))
    plain, fast = both(target, drafter, ids * mask, attention_mask=mask, max_new_tokens=40)
    assert torch.equal(plain, fast)
    cut, whole = report(drafter), ModelDrafter(draft, KBest(4, 3, 9))
    both(target, whole, ids * mask, attention_mask=mask, max_new_tokens=40)
    assert cut.drafted < report(whole).drafted
    assert cut.tokens_per_forward > 0.8 * report(whole).tokens_per_forward > 1.2
