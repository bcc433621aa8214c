"""LongSpec drafts: memory that does not grow, and trees that say what the layer says of each path by itself."""

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import Beams, LongSpecDrafter, report
from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.train.longspec import read_keys
from draftdiff.llm.tree import ROOT, Tree
from tests.llm.generation import both
from tests.llm.tiny_heads import longspec
from tests.llm.tiny_models import prompt, tiny_model


@torch.no_grad()
def test_the_memory_of_the_layer_is_the_same_for_a_thousand_tokens_and_for_32_thousand():
    target = tiny_model(layers=1, hidden=32)
    drafter = longspec(target, Beams((2, 2)), window=512)
    sizes = []
    for length in (1024, 4096, 32768):
        ids = prompt(length)
        # What the target would hold of so long a text, made up: its attention on it would take minutes.
        decoder = TreeDecoder.prefill(target, ids[:, -2:])
        cached = decoder.cache.layers[0]
        cached.keys, cached.values = (x.expand(-1, -1, length - 1, -1).clone() for x in (cached.keys, cached.values))
        decoder.valid, decoder.next = decoder.valid.repeat(length - 1, axis=1), [length - 1]
        drafter.begin(Context(decoder, [0], [[]], False, [ids], [9]))
        (tree,) = drafter.propose(Context(decoder, [0], [[]], False, [ids], [9]))
        session = drafter._session
        tensors = [session.recent.keys, session.recent.values, *session._pending]
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors))
        assert len(tree.tokens) == 4
        drafter.end()
    heads, width = 2, 8
    assert sizes == [2 * 4 * heads * width * (512 + 1 + 2)] * 3  # the window, the last token, and the nodes expanded
    assert drafter._session is None


@pytest.mark.parametrize("window", [4, 30])
@torch.no_grad()
def test_each_node_of_a_tree_is_told_what_the_layer_says_of_its_path_alone(window):
    target = tiny_model(layers=2)
    drafter = longspec(target, window=window)
    ids = prompt(13)
    decoder = TreeDecoder.prefill(target, ids)
    context = Context(decoder, [0], [[]], False, [ids], [9])
    drafter.begin(context)
    session = drafter._session
    session.catch_up(context)
    trees = [Tree([5, 7, 9, 11, 13], [ROOT, ROOT, 0, 0, 2])]
    levels = [[0, 1], [2, 3], [4]]
    found = [row for nodes in levels for row in session.expand(context, trees, [nodes])[0]]
    keys, values, _ = read_keys(target, ids[:, :-1], torch.ones_like(ids[:, :-1]), torch.arange(12)[None])
    for node, law in enumerate(found):
        path = torch.tensor([[trees[0].tokens[n] for n in trees[0].path(node)]])
        text = torch.cat([ids, path], dim=1)
        lag = path.shape[1] + 1  # all keys of the target but that of its last token
        states = drafter.head(text, torch.arange(text.shape[1])[None], keys, values, lag)
        torch.testing.assert_close(law, drafter.head.logits(states)[0, -1].softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_target_of_other_keys_is_refused_and_cost_counts_the_output_layer():
    target = tiny_model(layers=2)
    drafter = longspec(target)
    own = sum(p.numel() for p in drafter.head.parameters()) + target.lm_head.weight.numel()
    rest = sum(p.numel() for name, p in target.named_parameters() if "embed_tokens" not in name)
    assert drafter.cost(target) == pytest.approx(own / rest)
    with pytest.raises(UserError, match=r"the head reads 2 keys of 16 a token, the last layer of Llama.* has 4 of 16"):
        both(tiny_model(layers=2, key_heads=4), drafter, prompt(5))


def test_without_anything_to_remember_it_drafts_too():
    target = tiny_model(layers=2)
    plain, fast = both(target, longspec(target), prompt(1), max_new_tokens=9)
    assert torch.equal(plain, fast)
    drafter = LongSpecDrafter.from_target(target, Beams((3, 5)))
    plain, fast = both(target, drafter, prompt(9), max_new_tokens=12)
    done = report(drafter)
    assert torch.equal(plain, fast) and done.draft_forwards <= 2 * done.target_forwards
    with pytest.raises(UserError, match=r"widths must be positive numbers, got \(2, 0\)"):
        Beams((2, 0))
