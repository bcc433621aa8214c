"""Parity of one golden case of LongSpec."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, TrainingArguments

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.drafters.longspec import LongSpecDrafter
from draftdiff.llm.drafters.shapes import Beams
from draftdiff.llm.heads.hybrid import attend, hybrid, share
from draftdiff.llm.train.longspec import LongSpecTrainer, read_keys
from draftdiff.llm.train.positions import offset_positions
from draftdiff.llm.tree import ROOT, ancestors, as_mask
from tests.golden_cases import Case
from tests.golden_hydra import llama

WEIGHTS = "model.safetensors of the glide folder"


def drafter(case: Case, target: LlamaForCausalLM, widths: list[int] | None = None) -> LongSpecDrafter:
    """The case's layer, from files as the original publishes them."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(case.weights(WEIGHTS), Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps(case.info["draft_config_as_stored"]))
        return LongSpecDrafter.from_pretrained(folder, target, Beams(tuple(widths or [1])))


class Original(LongSpecDrafter):
    """Cuts the text before a tree where the original does: row i of n sees the keys from that many, n - i, before the
    window's first on."""

    def __init__(self, ours: LongSpecDrafter, widths: list[int]) -> None:
        super().__init__(ours.head, ours.shape)
        self.more, settings = max(widths), self.head.settings  # rows that it sees beyond the window
        self.head.settings = replace(settings, window=settings.window + self.more)

    def first_seen(self, depths: torch.Tensor) -> torch.Tensor:
        count = depths.shape[1]
        first = torch.arange(count) - count if depths.any() else 0  # the root is no row of a tree there
        return torch.zeros_like(depths) + self.more + first


def check_training(case: Case, target: LlamaForCausalLM) -> None:
    """Hidden states, the library's own trainer's loss, and its gradients."""
    info, ids = case.info["training"], case["train.input_ids"].long()
    positions, draws = case["train.position_ids"].long(), info["draws"]
    drawn = {name: draw["drawn"] for name, draw in draws.items()}
    case.same(offset_positions(ids.shape[1], drawn["sinks"], drawn["offset"])[None], positions, "positions")
    for example in case.info["position_examples"]:
        found = offset_positions(example["T"], example["sinks"], example["offset"])
        assert found.tolist() == example["position_ids"]
    keys, values, _ = read_keys(target, ids, torch.ones_like(ids), positions)
    case.same(keys.transpose(1, 2), "train.target_k", "rotated keys")
    case.same(values.transpose(1, 2), "train.target_v", "values")
    head = drafter(case, target).head
    case.same(head(ids, positions, keys, values, drawn["lag"]), "train.hidden", "hidden")
    batch = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids),
        "written": torch.ones_like(ids, dtype=torch.bool),
        "distil": torch.ones(len(ids), dtype=torch.bool),
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, report_to=[])
        trainer = LongSpecTrainer(head, arguments, target=target, most_lag=draws["lag"]["high"])
    head.train()
    while True:  # until it draws the case's lag
        state = torch.get_rng_state()
        if int(torch.randint(1, trainer.most_lag + 1, ())) == drawn["lag"]:
            break
    torch.set_rng_state(state)
    loss = trainer.compute_loss(head, batch)
    case.same(loss, torch.tensor(info["loss"]), "loss")
    loss.backward()
    gradients = {name: weight.grad for name, weight in head.named_parameters()}
    assert set(gradients) == set(info["grad_norms"])
    for name, norm in info["grad_norms"].items():
        case.same(gradients[name].norm(), torch.tensor(norm), "grad_norms")


@torch.no_grad()
def check_prefill(case: Case, target: LlamaForCausalLM) -> None:
    ids, head = case["prompt"].long(), drafter(case, target).head
    positions = torch.arange(ids.shape[1])[None]
    keys, values, _ = read_keys(target, ids, torch.ones_like(ids), positions)
    case.same(keys.transpose(1, 2), "prefill.target_k", "rotated keys")
    case.same(values.transpose(1, 2), "prefill.target_v", "values")
    case.same(head(ids, positions, keys, values, lag=0), "prefill.hidden", "hidden")
    keys, values = head.keys(ids, positions)
    case.same(keys.transpose(1, 2), "prefill.draft_k", "rotated keys")
    case.same(values.transpose(1, 2), "prefill.draft_v", "values")


class Rounds:
    """A greedy generation, one round after the other, of which the drafter's states are kept."""

    def __init__(self, target: LlamaForCausalLM, ours: LongSpecDrafter, prompt: torch.Tensor) -> None:
        self.target, self.ours = target, ours
        self.ids = torch.cat([prompt, target(prompt).logits[:, -1:].argmax(-1)], dim=1)
        self.decoder = TreeDecoder.prefill(target, self.ids)
        self.context = Context(self.decoder, [0], [[]], False, [self.ids], [100])
        self.states: list[torch.Tensor] = []
        logits = ours.head.logits
        ours.head.logits = lambda states: [self.states.append(states), logits(states)][1]
        ours.begin(self.context)

    def next(self) -> tuple[list[int], list[int], torch.Tensor]:
        """Tokens and parents of the root and the nodes, and what the target says after each, int64 [1, nodes]."""
        self.states.clear()
        (tree,) = self.ours.propose(self.context)
        tokens, parents = [int(self.ids[0, -1]), *tree.tokens], [ROOT, *(parent + 1 for parent in tree.parents)]
        best = self.decoder.feed([tokens], [parents]).logits.argmax(-1)
        path, node = [0], tree.child(ROOT, int(best[0, 0]))
        while node is not None:
            path.append(node + 1)
            node = tree.child(node, int(best[0, path[-1]]))
        self.decoder.keep([path])
        self.accepted = [*(tokens[node] for node in path[1:]), int(best[0, path[-1]])]
        self.ids = torch.cat([self.ids, torch.tensor([self.accepted])], dim=1)
        self.context = self.context.next_round([self.ids], [100], [tree], [[node - 1 for node in path[1:]]])
        return tokens, parents, best


