"""Parity of one golden case of Falcon."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.drafters.falcon import FalconDrafter
from draftdiff.llm.heads.falcon import FalconHead, relaxed_mask
from draftdiff.llm.static_tree import StaticTree
from draftdiff.llm.train.falcon import (
    WEIGHTS,
    distillation_sums,
    glance,
    glance_share,
    glanced_positions,
    guess,
)
from draftdiff.llm.tree import ROOT, ancestors, as_mask
from tests.golden_cases import Case
from tests.golden_hydra import llama, padded, paths_of


def drafter(
    case: Case, target: LlamaForCausalLM, tree: StaticTree | None = None, recurrent: bool = False
) -> FalconDrafter:
    """The case's layer, from files as the original publishes them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.weights("pytorch_model.bin"), Path(folder, "pytorch_model.bin"))
        Path(folder, "config.json").write_text(json.dumps(case.info["draft_config_as_stored"]))
        return FalconDrafter.from_pretrained(folder, target, tree, recurrent)


def check_masks(case: Case) -> None:
    names = [name for name in case.tensors if name.startswith("mask.")]
    assert names
    for name in names:
        k, new, past = map(int, re.fullmatch(r"mask\.k(\d+)\.T(\d+)\.past(\d+)", name).groups())
        case.same(relaxed_mask(new, past, k)[0], name, "masks")


