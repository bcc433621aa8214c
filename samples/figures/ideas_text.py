"""Pictures of the ideas for language models, from the embedded pair on program text that it has not seen."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ideas_style import AMBER, BLUE, BLUES, GRAY, GREEN, LINE, ORANGE, PALE, SKY, bare, panels, picture
from matplotlib.patches import FancyBboxPatch

from draftdiff.llm import (
    Chain,
    KBest,
    ModelDrafter,
    NGramDrafter,
    NGramTable,
    PearlDrafter,
    SpecKVConfig,
    SpecPCConfig,
    StaticTree,
    acceptance_upper_bound,
    expected_acceptance,
    generate_distillation_set,
    rank_acceptance,
    report,
    speckv,
    specpc,
    speculative,
)
from draftdiff.llm.drafters.merging import NGramCache
from draftdiff.llm.tree import ROOT
from draftdiff.models.llm import LanguageModel, example_prompts, load

_RESULTS = Path(__file__).resolve().parents[1] / "results"


@cache
def _model() -> LanguageModel:
    return load(None, None, device="cpu")


@cache
def _prompts() -> tuple[torch.Tensor, ...]:
    return tuple(example_prompts(_model(), 6, 128))


def _decoded(drafter: Any, **kwargs: Any) -> list[Any]:
    """Reports of greedy runs of 48 tokens, one a prompt; the drafter drafts every round."""
    told = []
    for ids in _prompts():
        _model().target.generate(
            ids, custom_generate=speculative, drafter=drafter, do_sample=False, max_new_tokens=48, pace=None, **kwargs
        )
        told.append(report(drafter))
    return told


def speculative_decoding() -> Any:
    depths = (1, 2, 3, 4, 6, 8)
    draft = _model().draft
    figure, (gain, accepted) = panels(1.1, 1)
    runs = {
        "chain": [_decoded(ModelDrafter(draft, Chain(depth))) for depth in depths],
        "tree, 4 wide": [_decoded(ModelDrafter(draft, KBest(depth=depth, width=4, nodes=28))) for depth in depths],
    }
    for (name, told), colour in zip(runs.items(), (BLUE, ORANGE)):
        gain.plot(
            depths, [np.mean([one.tokens_per_forward for one in row]) for row in told], "o-", color=colour, label=name
        )
        tried = np.sum([one.tried for one in told[-1]], 0)
        taken = np.sum([one.accepted for one in told[-1]], 0)
        accepted.plot(np.arange(len(tried)) + 1, taken / np.maximum(tried, 1), "o-", color=colour, label=name)
    rate = float(np.mean([one.acceptance[0] for one in runs["chain"][0]]))
    law = [(1 - rate ** (depth + 1)) / (1 - rate) for depth in depths]
    gain.plot(depths, law, "--", color=GRAY, label=f"chain by the formula, a = {rate:.2f}")
    gain.set(xlabel="depth of the draft", ylabel="tokens per target forward", title="greedy, 6 prompts", ylim=(1, None))
    gain.legend()
    accepted.set(xlabel="depth", ylabel="accepted, of those tried", title="depth 8", ylim=(0, 1))
    accepted.legend()
    return figure


def draft_heads() -> Any:
    model = _model()
    prompts = [ids[0].tolist() for ids in _prompts()]
    data = generate_distillation_set(
        model.target, prompts, tokenizer=model.tokenizer, max_new_tokens=96, temperatures=(0.0,), progress=False
    )
    figure, (ranks, tree) = panels(1, 1.25)
    right = {}
    for (kind, drafter), colour in zip(model.heads.items(), (BLUE, ORANGE)):
        right[kind] = rank_acceptance(drafter.heads, model.target, data, ranks=4)
        depth = np.arange(len(right[kind])) + 1
        ranks.plot(depth, right[kind][:, 0], "o-", color=colour, label=f"{kind.capitalize()}, first guess")
        ranks.plot(depth, right[kind].sum(1), "o--", color=colour, label=f"{kind.capitalize()}, first four", lw=1.3)
    ranks.set(xlabel="head", ylabel="right", title="guesses of the heads", ylim=(0, 1), xticks=depth)
    ranks.legend()
    grown = StaticTree.learned(right["hydra"], nodes=16)
    bare(tree, "the tree of 16 nodes that suits the Hydra heads")
    _tree(tree, grown.parents, [str(path[-1] + 1) for path in grown.paths])
    return figure


def _tree(axis: Any, parents: list[int], names: list[str], shares: list[float] | None = None, size: float = 9) -> None:
    """Nodes by depth from left to right, leaves below one another."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    places: dict[int, tuple[float, float]] = {}
    leaves = iter(range(len(parents) + 1))

    def lay(node: int, depth: int) -> float:
        below = [lay(child, depth + 1) for child in children.get(node, [])]
        y = float(np.mean(below)) if below else float(next(leaves))
        places[node] = (depth, -y)
        return y

    lay(ROOT, 0)
    for node, parent in enumerate(parents):
        (x0, y0), (x1, y1) = places[parent], places[node]
        axis.plot((x0, x1), (y0, y1), color=LINE, lw=1 + 3 * (shares[node] if shares else 0.2), zorder=1)
    for node, (x, y) in places.items():
        text = "…" if node == ROOT else names[node]
        axis.text(
            x, y, text, ha="center", va="center", fontsize=size, zorder=2,
            family="monospace" if shares else "sans-serif",
            bbox={"boxstyle": "round,pad=0.28", "fc": PALE if node != ROOT else "white", "ec": BLUE, "lw": 0.9},
        )  # fmt: skip
    axis.margins(0.1, 0.08)


