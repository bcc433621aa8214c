"""Pictures of the ideas of draft attention, from attention calls of the embedded video model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ideas_style import AMBER, BLUE, GRAY, ORANGE, PALE, SKY, SOFT, panels, picture
from matplotlib.colors import ListedColormap
from torch import Tensor
from torch.overrides import TorchFunctionMode

from draftdiff import DraftAttentionConfig, draft_attention
from draftdiff.attention.rule import Rule
from draftdiff.bench.parallel import Share
from draftdiff.core.allocation import allocations, finer
from draftdiff.core.draft import Tail, draft_map, pool
from draftdiff.core.grid import LatentGrid
from draftdiff.core.probe import errors, singles, worst
from draftdiff.core.select import select, with_text
from draftdiff.pipelines.mini.video import load_mini_video, mini_video_defaults

_PROMPT, _STEPS = "a red circle moves right", 10
_GRID = LatentGrid(8, 16, 16)
_RESULTS = Path(__file__).resolve().parents[1] / "results"
_KEEP = ListedColormap(["#eef3f8", "#1769aa"])


class _Recorder(TorchFunctionMode):
    """Keeps q, k, v [1, tokens, heads, head_dim] of self-attentions over all video tokens, in the order of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if q.shape[2] == k.shape[2] == _GRID.tokens:
                self.calls.append(tuple(x[:1].transpose(1, 2).clone() for x in (q, k, v)))
        return func(*args, **kwargs)


@cache
def recorded() -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """q, k, v of every forward's layers, in a run of ten steps."""
    pipe = load_mini_video()
    pipe.set_progress_bar_config(disable=True)
    call = mini_video_defaults()["generate"] | {"num_inference_steps": _STEPS}
    layers = len(pipe.transformer.blocks)
    with _Recorder() as recorder, torch.no_grad():
        pipe(_PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    calls: Any = recorder.calls
    return [calls[at : at + layers] for at in range(0, len(calls), layers)]


def late() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of all layers, in a forward of the sixth step."""
    forwards = recorded()
    return forwards[len(forwards) * 5 // _STEPS]


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(1, 2)


def wrong(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> float:
    """Relative L2 error of the attention's output."""
    exact = _dense(q, k, v)
    out = draft_attention(q, k, v, grid=_GRID.shape, config=DraftAttentionConfig(**settings))
    return float((out - exact).norm() / exact.norm())


def mean_wrong(sparsity: float, **settings: Any) -> float:
    """The same over the layers of a forward."""
    return float(np.mean([wrong(*call, sparsity=sparsity, **settings) for call in late()[1:]]))


def draft_map_picture() -> Any:
    q, k, _ = late()[3]
    tiling = Rule().tiling(_GRID, 0, 0, q.device)
    order = tiling.order[: _GRID.tokens]
    head = 1
    scores = q[0, order, head] @ k[0, order, head].T / q.shape[-1] ** 0.5
    full = scores.softmax(-1)
    draft = draft_map(pool(q, tiling), pool(k, tiling), counts=tiling.counts)
    kept = select("draft", draft, torch.full((q.shape[2],), 0.25, dtype=torch.float64))
    figure, axes = panels(1, 1, 1, height=3.35)
    block = full.reshape(256, 8, 256, 8).mean((1, 3)) ** 0.35
    picture(axes[0], block.numpy(), "attention of one head")
    picture(axes[1], (draft[0, head] ** 0.35).numpy(), "its draft")
    picture(axes[2], kept[0, head].numpy(), "computed at sparsity 0.75", cmap=_KEEP)
    axes[0].set(xlabel="2,048 keys", ylabel="2,048 queries")
    for axis in axes[1:]:
        axis.set(xlabel=f"{tiling.tiles} key tiles", ylabel=f"{tiling.tiles} query tiles")
    return figure


def tail() -> Any:
    shares = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7]
    figure, (lines, bars) = panels(1.25, 1)
    for on, name, colour in ((False, "dropped", ORANGE), (True, "one mean key and value (tail)", BLUE)):
        settings = {"selection": "draft", "tail": on, "tokens": 0}
        lines.plot(shares, [mean_wrong(1 - share, **settings) for share in shares], "o-", color=colour, label=name)
    lines.set(xlabel="density: share of pairs computed", ylabel="relative error of the output", ylim=(0, None))
    lines.set_title("skipped tiles, by the draft map's choice")
    lines.legend()
    q, k, _ = late()[3]
    tiling = Rule().tiling(_GRID, 0, 0, q.device)
    order = tiling.order[: _GRID.tokens].reshape(tiling.tiles, -1)
    at, head = 20, 1
    row = (pool(q, tiling)[0, head, at] @ k[0, order.flatten(), head].T / q.shape[-1] ** 0.5).exp().reshape(order.shape)
    mean = (pool(q, tiling)[0, head, at] @ pool(k, tiling)[0, head].T / q.shape[-1] ** 0.5).exp() * order.shape[1]
    true, best = row.sum(-1), row.sum(-1).argsort(descending=True)[:16]
    place = np.arange(len(best))
    bars.bar(place - 0.2, true[best] / true.sum(), 0.4, color=SOFT, label="of its tokens")
    bars.bar(place + 0.2, mean[best] / true.sum(), 0.4, color=BLUE, label="of its mean, times its tokens")
    bars.set(xlabel="key tile, by weight", ylabel="share of the softmax", title="what a tile weighs, one query tile")
    bars.set_xticks(place[::5], [str(n + 1) for n in place[::5]])
    bars.legend()
    return figure


