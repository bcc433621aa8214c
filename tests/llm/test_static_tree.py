"""Trees of ranks: their order, those that are refused, and those that are grown from measured acceptance."""

import itertools
import json

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import StaticTree
from draftdiff.llm.tree import ROOT
from tests.golden_cases import LLM_FOLDER

SHIPPED = LLM_FOLDER / "falcon_shipped_trees.json"


def test_nodes_are_sorted_by_depth_and_know_their_parents():
    tree = StaticTree([[1], [0, 0, 0], [0], [0, 1], [0, 0], [1, 0]])
    assert tree.paths == [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert tree.parents == [ROOT, ROOT, 0, 0, 1, 2]
    assert tree.levels == [range(2), range(2, 5), range(5, 6)]
    assert tree.depth == 3 and tree.width == 2


def test_widths_say_how_many_children_each_node_has():
    tree = StaticTree.from_widths((3, 2, 1))
    assert [len(level) for level in tree.levels] == [3, 6, 6] and tree.width == 3
    assert StaticTree.from_widths((1, 1)).paths == [(0,), (0, 0)]


@pytest.mark.skipif(not SHIPPED.exists(), reason="the data have no trees of Falcon's")
def test_broken_trees_that_were_published_are_refused_and_the_others_taken():
    refused = []
    for name, tree in json.loads(SHIPPED.read_text()).items():
        broken = tree["duplicates"] or tree["rank_gaps"] or tree["missing_parents"]
        if broken:
            with pytest.raises(UserError, match=r"twice|without a gap|lacks its parent"):
                StaticTree(tree["nodes"])
            refused.append(name)
        else:
            assert [len(level) for level in StaticTree(tree["nodes"]).levels] == tree["per_depth"]
    assert len(refused) >= 8


def test_mistakes_are_named_in_one_line():
    for paths, message in (
        ([[0], [1], [0]], r"node \[0\] is in the tree twice"),
        ([[0], [1, 0]], r"node \[1, 0\] of the tree lacks its parent \[1\]"),
        ([[0], [2]], r"the ranks below node \[\] of the tree must be 0, 1, 2, ... without a gap, got 2"),
        ([[0], [0, 1]], r"the ranks below node \[0\] of the tree must be .* got 1"),
        ([], "at least one node"),
        ([[0], []], "of at least one rank"),
    ):
        with pytest.raises(UserError, match=message):
            StaticTree(paths)
    with pytest.raises(UserError, match=r"widths must be positive numbers, got \(2, 0\)"):
        StaticTree.from_widths((2, 0))
    with pytest.raises(UserError, match="nodes must be at most 6 for this acceptance, got 7"):
        StaticTree.learned([[0.5, 0.2], [0.4, 0.1]], 7)


def gain(tree, table):
    """Tokens that a round gains beside the target's own: of each node the share of texts in which its path is right."""
    return sum(torch.tensor([table[d][rank] for d, rank in enumerate(path)]).prod().item() for path in tree.paths)


def above(path):
    """What must be in a tree for this node to be in it."""
    return {other for other in (path[:-1], (*path[:-1], path[-1] - 1)) if other and other[-1] >= 0}


def test_a_learned_tree_gains_as_much_as_any_of_its_size():
    generator = torch.Generator().manual_seed(0)
    for size in (3, 5):
        shares = torch.rand(2, 3, generator=generator).sort(descending=True).values
        table = (shares / shares.sum(1, keepdim=True) * torch.tensor([[0.9], [0.6]])).tolist()
        every = StaticTree.from_widths((3, 3)).paths
        whole = [set(paths) for paths in itertools.combinations(every, size)]
        whole = [paths for paths in whole if all(above(path) <= paths for path in paths)]
        best = max(gain(StaticTree(paths), table) for paths in whole)
        assert gain(StaticTree.learned(table, size), table) == pytest.approx(best)


def test_a_learned_tree_has_no_gap_where_a_later_rank_was_right_more_often():
    tree = StaticTree.learned(torch.tensor([[0.3, 0.1, 0.4]]), 3)
    assert tree.paths == [(0,), (1,), (2,)]