def pearl() -> Any:
    figure, (lanes, gain) = panels(1.7, 1)
    gamma, cost, steps = 4, 0.25, 3
    bare(lanes, f"a draft forward takes {cost} of a target forward, {gamma} drafts a step")
    names = ("plain", "speculation", "PEARL")
    for y, name in zip((3.0, 1.6, 0.0), names):
        lanes.text(-0.2, y + 0.25, name, ha="right", va="center")

    def box(x: float, y: float, width: float, colour: str) -> None:
        lanes.add_patch(FancyBboxPatch((x + 0.02, y), width - 0.04, 0.42, boxstyle="round,pad=0,rounding_size=.04",
                                       fc=colour, ec="none"))  # fmt: skip

    for step in range(6):
        box(step, 3.0, 1, BLUE)
    for step in range(steps):
        for draft in range(gamma):
            box(2 * step + draft * cost, 1.6, cost, AMBER)
        box(2 * step + gamma * cost, 1.6, 1, BLUE)
    for step in range(6):
        box(step, 0.25, 1, BLUE)
        for draft in range(gamma):
            box(step + draft * cost, -0.25, cost, AMBER)
    lanes.set(xlim=(-1.4, 6.1), ylim=(-0.6, 3.8))
    for colour, name, x in ((BLUE, "target", 0.0), (AMBER, "draft", 1.2)):
        lanes.add_patch(FancyBboxPatch((x, -0.62), 0.2, 0.16, boxstyle="square,pad=0", fc=colour, ec="none"))
        lanes.text(x + 0.3, -0.54, name, va="center", fontsize=9)
    draft = _model().draft
    counts = (1, 2, 3, 4, 6)
    chain = [np.mean([r.tokens_per_forward for r in _decoded(ModelDrafter(draft, Chain(n)))]) for n in counts]
    beside = [np.mean([r.tokens_per_forward for r in _decoded(PearlDrafter(draft, gamma=n))]) for n in counts]
    c = cost
    gain.plot(
        counts, [tau / (1 + c * n) for tau, n in zip(chain, counts)], "o-", color=BLUE, label="one after the other"
    )
    gain.plot(
        counts, [tau / max(1, c * n) for tau, n in zip(beside, counts)], "o-", color=AMBER, label="beside (PEARL)"
    )
    gain.axhline(1, color=GRAY, lw=1, ls="--")
    gain.set(xlabel="drafts a step", ylabel="tokens per time of a target forward", title="from measured acceptance")
    gain.legend()
    return figure