@torch.no_grad()
def check_forward(case: Case, target: LlamaForCausalLM) -> None:
    ids, features = case["fwd.input_ids"].long(), case["fwd.features"]
    found = target(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
    case.same(found, features, "hidden")
    places = torch.arange(features.shape[1])[None]
    for reading in ("per_position", "recurrent"):
        at, head = f"fwd.{reading}", drafter(case, target, recurrent=reading == "recurrent").head
        read, _ = head.read(ids[:, 1:], features)
        case.same(read, f"{at}.lstm", "hidden")
        states, logits = guess(head, head, ids[:, 1:], features)
        case.same(states, f"{at}.hidden", "hidden")
        case.same(logits, f"{at}.logits", "logits")
        if f"{at}.hidden_chunk2" in case.tensors:
            expected = case[f"{at}.hidden_chunk2"]
            cut, cache = read.shape[1] - expected.shape[1], DynamicCache(config=head.config)
            for part in (slice(0, cut), slice(cut, None)):
                output = head(None, None, places[:, part], cache, states=read[:, part])
            case.same(output.hidden_states[0], expected, "hidden")


def check_distillation(case: Case, target: LlamaForCausalLM) -> None:
    """Each recorded step: what the first pass gets right, what is replaced, the losses, and the gradients."""
    info, k, features = case.info["csgd"], case.info["k"], case["csgd.features"]
    ids, data = case["csgd.input_ids"].long(), {}
    for name in ("input_ids", "input_ids_target", "loss_mask"):
        data[name] = case[f"csgd.data.{name}"].long()
    counted = data["loss_mask"].bool()
    length = ids.shape[1] - k
    assert not counted[:, length:].any() and torch.equal(
        counted[:, :length], case["csgd.loss_mask_raw"].bool()[:, :length]
    )
    assert torch.equal(data["input_ids"][:, :-1], ids[:, 1:])
    assert torch.equal(data["input_ids_target"][:, : length - 1], ids[:, k + 1 :])
    target.requires_grad_(False)
    target_logits = target.lm_head(features)
    for step in info["steps"]:
        head = drafter(case, target).head
        with torch.no_grad():
            _, first = guess(head, head, data["input_ids"], features)
        same = int(((first.argmax(-1) == data["input_ids_target"]) & counted).sum())
        assert (int(counted.sum()), same) == (step["num_mask"], step["num_same"])
        share = glance_share(step["epoch"] / step["num_epochs"])
        number = share * (step["num_mask"] - same)
        assert abs(share - step["factor"]) < 1e-9 and abs(number - step["num_replace"]) < 1e-6
        assert counted[0].nonzero().flatten().tolist()[::k] == step["candidate_positions"]
        ours, theirs = glanced_positions(counted[0], number, k), step["replaced_positions"]
        if k < 3:
            assert len(ours) == len(theirs) and set(ours) <= set(step["candidate_positions"])
        new_ids, states = data["input_ids"].clone(), features.clone()
        glance(new_ids, states, 0, theirs, k)
        at = f"csgd.e{step['epoch']}"
        case.same(new_ids, f"{at}.new_input_ids", "tokens")
        guessed, logits = guess(head, head, new_ids, states)
        case.same(logits, f"{at}.logits", "logits")
        if f"{at}.hidden" in case.tensors:
            case.same(guessed, f"{at}.hidden", "hidden")
        hard = case[f"{at}.sampled_target"].long()[:, :length]
        mask = counted[:, :length]
        sums = distillation_sums(
            guessed[:, :length], logits[:, :length], features[:, k:], target_logits[:, k:], hard, mask
        )
        means = {name: total / mask.sum() for name, total in sums.items()}
        for name, told in (("states", "feature_loss"), ("soft", "loss_soft"), ("hard", "loss_hard")):
            case.same(means[name], torch.tensor(step[told]), "losses")
        loss = sum(weight * means[name] for name, weight in WEIGHTS.items())
        case.same(loss, torch.tensor(step["loss"]), "losses")
        loss.backward()
        gradients = {name: weight.grad for name, weight in head.named_parameters()}
        assert set(gradients) == set(step["grad_norms"])
        for name, norm in step["grad_norms"].items():
            case.same(gradients[name].norm(), torch.tensor(norm), "grad_norms")


def check_tree(case: Case, tree: StaticTree) -> None:
    """The target's side: the original feeds the last k - 1 tokens of the text with the tree again."""
    k = case.info["k"]
    parents = [*range(-1, k - 1), *(k - 1 if parent == ROOT else parent + k for parent in tree.parents)]
    mask = torch.from_numpy(as_mask(ancestors(parents), len(parents)))
    case.same(mask, "tree.attn_mask", "masks")
    ours = padded(paths_of(parents))
    theirs = case["tree.retrieve_indices"].long()
    short = [[node for node in path if node >= k] for path in ours.tolist()]
    assert sorted(short) == sorted([node for node in path if node >= k] for path in theirs.tolist())
    depths = torch.tensor([*range(k), *(k - 1 + len(path) for path in tree.paths)])
    places = case["tree.position_ids"].long()
    assert torch.equal(depths, places - places[0])


@torch.no_grad()
def check_rounds(case: Case, target: LlamaForCausalLM, tree: StaticTree) -> None:
    """The original's rounds one after the other, each from what the last one has accepted."""
    info, k = case.info["generation"], case.info["k"]
    ours = drafter(case, target, tree)
    prompt, greedy = case["gen.prompt"].long(), case["gen.greedy_ids"].long()
    ids = greedy[:, : prompt.shape[1] + 1]  # where the original begins a round it knows the token after the text
    decoder = TreeDecoder.prefill(target, ids, layers=(-1,), whole=True)
    context = Context(decoder, [0], [[]], False, [ids], [100])
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    ours.head.register_forward_hook(lambda _, given, output: passes.append((output.hidden_states[0], output.logits)))
    ours.begin(context)
    for number, accepted in enumerate(info["accept_length"]):
        at = f"gen.r{number}"
        assert ids.shape[1] - 1 == info["len_before"][number]
        passes.clear()
        (drafted,) = ours.propose(context)
        if len(passes) > len(ours._plan):  # our first call reads the prompt in two pieces
            passes[:2] = [tuple(torch.cat(both, dim=1) for both in zip(*passes[:2]))]
        assert len(passes) == info["draft_passes_per_round"]
        if f"{at}.hidden_in" in case.tensors:
            fed = ours._follower._fed[0][None]
            case.same(fed, case[f"{at}.hidden_in"][:, -fed.shape[1] :], "hidden")
        for j, (hidden, _) in enumerate(passes):
            if f"{at}.pass{j}_hidden" in case.tensors:
                case.same(hidden, f"{at}.pass{j}_hidden", "hidden")
        if f"{at}.topk_tokens" in case.tensors:
            logits = torch.cat([passes[0][1][0, -k:], *(rows[0] for _, rows in passes[1:])])
            theirs = case[f"{at}.topk_tokens"].long()
            best = logits.topk(theirs.shape[1]).values
            torch.testing.assert_close(logits.gather(1, theirs), best, atol=2e-4, rtol=0)
        tokens = [*ids[0, -k:].tolist(), *drafted.tokens]
        case.same(torch.tensor([tokens]), f"{at}.tree_tokens", "tokens")
        nodes, parents = tokens[k - 1 :], [ROOT, *(parent + 1 for parent in drafted.parents)]
        best = decoder.feed([nodes], [parents]).logits[0].argmax(-1).tolist()
        path, node = [0], drafted.child(ROOT, best[0])
        while node is not None:
            path.append(node + 1)
            node = drafted.child(node, best[path[-1]])
        assert len(path) - 1 == accepted, f"round {number}"
        decoder.keep([path])
        ids = torch.cat([ids, torch.tensor([[*(nodes[n] for n in path[1:]), best[path[-1]]]])], dim=1)
        context = context.next_round([ids], [100], [drafted], [[n - 1 for n in path[1:]]])
    text = case["gen.output_ids"].long()
    assert torch.equal(ids[:, : text.shape[1]], text) and torch.equal(text, greedy[:, : text.shape[1]])


def check_falcon(case: Case) -> None:
    """Masks, both readings of the LSTM, the distillation, the tree, and every round of a generation and its text."""
    target = llama(case, "target", "target_config")
    assert isinstance(drafter(case, target).head, FalconHead)
    check_masks(case)
    check_forward(case, target)
    check_distillation(case, target)
    tree = StaticTree(case.info["tree"]["choices"])
    check_tree(case, tree)
    check_rounds(case, target, tree)
