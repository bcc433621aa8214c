"""Parity of one golden case of EAGLE-3."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.drafters.eagle import EagleDrafter
from draftdiff.llm.drafters.shapes import Reranked
from draftdiff.llm.tree import ROOT, ancestors, as_mask
from tests.golden_cases import Case
from tests.golden_hydra import llama, padded, paths_of


def drafter(case: Case, target: LlamaForCausalLM) -> EagleDrafter:
    """The case's head, from files as the original publishes them, with the original's tree."""
    info = case.info
    shape = Reranked(depth=info["depth"] + 1, width=info["top_k"], nodes=info["total_token"] - 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.weights("pytorch_model.bin"), Path(folder, "pytorch_model.bin"))
        Path(folder, "config.json").write_text(json.dumps(info["head_config_as_stored"]))
        return EagleDrafter.from_pretrained(folder, target, shape)


@torch.no_grad()
def check_forward(case: Case, target: LlamaForCausalLM, ours: EagleDrafter) -> None:
    ids = case["fwd.input_ids"].long()
    assert list(ours.reads.layers) == case.info["hidden_layers"]
    found = target(ids[:, :-1], output_hidden_states=True).hidden_states
    states = torch.cat([found[layer] for layer in ours.reads.layers], dim=-1)
    case.same(states, "fwd.hidden3", "hidden")
    head = ours.head
    output = head(ids[:, 1:], None, torch.arange(ids.shape[1] - 1)[None], states=head.project(states))
    case.same(output.hidden_states[0], "fwd.hidden", "hidden")
    case.same(output.logits[..., head.emitted()], "fwd.logits", "logits")
    assert output.logits[..., ~head.t2d].isneginf().all()


@torch.no_grad()
def check_rounds(case: Case, target: LlamaForCausalLM, ours: EagleDrafter) -> None:
    """The original's rounds one after the other, each from what the last one has accepted."""
    prompt, greedy = case["gen.prompt"].long(), case["gen.greedy_ids"].long()
    ids = greedy[:, : prompt.shape[1] + 1]  # where the original begins a round it knows the root of the tree
    decoder = TreeDecoder.prefill(target, ids, layers=ours.reads.layers, whole=True)
    context = Context(decoder, [0], [[]], False, [ids], [100])
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    ours.head.register_forward_hook(
        lambda _, args, given, output: passes.append((given["input_ids"], output.hidden_states[0])), with_kwargs=True
    )
    ours.begin(context)
    for number, accepted in enumerate(case.info["generation"]["accept_length"]):
        at = f"gen.r{number}"
        if f"{at}.hidden3_in" in case.tensors:
            case.same(decoder.states[0][None], f"{at}.hidden3_in", "hidden")
        passes.clear()
        (tree,) = ours.propose(context)
        if number == 0 and prompt.shape[1] > 1:  # our first call reads the prompt in two pieces
            passes[:2] = [tuple(torch.cat(both, dim=1) for both in zip(*passes[:2]))]
        for j, (tokens, hidden) in enumerate(passes):
            if f"{at}.pass{j}_input_ids" in case.tensors:
                case.same(tokens, f"{at}.pass{j}_input_ids", "tokens")
                case.same(hidden, f"{at}.pass{j}_hidden", "hidden")
        assert f"{at}.pass{len(passes)}_hidden" not in case.tensors
        tokens, parents = [int(ids[0, -1]), *tree.tokens], [ROOT, *(parent + 1 for parent in tree.parents)]
        case.same(torch.tensor([tokens]), f"{at}.draft_tokens", "tokens")
        case.same(torch.from_numpy(as_mask(ancestors(parents), len(parents))), f"{at}.tree_mask", "masks")
        case.same(torch.tensor([0, *tree.depths()]), f"{at}.position_ids", "positions")
        case.same(padded(paths_of(parents)), f"{at}.retrieve_indices", "indices")
        output = decoder.feed([tokens], [parents])
        path, node = [0], tree.child(ROOT, int(output.logits[0, 0].argmax()))
        while node is not None:
            path.append(node + 1)
            node = tree.child(node, int(output.logits[0, path[-1]].argmax()))
        assert len(path) - 1 == accepted, f"round {number}"
        decoder.keep([path])
        drafted = torch.tensor([[tokens[node] for node in path[1:]]], dtype=torch.int64)
        ids = torch.cat([ids, drafted, output.logits[:, path[-1]].argmax(-1)[None]], dim=1)
        context = context.next_round([ids], [100], [tree], [[node - 1 for node in path[1:]]])
    text = case["gen.output_ids"].long()
    assert torch.equal(ids[:, : text.shape[1]], text) and torch.equal(text, greedy[:, : text.shape[1]])


def check_eagle(case: Case) -> None:
    """The head's forward, and every round of a generation: its passes, its tree, what is accepted, and the text."""
    target = llama(case, "target", "target_config")
    ours = drafter(case, target)
    check_forward(case, target, ours)
    check_rounds(case, target, ours)