def error_aware() -> Any:
    q, k, v = late()[3]
    tiling = Rule().tiling(_GRID, 0, 0, q.device)
    q_mean, means = pool(q, tiling), Tail(pool(k, tiling), pool(v, tiling))
    scale, head = q.shape[-1] ** -0.5, 1
    density = torch.full((q.shape[2],), 0.1875, dtype=torch.float64)
    error = errors(q_mean, k, v, means, tiling, scale=scale)
    keep = worst(error, density)
    tokens = singles(q_mean, k, v, means, tiling, keep, scale=scale, tokens=128)[0, head]
    mass = draft_map(q_mean, means.k_mean, scale=scale, counts=tiling.counts)[0, head]
    figure, (dots, tiles, lines) = panels(1, 1, 1.15, height=3.2)
    shown = error[0, head].exp()
    shown = shown / shown.sum(-1, keepdim=True)
    kept = keep[0, head]
    for on, colour, name in ((~kept, PALE, "read by its mean"), (kept, BLUE, "computed")):
        dots.scatter(mass[on], shown[on], s=9, color=colour, edgecolor=SKY if colour == PALE else "none", lw=0.4,
                     label=name, rasterized=False)  # fmt: skip
    dots.set(xscale="log", yscale="log", xlabel="share of the mass", ylabel="share of the error")
    dots.set(title="tiles of one head", xlim=(1e-4, 1), ylim=(1e-4, 1))
    dots.legend(loc="upper left", handletextpad=0.1)
    tile_of = torch.empty(_GRID.tokens, dtype=torch.long)
    tile_of[tiling.order[: _GRID.tokens]] = torch.arange(tiling.tiles).repeat_interleave(tiling.counts)
    counts = torch.stack([torch.bincount(tile_of[row[row >= 0]], minlength=tiling.tiles) for row in tokens])
    picture(tiles, kept.numpy(), "tiles and single tokens", cmap=_KEEP)
    rows, columns = counts.nonzero(as_tuple=True)
    tiles.scatter(columns, rows, s=counts[rows, columns].numpy() ** 0.8, color=AMBER, lw=0)
    tiles.set(xlabel="key tiles", ylabel="query tiles")
    shares = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
    rules: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("by mass", {"selection": "draft", "tokens": 0}, GRAY),
        ("by error", {"tokens": 0}, SKY),
        ("and single tokens", {}, BLUE),
    )
    for name, settings, colour in rules:
        lines.plot(shares, [mean_wrong(1 - s, **settings) for s in shares], "o-", color=colour, label=name)
    lines.set(xlabel="density", ylabel="relative error of the output", title="what is wrong at the end", ylim=(0, None))
    lines.legend()
    return figure