def omnidraft() -> Any:
    model = _model()
    assert model.cross is not None
    vocabularies = model.cross.vocabularies
    text = "def process(request, options):\n    raise NotImplementedError"
    target = model.tokenizer(text).input_ids
    cache = NGramCache()
    draft: list[int] = []
    for token in target:
        ids = vocabularies.encode(vocabularies.target[token] or b"") or []
        cache.learn(token, ids)
        draft += ids
    merged = cache.merge(draft, vocabularies.direct)
    figure, (axis,) = panels(1, height=2.2)
    bare(axis, "one text, by the draft's tokens, and merged into the target's")
    x, unit = 0.0, 1.0
    spans: list[tuple[float, float]] = []
    for id in draft:
        piece = (vocabularies.draft[id] or b"").decode(errors="replace")
        width = unit * max(len(piece), 0.9)
        _token(axis, x, 1.25, width, piece, PALE)
        spans.append((x, x + width))
        x += width
    for one in merged:
        left, right = spans[one.start][0], spans[one.stop - 1][1]
        several = one.stop - one.start > 1
        piece = (vocabularies.target[one.token] or b"").decode(errors="replace") if one.token is not None else "?"
        _token(axis, left, 0.0, right - left, piece, "#fde3c8" if several else PALE)
        for at in range(one.start, one.stop):
            middle = sum(spans[at]) / 2
            axis.plot((middle, (left + right) / 2), (1.22, 0.72), color=ORANGE if several else LINE, lw=1.2)
    axis.set(xlim=(-7.5, x + 0.3), ylim=(-0.25, 2.1))
    axis.text(-0.7, 1.58, "draft", ha="right", va="center")
    axis.text(-0.7, 0.34, "target", ha="right", va="center")
    return figure


def _token(axis: Any, x: float, y: float, width: float, text: str, colour: str) -> None:
    axis.add_patch(FancyBboxPatch((x + 0.07, y), width - 0.14, 0.68, boxstyle="round,pad=0,rounding_size=.12",
                                  fc=colour, ec=SKY, lw=0.7, mutation_aspect=0.5))  # fmt: skip
    shown = text.replace("\n", "⏎").replace(" ", "·")
    axis.text(x + width / 2, y + 0.33, shown, ha="center", va="center", fontsize=8, family="monospace")


def aded() -> Any:
    model = _model()
    figure, (tree, gain) = panels(1.35, 1, height=3.2)
    table = NGramTable([ids[0].tolist() for ids in _prompts()])
    drafter = NGramDrafter(table, nodes=14, depth=4)
    ids = _prompts()[0][0].tolist()
    last = max(pairwise(ids), key=lambda pair: len(set(drafter.tree(pair, 4).parents)))
    grown = drafter.tree(last, 4)
    words = [repr(model.tokenizer.decode([token]))[1:-1] for token in grown.tokens]
    seen = repr(model.tokenizer.decode(list(last)))[1:-1]
    bare(tree, f"what followed “{seen}”, best first")
    _tree(tree, grown.parents, words, shares=[0.3] * len(words), size=8)
    sizes = (4, 8, 16, 32, 64)
    for search, colour in (("best_first", BLUE), ("puct", ORANGE)):
        told = [_decoded(NGramDrafter(nodes=n, search=search)) for n in sizes]
        means = [np.mean([one.tokens_per_forward for one in row]) for row in told]
        gain.plot(sizes, means, "o-", color=colour, label=search.replace("_", " "))
    gain.set(xscale="log", xlabel="nodes of the tree", ylabel="tokens per target forward", title="no model drafts")
    gain.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    gain.set_xticks([], minor=True)
    gain.legend()
    return figure


