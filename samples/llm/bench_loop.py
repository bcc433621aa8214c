"""What draftdiff.llm costs beside the models: the loop per round, n-gram drafts, and the bound at a large vocabulary.

The loop's time is that of all rounds, drafting included, less what the forwards of target and draft took; every output
is checked against plain decoding. Half a minute on one core:

    python samples/llm/bench_loop.py --json loop.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from draftdiff.compare.table import spread
from draftdiff.llm import (
    Chain,
    KBest,
    ModelDrafter,
    NGramDrafter,
    NGramTable,
    acceptance_upper_bound,
    report,
    speculative,
)
from draftdiff.models.devices import device_name
from draftdiff.models.llm import example_prompts, load
from samples.bench_common import write_result


@contextmanager
def timed_forwards(*models: Any) -> Iterator[list[float]]:
    """Seconds of every forward of the models while the context lasts."""
    seconds: list[float] = []

    def start(*_: Any) -> None:
        seconds.append(-time.perf_counter())

    def stop(*_: Any) -> None:
        seconds[-1] += time.perf_counter()

    hooks = [model.register_forward_pre_hook(start) for model in models]
    hooks += [model.register_forward_hook(stop) for model in models]
    yield seconds
    for hook in hooks:
        hook.remove()


def loop_row(name: str, model: Any, drafter: Any, ids: torch.Tensor, repeat: int) -> dict[str, Any]:
    """Milliseconds per round outside forwards, of which the drafter takes a part."""
    options = {"do_sample": False, "max_new_tokens": 96}
    plain = model.target.generate(ids, **options)
    loop, nodes = [], 0.0
    for _ in range(repeat + 1):
        with timed_forwards(model.target, model.draft) as forwards:
            out = model.target.generate(ids, **options, custom_generate=speculative, drafter=drafter)
        if not torch.equal(out, plain):
            raise SystemExit(f"{name} wrote something else than plain decoding")
        done = report(drafter)
        in_rounds = forwards[len(forwards) - done.target_forwards - done.draft_forwards :]  # not those of the prompt
        loop.append(1e3 * (done.seconds - done.prompt_seconds - sum(in_rounds)) / done.rounds)
        nodes = done.drafted / done.rounds
    return {"what": f"loop, {name}", "nodes": round(nodes, 1), "ms": spread(loop[1:]), "bar": 1.0}


def ngram_row(search: str, repeat: int) -> dict[str, Any]:
    """Milliseconds of a proposal of 64 nodes from a well-filled table."""
    draws = random.Random(0)
    text = [min(int(draws.expovariate(0.15)), 60) for _ in range(200_000)]
    drafter = NGramDrafter(NGramTable([text]), search=search)
    rounds, nodes = [], 0
    for _ in range(repeat + 1):
        start = time.perf_counter()
        trees = [drafter.tree(text[i : i + 2], 5) for i in range(200)]
        rounds.append(1e3 * (time.perf_counter() - start) / len(trees))
        nodes = sum(len(tree.tokens) for tree in trees)
    return {"what": f"n-gram proposal, {search}", "nodes": nodes / 200, "ms": spread(rounds[1:]), "bar": 2.0}


def bound_row(sampler: str, n: int, repeat: int) -> dict[str, Any]:
    """Milliseconds of the bound for a vocabulary of 128,256 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(128_256, generator=generator)
    p, q = logits.softmax(-1), (logits + torch.randn(128_256, generator=generator)).softmax(-1)
    rounds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        bound = acceptance_upper_bound(p, q, n, sampler)
        rounds.append(1e3 * (time.perf_counter() - start))
        if not 0 < bound <= 1:
            raise SystemExit(f"the bound of {n} drafts {sampler} is {bound}")
    return {"what": f"bound, {n} drafts {sampler}", "nodes": None, "ms": spread(rounds[1:]), "bar": 50.0}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeat", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model = load(None, None, device="cpu")
    ids = example_prompts(model, 1, 128)[0]
    wide = KBest(depth=5, width=6, nodes=64)
    rows = [
        loop_row("tree of best paths", model, ModelDrafter(model.draft, wide), ids, options.repeat),
        loop_row("n-grams", model, NGramDrafter(), ids, options.repeat),
        loop_row("chain of 4", model, ModelDrafter(model.draft, Chain(4)), ids, options.repeat),
        *(ngram_row(search, options.repeat) for search in ("best_first", "puct")),
        *(
            bound_row(s, n, options.repeat)
            for s in ("with_replacement", "without_replacement", "greedy")
            for n in (2, 4)
        ),
        bound_row("without_replacement", 8, options.repeat),
    ]
    print(f"{'':<40}{'nodes':>8}{'ms (least-most)':>26}{'bar':>6}")
    for row in rows:
        ms = row["ms"]
        text = f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})"
        nodes = "" if row["nodes"] is None else f"{row['nodes']:.0f}"
        print(f"{row['what']:<40}{nodes:>8}{text:>26}{row['bar']:>6g}")
    if options.json:
        write_result(options.json, {"rows": rows, "device": device_name(model.device)})


if __name__ == "__main__":
    main()