@torch.no_grad()
def check_chain(case: Case, target: LlamaForCausalLM) -> None:
    info, prompt = case.info["chain"], case["prompt"].long()
    rounds = Rounds(target, drafter(case, target, [1] * info["gamma"]), prompt)
    calls, states, accepted = [], [], 0
    while rounds.ids.shape[1] - prompt.shape[1] < info["compared_tokens"]:
        read = rounds.ids.shape[1] - 1
        rounds.next()
        accepted += len(rounds.accepted) - 1
        states += rounds.states
        calls += [{"rows": 1, "target_kv_len": read}] * len(rounds.states)
    known = info["calls"]
    for ours, theirs in zip(calls, known):
        assert all(theirs[name] == value for name, value in ours.items())
    case.same(torch.cat(states, dim=1)[:, : len(known)], "chain.hidden", "hidden")
    text = case["greedy_ids"].long()
    new = rounds.ids[:, prompt.shape[1] :][:, : info["compared_tokens"]]
    assert torch.equal(new, text[:, : new.shape[1]])
    assert torch.equal(new, case["chain.output_ids"].long()[:, : new.shape[1]])


@torch.no_grad()
def check_tree(case: Case, target: LlamaForCausalLM, name: str) -> None:
    """Every round of a generation with trees. name: of the case's part."""
    info = case.info[name]
    prompt = case[f"{name}.prompt" if f"{name}.prompt" in case.tensors else "prompt"].long()
    ours = drafter(case, target, info["widths"])
    if prompt.shape[1] + info["max_gen_len"] + len(info["widths"]) > ours.head.settings.window:
        ours = Original(ours, info["widths"])
    rounds = Rounds(target, ours, prompt)
    for number, told in enumerate(info["rounds"]):
        at, before = f"{name}.r{number}", rounds.ids.shape[1] - 1
        assert before == told["cache_len"]
        tokens, parents, best = rounds.next()
        case.same(torch.tensor([tokens]), f"{at}.nodes", "tokens")
        case.same(torch.from_numpy(as_mask(ancestors(parents), len(parents))), f"{at}.mask", "masks")
        assert rounds.accepted == told["accepted_ids"], f"round {number}"
        if f"{at}.target_argmax" in case.tensors:
            case.same(best, f"{at}.target_argmax", "tokens")
        if f"{at}.first_hidden" in case.tensors:
            case.same(rounds.states[0][:, -1:], case[f"{at}.first_hidden"][:, -1:], "hidden")
        for level, states in enumerate(rounds.states[1:], 1):
            if f"{at}.level{level}_hidden" in case.tensors:
                case.same(states, f"{at}.level{level}_hidden", "hidden")
        assert [call["rows"] for call in told["draft_calls"][1:]] == [x.shape[1] for x in rounds.states[1:]]
    text = case[f"{name}.output_ids"].long()
    new = rounds.ids[:, prompt.shape[1] :][:, : info["compared_tokens"]]
    assert torch.equal(new, text[:, : new.shape[1]])


def check_hybrid(case: Case) -> None:
    info, window = case.info["hybrid"], 512
    q, k, v = (case[f"hybrid.{name}"].transpose(1, 2) for name in "qkv")
    length, n = info["prefix_len"], q.shape[2]
    near = torch.arange(length) >= length - n + torch.arange(n)[:, None] - window
    prefix = k[:, :, :length], v[:, :, :length], near[None]
    tree = k[:, :, length:], v[:, :, length:], case["hybrid.tree_mask"].bool()[None]
    _, prefix_lse = attend(q, *prefix)
    out, tree_lse = attend(q, *tree)
    case.same(prefix_lse, "hybrid.prefix_lse", "lse")
    case.same(out.transpose(1, 2), "hybrid.tree_out", "out")
    case.same(share(prefix_lse, tree_lse).transpose(1, 2), "hybrid.prefix_weight", "out")
    case.same(hybrid(q, prefix, tree).transpose(1, 2), "hybrid.out", "out")
    mask = case["kernel.mask"].bool()
    rows, columns = mask.shape
    mask = mask & torch.ones_like(mask).tril(columns - rows)
    out, lse = attend(case["kernel.q"], case["kernel.k"], case["kernel.v"], mask[None])
    case.same(out, "kernel.out", "out")
    case.same(lse, "kernel.lse", "lse")


def check_longspec(case: Case) -> None:
    """Training, the prompt, chains and trees round by round with their text, and attention in two parts."""
    target = llama(case, "target", "target_config")
    check_training(case, target)
    check_prefill(case, target)
    check_chain(case, target)
    check_tree(case, target, "short")
    check_tree(case, target, "tree")
    check_hybrid(case)
