"""Falcon drafts: passes over a tree say what each path says alone, rounds that accept little, and trees with faults."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from draftdiff.errors import UserError
from draftdiff.llm import FalconDrafter, StaticTree, report
from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.heads.falcon import FalconHead
from tests.llm.generation import both
from tests.llm.tiny_heads import falcon
from tests.llm.tiny_models import prompt, tiny_model

TREE = StaticTree([*([i] for i in range(4)), *([i, j] for i in range(2) for j in range(3)), [0, 1, 0], [1, 0, 0],
                   [1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0],
                   [1, 0, 1, 0, 0, 1]])  # fmt: skip
SHIPPED = Path(__file__).parents[2] / "golden_llm" / "falcon_shipped_trees.json"


def alone(head, ids, states, path, carried):
    """The tokens on a path of ranks, from passes over it by itself."""
    k, cache, tokens = head.settings.k, DynamicCache(config=head.config), []
    read_ids, features, start = ids[:, 1:], states, 0
    for first in range(0, len(path), k):
        read, carried = head.read(read_ids, features, carried)
        places = start + torch.arange(read.shape[1])[None]
        output = head(None, None, places, cache, states=read)
        start += read.shape[1]
        features, logits = output.hidden_states[0][:, -k:], output.logits[0, -k:]
        ranks = path[first : first + k]
        tokens += [int(logits[row].topk(rank + 1).indices[-1]) for row, rank in enumerate(ranks)]
        read_ids = torch.tensor([tokens[-k:]])
    return tokens


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_each_node_of_a_tree_is_what_passes_over_its_path_alone_guess(k, recurrent):
    target = tiny_model(layers=2)
    drafter = falcon(target, k=k, recurrent=recurrent, tree=TREE)
    ids = prompt(12)
    decoder = TreeDecoder.prefill(target, ids, layers=(-1,), whole=True)
    context = Context(decoder, [0], [[]], False, [ids], [9])
    drafter.begin(context)
    (tree,) = drafter.propose(context)
    states = decoder.states[0][None]
    assert tree.parents == TREE.parents and states.shape[1] == 11
    for node, path in enumerate(TREE.paths):
        expected = alone(drafter.head, ids, states, path, None)
        assert [tree.tokens[n] for n in tree.path(node)] == expected, path


class Scripted:
    """Hands on a drafter's proposals and remembers what the layer was fed in each round."""

    def __init__(self, drafter):
        self.drafter, self.rounds = drafter, []

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def propose(self, context):
        trees = self.drafter.propose(context)
        if trees[0].tokens:
            accepted = len(context.target.states[0])
            self.rounds.append((accepted, self.drafter._follower.known[0]))
        return trees


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_last_rows_are_read_again_where_fewer_than_a_block_are_new(k, recurrent):
    target = tiny_model(layers=2)
    drafter = Scripted(falcon(target, k=k, recurrent=recurrent))
    plain, fast = both(target, drafter, prompt(11), max_new_tokens=24)
    assert torch.equal(plain, fast)
    (first, fed), *rest = drafter.rounds
    assert first == 10 and fed == k + 10 % k
    assert all(fed == (new if new >= k else new + k - 1) for new, fed in rest)
    assert any(new < k for new, _ in rest)


@torch.no_grad()
def test_a_long_generations_cache_is_that_of_its_rounds_made_anew():
    """In each round the keys are those of an LSTM and layer that have read the whole text in the same pieces."""
    target = tiny_model(layers=2)
    drafter = falcon(target, recurrent=True, tree=StaticTree.from_widths((2, 1)))
    ids = prompt(8)
    decoder = TreeDecoder.prefill(target, ids, layers=(-1,), whole=True)
    context = Context(decoder, [0], [[]], False, [ids], [90])
    drafter.begin(context)
    drafter.propose(context)
    follower, states = drafter._follower, [decoder.states[0]]
    for _ in range(5):
        output = decoder.feed([[int(ids[0, -1])]], [[-1]])
        decoder.keep([[0]])
        states.append(decoder.states[0])
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        context = context.next_round([ids], [90], [], [])
        drafter.propose(context)
    text = torch.cat(states)[None]
    _, whole = drafter.head.read(ids[:, 1:], text)
    for ours, theirs in zip(follower.ends, whole):
        torch.testing.assert_close(ours, theirs)
    follower._keep([follower.known[0]])
    assert follower.decoder.cache.get_seq_length() == text.shape[1] == ids.shape[1] - 1


def test_a_layer_that_guesses_one_token_is_a_causal_one():
    target = tiny_model(layers=2)
    head = falcon(target, k=1).head
    states = torch.randn(1, 7, 64)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    places = torch.arange(7)[None]
    with torch.no_grad():
        ours = head(None, None, places, states=states).logits
        torch.testing.assert_close(ours, head(None, causal, places, states=states).logits)


@pytest.mark.parametrize("name", json.loads(SHIPPED.read_text()))
def test_the_originals_trees_are_taken_or_refused_with_the_reason(name):
    told = json.loads(SHIPPED.read_text())[name]
    faults = told["duplicates"] + told["missing_parents"] + told["rank_gaps"]
    if not faults:
        tree = StaticTree(told["nodes"])
        assert [len(level) for level in tree.levels] == told["per_depth"]
        return
    with pytest.raises(UserError, match=r"is in the tree twice|without a gap, got|lacks its parent") as caught:
        StaticTree(told["nodes"])
    assert any(str(list(node)) in str(caught.value) or str(list(node[:-1])) in str(caught.value) for node in faults)


def test_short_rows_passes_and_cost():
    target = tiny_model(layers=2)
    drafter = FalconDrafter.from_target(target, k=3, passes=2)
    assert drafter.tree.depth == 6
    for length in (1, 2, 3, 4):  # at first fewer states than a block are known
        plain, fast = both(target, drafter, prompt(length), max_new_tokens=9)
        assert torch.equal(plain, fast)
    done = report(drafter)
    assert done.drafted > 0 and done.draft_forwards <= 2 * done.target_forwards
    own = sum(p.numel() for p in drafter.head.parameters()) + target.lm_head.weight.numel()
    rest = sum(p.numel() for name, p in target.named_parameters() if "embed_tokens" not in name)
    assert drafter.cost(target) == pytest.approx(own / rest)
    with pytest.raises(UserError, match="passes must be at least 1, got 0"):
        FalconDrafter.from_target(target, passes=0)
    with pytest.raises(UserError, match="the tree has 97 children of a node, the vocabulary 96"):
        FalconDrafter(FalconHead.from_target(target), StaticTree.from_widths((97,)))