def budgets() -> Any:
    schedules = {
        "a fifth dense, then 0.75": (DraftAttentionConfig(min_tokens=0), GRAY),
        "0.56 throughout": (DraftAttentionConfig(0.5625, dense_steps=0, min_tokens=0), SKY),
        "0.4, 0.7, 0.7": (DraftAttentionConfig((0.4, 0.7, 0.7), dense_steps=0, min_tokens=0), ORANGE),
        "falling": (DraftAttentionConfig((0.2, 0.6, 0.7, 0.75, 0.75), dense_steps=0, min_tokens=0), BLUE),
    }
    figure, (steps, bars) = panels(1.1, 1)
    for shift, (name, (config, colour)) in enumerate(schedules.items()):
        sparse = config.sparse_steps(20)
        density = [
            float(config.budget.density(1, 1, (step - sparse.start) / len(sparse))) if step in sparse else 1.0
            for step in range(20)
        ]
        steps.step(np.arange(20) + 0.5, np.array(density) - 0.006 * shift, where="mid", color=colour, label=name)
    steps.set(xlabel="denoising step", ylabel="density", ylim=(0, 1.04), title="schedules over 20 steps")
    steps.set_xticks(range(0, 21, 5))
    steps.legend()
    names = ("default", "0 dense", "first steps denser", "falling")
    counts = (4, 8, 10, 20)
    for group, count in enumerate(counts):
        told = json.loads((_RESULTS / f"cpu-schedules-{count}-steps.json").read_text(encoding="utf-8"))
        means = {row["setting"]: row["psnr_mean"] for row in told["summary"]}
        for place, (name, (_, colour)) in enumerate(zip(names, schedules.values())):
            at, mean = group + 0.21 * (place - 1.5), means[f"{name}, sparsity 0.75"]
            bars.bar(at, mean, 0.19, color=colour)
            bars.text(at, mean + 0.12, f"{mean:.1f}", ha="center", fontsize=6.5, color=SOFT)
    bars.set_xticks(range(len(counts)), [f"{count} steps" for count in counts])
    bars.set(ylim=(38, 46), ylabel="PSNR (dB)", title="likeness to dense, 8 prompts")
    bars.grid(axis="x", visible=False)
    return figure


_LADDER = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)


@cache
def _losses() -> Tensor:
    """Squared errors of each head's output at each density, float64 [1, rungs, stretches, layers, heads]."""
    forwards = recorded()
    rows = []
    for at in (0.15, 0.5, 0.85):
        layers = []
        for q, k, v in forwards[int(at * len(forwards))]:
            exact = _dense(q, k, v)
            outs = [
                draft_attention(q, k, v, grid=_GRID.shape, config=DraftAttentionConfig(1 - share)) for share in _LADDER
            ]
            layers.append(torch.stack([(out - exact).square().sum((0, 1, 3)) for out in outs]).double())
        rows.append(torch.stack(layers, 1))  # [rungs, layers, heads]
    return torch.stack(rows, 1)[None]


def tune() -> Any:
    loss = _losses()
    ladder = torch.tensor(_LADDER, dtype=torch.float64)
    # Work as counted: a sparse call at a density, and what the draft takes beside it.
    cost = (ladder + 0.06)[None]
    line = allocations(*finer(ladder, loss, cost), 1.0, (0.0,))
    alike = [(float(c), float(loss[0, rung].sum())) for rung, c in enumerate(cost[0])]
    figure, (curve, *maps, bars) = panels(1.3, 0.8, 0.8, 1.3, height=3.0)
    whole = float(loss[0, 0].sum())
    curve.plot([one.work for one in line], [one.loss / whole for one in line], color=BLUE, label="spread by need")
    curve.plot(*zip(*[(work, lost / whole) for work, lost in alike]), "o--", color=ORANGE, label="the same everywhere")
    curve.set(yscale="log", xlim=(0, 0.85), xlabel="work: time of attention over dense", title="local errors")
    curve.set_ylabel("squared error, of the most")
    curve.legend()
    told = json.loads((_RESULTS / "cpu-tuned.json").read_text(encoding="utf-8"))
    tuned = np.array(told["settings"]["tuned, sparsity 0.75"]["sparsity"]["heads"])
    for axis, density, name in zip(maps, (tuned[0], tuned[-1]), ("first steps", "last steps")):
        image = picture(axis, density, name, vmin=0, vmax=1)
        axis.set(xlabel="head", yticks=range(len(density)), xticks=range(density.shape[1]))
    maps[0].set_ylabel("layer")
    figure.colorbar(image, ax=maps, label="density", shrink=0.85)
    names = {"default": GRAY, "first steps denser": SKY, "tuned": BLUE}
    for place, (row, colour) in enumerate(zip(told["summary"], names.values())):
        bars.bar(place, row["psnr_mean"], 0.7, color=colour)
        bars.text(place, row["psnr_mean"] + 0.1, f"{row['psnr_mean']:.1f}", ha="center", fontsize=8.5, color=SOFT)
    bars.set_xticks(range(3), ("default", "first steps\ndenser", "tuned"))
    bars.set(ylim=(40, 45), ylabel="PSNR (dB)", title="likeness, 8 prompts")
    bars.grid(axis="x", visible=False)
    return figure