def spec_kv() -> Any:
    model = _model()
    (ids, *_) = example_prompts(model, 1, 320)
    capacity = 80
    config = SpecKVConfig(capacity=capacity, window=16, reduce="mean")
    _, info = speckv(model.target, model.draft, ids, config, max_new_tokens=32, return_indices=True)
    layers = sorted(info.indices)
    kept = np.zeros((len(layers), ids.shape[1]))
    for row, layer in enumerate(layers):
        indices = info.indices[layer][0]
        for head in indices:
            kept[row, head.numpy()] += 1 / len(indices)
    short = specpc(model.draft, ids, SpecPCConfig(capacity=capacity, window=16, kernel=8))
    line = np.zeros((1, ids.shape[1]))
    line[0, short.numpy()] = 1
    figure, (axis,) = panels(1, height=2.6)
    board = np.concatenate([kept, np.full((1, ids.shape[1]), np.nan), line])
    colours = BLUES.copy()
    colours.set_bad("white")
    image = picture(axis, np.ma.masked_invalid(board), f"which {capacity} of {ids.shape[1]} tokens stay", cmap=colours,
                    aspect="auto")  # fmt: skip
    names = [f"layer {layer}" for layer in layers]
    axis.set_yticks([*range(len(names)), len(names) + 1], [*names, "SpecPC"], fontsize=9)
    axis.set_xticks(range(0, ids.shape[1] + 1, 40))
    axis.set_xlabel("token of the prompt")
    figure.colorbar(image, ax=axis, label="share of key heads", shrink=0.9)
    return figure


@torch.no_grad()
def multi_draft() -> Any:
    model = _model()
    ids = _prompts()[0]
    laws = [
        [m(ids).logits[0, at].softmax(-1).double() for at in range(20, 120, 10)] for m in (model.target, model.draft)
    ]
    counts = (1, 2, 3, 4, 6, 8)
    figure, axes = panels(1, 1, height=3.2)
    looks = {"rrs": (BLUE, "rejection, one after the other"), "k_seq": (ORANGE, "K-SEQ")}
    for axis, sampler, verifiers in zip(
        axes, ("without_replacement", "with_replacement"), (("rrs",), ("rrs", "k_seq"))
    ):
        best = [np.mean([acceptance_upper_bound(p, q, n, sampler) for p, q in zip(*laws)]) for n in counts]
        axis.plot(counts, best, "o--", color=GRAY, label="the optimum")
        for verifier in verifiers:
            colour, name = looks[verifier]
            values = [np.mean([expected_acceptance(p, q, n, sampler, verifier) for p, q in zip(*laws)]) for n in counts]
            axis.plot(counts, values, "o-", color=colour, label=name)
        axis.set(xlabel="drafts of one token", ylabel="accepted", title=f"drawn {sampler.replace('_', ' ')}")
        axis.legend(loc="lower right")
    low = min(axis.get_ylim()[0] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, 1)
    return figure


def draft_training() -> Any:
    rows = json.loads((_RESULTS / "llm-vocab-trim.json").read_text(encoding="utf-8"))["rows"]
    figure, (tokens, speed) = panels(1, 1)
    for name, colour in zip(dict.fromkeys(row["calibration"] for row in rows), (BLUE, ORANGE, GREEN)):
        of = [row for row in rows if row["calibration"] == name]
        label = f"counted on {name}"
        tokens.plot(
            [row["size"] for row in of], [row["tokens_per_forward"] for row in of], "o-", color=colour, label=label
        )
        speed.plot([row["size"] for row in of], [row["mbsu"] for row in of], "o-", color=colour, label=label)
    tokens.set(xlabel="tokens that the draft knows", ylabel="tokens per target forward", title="what is lost")
    speed.set(xlabel="tokens that the draft knows", ylabel="speed-up by bytes (MBSU)", title="what is won")
    tokens.legend(loc="lower right")
    return figure


PICTURES = {
    "speculative-decoding": speculative_decoding,
    "draft-heads": draft_heads,
    "pearl": pearl,
    "omnidraft": omnidraft,
    "aded": aded,
    "spec-kv": spec_kv,
    "multi-draft": multi_draft,
    "draft-training": draft_training,
}
