"""Parity of one golden case of Hydra or Hydra++."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.drafters.hydra import HydraDrafter
from draftdiff.llm.heads.files import renamed
from draftdiff.llm.heads.hydra import NOT_OURS, original_names
from draftdiff.llm.static_tree import StaticTree
from draftdiff.llm.train.heads import HeadsTrainer
from draftdiff.llm.train.losses import kl
from draftdiff.llm.tree import ROOT, ancestors, as_mask
from tests.golden_cases import Case


def llama(case: Case, part: str, config: str) -> LlamaForCausalLM:
    """A model of the case in fp32."""
    model = LlamaForCausalLM(LlamaConfig(**case.info[config])).eval()
    model.load_state_dict(case.weights(part))
    return model


def drafter(case: Case, target: LlamaForCausalLM, tree: StaticTree | None = None) -> HydraDrafter:
    """The case's heads, from files as the original publishes them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.weights("hydra_lm_head.pt"), Path(folder, "hydra_lm_head.pt"))
        Path(folder, "config.json").write_text(json.dumps(case.info["head_config"]))
        return HydraDrafter.from_pretrained(folder, target, tree)


def full_tree(tree: StaticTree) -> list[int]:
    """Parents of the root and the nodes, as the original counts them."""
    return [ROOT, *(parent + 1 for parent in tree.parents)]


def paths_of(parents: list[int]) -> list[list[int]]:
    """Every path from the root to a leaf."""
    paths = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path = [leaf]
        while parents[path[0]] != ROOT:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


def padded(paths: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, paths))
    return torch.tensor([path + [-1] * (longest - len(path)) for path in paths])


@torch.no_grad()
def check_forward(case: Case, target: LlamaForCausalLM, heads: torch.nn.Module) -> None:
    ids, mask = case["tf.input_ids"].long(), case["tf.attention_mask"].long()
    output = target(ids, attention_mask=mask, output_hidden_states=True)
    hidden, real = output.hidden_states[-1], mask.bool()
    case.same(hidden[real], case["tf.base_hidden"][real], "hidden")
    case.same(output.logits[real], case["tf.target_logits"][real], "logits")
    states = heads.states(hidden, mask)
    embedded = target.get_input_embeddings()(ids)
    for head, logits in enumerate(heads(hidden, ids, mask)):
        # The original rolls the tokens round: its last rows read the text's beginning.
        length = ids.shape[1] - head - 1
        counted = real[:, head + 1 :]
        case.same(logits[counted], case["tf.head_logits"][head][:, :length][counted], "logits")
        read = torch.cat([states[:, :length], *(embedded[:, 1 + n : 1 + n + length] for n in range(head + 1))], dim=-1)
        found = heads.body(head, read)
        case.same(found[counted], case["tf.head_hidden"][head][:, :length][counted], "hidden")


def named_tree(case: Case, nodes: int) -> StaticTree:
    """The tree of the case that has so many nodes, the root among them; tensors call it by another name."""
    (choices,) = (tree["choices"] for tree in case.info["trees"].values() if len(tree["choices"]) + 1 == nodes)
    return StaticTree(choices)


def check_trees(case: Case) -> None:
    for prefix in sorted({name.rpartition(".")[0] for name in case.tensors if name.startswith("tree.")}):
        tree = named_tree(case, len(case[f"{prefix}.position_ids"]))
        parents = full_tree(tree)
        case.same(torch.from_numpy(as_mask(ancestors(parents), len(parents))), f"{prefix}.attn_mask", "masks")
        depths = torch.tensor([0, *(len(path) for path in tree.paths)])
        case.same(depths, f"{prefix}.position_ids", "indices")
        theirs = case[f"{prefix}.retrieve_indices"].long()
        paths = padded(paths_of(parents))
        assert sorted(paths.tolist()) == sorted(theirs.tolist())
        case.same((theirs >= 0).sum(1) - 1, f"{prefix}.max_accepts", "indices")