def grids_and_gpus() -> Any:
    torch.manual_seed(0)
    q, k, _ = late()[3]
    figure, (mask, gpus) = panels(1, 1.5, height=3.2)
    first, second = LatentGrid(4, 16, 16), LatentGrid(2, 16, 16)
    q, k = (torch.cat([x[:, : 6 * 256], 0.3 * torch.randn(1, 128, *x.shape[2:])], 1) for x in (q, k))
    tiling = Rule().tiling(first, 128, 0, q.device, ((first.tokens, second),))
    q_mean, means = pool(q, tiling), Tail(pool(k, tiling), pool(k, tiling))
    keep = worst(
        errors(q_mean, k, k, means, tiling, scale=q.shape[-1] ** -0.5), torch.full((q.shape[2],), 0.25).double()
    )
    picture(mask, with_text(keep, tiling)[0, 1].numpy(), "two grids and text in one call", cmap=_KEEP)
    edges = np.cumsum([part.grid.tokens // 64 for part in tiling.parts])
    for edge in edges:
        mask.axhline(edge - 0.5, color=AMBER, lw=1.2)
        mask.axvline(edge - 0.5, color=AMBER, lw=1.2)
    middles = (edges[0] / 2, (edges[0] + edges[1]) / 2, (edges[1] + tiling.tiles) / 2)
    mask.set_xticks(middles, ("video", "reference", "text"), fontsize=8.5)
    ways = ((1, 8), (2, 4), (4, 2), (8, 1))
    shares = [Share(75_600, ulysses=u, ring=r) for u, r in ways]
    dense = [(one.dense_seconds + one.link_seconds(sparse=False)) * 1e3 for one in shares]
    work, links = ([1e3 * x for x in row] for row in zip(*[(one.sparse_seconds, one.link_seconds()) for one in shares]))
    place = np.arange(len(ways))
    gpus.bar(place - 0.2, dense, 0.36, color=GRAY, label="dense")
    gpus.bar(place + 0.2, work, 0.36, color=BLUE, label="sparse, work")
    gpus.bar(place + 0.2, links, 0.36, bottom=work, color=SKY, label="sparse, links")
    gpus.set_xticks(place, [f"ulysses {u}\nring {r}" for u, r in ways])
    gpus.set(ylabel="ms a layer, on paper", title="75,600 tokens over 8 GPUs, density 0.2", ylim=(0, 37))
    gpus.legend(loc="upper right", ncols=3)
    gpus.grid(axis="x", visible=False)
    return figure


def _rounded(x: Tensor, block: int) -> Tensor:
    """To 8 bits, a scale for each block of tokens."""
    blocks = x.unflatten(0, (-1, block))
    scale = blocks.abs().amax((1, 2), keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(0, 1)


def _wrong_in_8_bits(q: Tensor, k: Tensor, mean: Tensor) -> float:
    """Relative error of one head's map whose scores are products of 8 bits, a mean key taken off before."""
    scale = q.shape[-1] ** -0.5
    exact = F.softmax(q @ k.T * scale, -1)
    found = _rounded(q, 64) @ _rounded(k - mean, 64).T + (q @ mean)[:, None]
    return float((F.softmax(found * scale, -1) - exact).norm() / exact.norm())


def int8() -> Any:
    figure, (spread, lost) = panels(1, 1)
    q, k, _ = late()[3]
    q, k = q[0, :, 1], k[0, :, 1]
    apart = torch.zeros(k.shape[-1])
    apart[[20, 33, 47, 58]] = 1.0  # as trained models have them: the same few channels of every key
    at = np.arange(len(apart))
    for keys, colour, name in ((k + 12 * apart, ORANGE, "12 added to four"), (k, BLUE, "the embedded model's")):
        spread.errorbar(
            at, keys.mean(0), keys.std(0), fmt="o", color=colour, ecolor=PALE, markersize=3, lw=1.2, label=name
        )
    spread.set(xlabel="channel", ylabel="keys: mean and deviation", title="keys of one head")
    spread.legend(loc="center right")
    added = (0, 2, 4, 8, 12, 16)
    for on, colour, name in ((False, ORANGE, "keys as they are"), (True, BLUE, "their mean taken off first")):
        values = []
        for much in added:
            keys = k + much * apart
            values.append(100 * _wrong_in_8_bits(q, keys, keys.mean(0) if on else torch.zeros_like(apart)))
        lost.plot(added, values, "o-", color=colour, label=name)
    lost.set(xlabel="added to four channels of all keys", ylabel="relative error of the map, %", ylim=(0, None))
    lost.set_title("scores in 8 bits, a scale for 64 tokens")
    lost.legend()
    return figure


PICTURES = {
    "draft-map": draft_map_picture,
    "tail": tail,
    "error-and-tokens": error_aware,
    "budgets": budgets,
    "tune": tune,
    "grids-and-gpus": grids_and_gpus,
    "int8": int8,
}