@torch.no_grad()
def check_rounds(case: Case, target: LlamaForCausalLM) -> None:
    """The original's rounds one after the other, each from what the last one has accepted."""
    info = case.info["generation"]
    ours = drafter(case, target, named_tree(case, case["gen.r0.tree_tokens"].shape[1]))
    # Where the original begins a round it knows the token after the last one that the target has seen: the root.
    prompt, greedy = case["gen.prompt"].long(), case["gen.greedy_ids"].long()
    start = prompt.shape[1]
    ids = greedy[:, : start + 1]
    decoder = TreeDecoder.prefill(target, ids, layers=(-1,), whole=True)
    context = Context(decoder, [0], [[]], False, [ids], [100])
    ours.begin(context)
    trees, paths, known = [], [], []
    for number, accepted in enumerate(info["accept_length"]):
        at = f"gen.r{number}"
        assert ids.shape[1] - 1 == info["ids_before_len"][number]
        case.same(ids[0, -1:], case[f"{at}.tree_tokens"][0, :1], "tokens")
        if f"{at}.hidden_in" in case.tensors:
            case.same(decoder.states[0][None], f"{at}.hidden_in", "hidden")
        known.append(decoder.states[0])
        if f"{at}.prefix_out" in case.tensors:
            whole = ours.heads.states(torch.cat(known)[None])
            case.same(whole[:, -len(known[-1]) :], f"{at}.prefix_out", "hidden")
        (tree,) = ours.propose(context)
        parents = full_tree(ours.tree)
        tokens = [int(ids[0, -1]), *tree.tokens]
        case.same(torch.tensor([tokens]), f"{at}.tree_tokens", "tokens")
        output = decoder.feed([tokens], [parents])
        if f"{at}.tree_logits" in case.tensors:
            case.same(output.logits[0], f"{at}.tree_logits", "logits")
        if f"{at}.tree_hidden" in case.tensors:
            case.same(output.hidden_states[-1][0], f"{at}.tree_hidden", "hidden")
        path, node = [0], tree.child(ROOT, int(output.logits[0, 0].argmax()))
        while node is not None:
            path.append(node + 1)
            node = tree.child(node, int(output.logits[0, path[-1]].argmax()))
        assert len(path) - 1 == accepted, f"round {number}"
        decoder.keep([path])
        trees, paths = [tree], [[node - 1 for node in path[1:]]]
        ids = torch.cat([ids, torch.tensor([[tokens[node] for node in path[1:]]], dtype=torch.int64)], dim=1)
        ids = torch.cat([ids, output.logits[:, path[-1]].argmax(-1)[None]], dim=1)
        context = context.next_round([ids], [100], trees, paths)
    text = case["gen.output_ids"].long()
    assert torch.equal(ids[:, : text.shape[1]], text) and torch.equal(text, greedy[:, : text.shape[1]])
    if "gen.prefix_cache_k" in case.tensors:
        # The last call's rows are pending there until the next.
        ours._prefix.decoder.keep([range(count) for count in ours._prefix.known])
        keys, values, _ = ours._prefix.decoder.committed()
        for found, name in ((keys, "k"), (values, "v")):
            expected = case[f"gen.prefix_cache_{name}"]
            case.same(found[:, :, : expected.shape[2]], expected, "hidden")


def teacher(draft_logits: torch.Tensor, target_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The original's teacher loss: the divergence and the target's entropy, of which nothing can be learned."""
    log_p = target_logits.log_softmax(-1)
    return kl(draft_logits, target_logits, mask) - (log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0.0)


def check_losses(case: Case, target: LlamaForCausalLM, heads: torch.nn.Module) -> None:
    """Of the library's own trainer on the case's batch, and the gradients of the mixed one."""
    labels = case["tf.labels"].long()
    batch = {
        "input_ids": case["tf.input_ids"].long(),
        "attention_mask": case["tf.attention_mask"].long(),
        "written": labels != -100,
        "distil": torch.ones(len(labels), dtype=torch.bool),
    }
    assert torch.equal(labels[labels != -100], batch["input_ids"][labels != -100])
    found, expected = {}, case.info["losses"]
    for name, loss in (("lm", "ce"), ("teacher", teacher)):
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, use_cpu=True, report_to=[])
            found[name] = HeadsTrainer(heads, arguments, target=target, loss=loss).compute_loss(heads, batch)
        case.same(found[name], torch.tensor(expected[name]), "losses")
    (mixed,) = (name for name in expected if name.startswith("mixed"))
    shares = [float(share) for share in mixed.split("_")[1:]]
    loss = shares[0] * found["lm"] + shares[1] * found["teacher"]
    case.same(loss, torch.tensor(expected[mixed]), "losses")
    loss.backward()
    gradients = {name: weight.grad for name, weight in heads.named_parameters()}
    names = original_names("prefix" in case.info["head_config"]["hydra_head_arch"])
    theirs = renamed(
        {name: torch.tensor(norm) for name, norm in case.info["grad_norms_mixed"].items()}, names, NOT_OURS
    )
    assert set(theirs) == set(gradients)
    for name, norm in theirs.items():
        case.same(gradients[name].norm(), norm, "grad_norms")


def check_hydra(case: Case) -> None:
    """Teacher-forced logits and hidden states, trees, every round of a generation and its text, losses, gradients."""
    target = llama(case, "target", "target_config")
    check_forward(case, target, drafter(case, target).heads)
    check_trees(case)
    check_rounds(case, target)
    check_losses(case, target, drafter(case, target).heads)
