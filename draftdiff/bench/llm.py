"""What draftdiff.llm costs beside the models: the loop per round, n-gram drafts, and the bound at a large vocabulary.

The loop's time is that of all rounds, drafting included, less what the forwards of target and draft took; every output
is checked against plain decoding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from draftdiff.bench.runner import Routine, timed
from draftdiff.compare.table import Column, spread, text_table, with_spread
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
from draftdiff.models.llm import example_prompts, load

COLUMNS: tuple[Column, ...] = (
    ("", "what", str, ""),
    ("nodes", "nodes", "{:.0f}".format, ""),
    ("ms", "ms", with_spread("", 2), ""),
    ("bar", "bar", "{:g}".format, ""),
)
# Bars, in milliseconds.
ROUND, PROPOSAL, BOUND = 1.0, 2.0, 50.0
VOCABULARY = 128_256


@dataclass(frozen=True)
class Row:
    """Milliseconds of something. nodes: of a tree, None where there is none.  bar: what they should be below."""

    what: str
    nodes: float | None
    ms: dict[str, float]
    bar: float


class Loop(Routine):
    name = "llm loop"
    file = "llm-loop"

    def cases(self) -> list[Callable[[], Row]]:
        model = load(None, None, device=str(self.device))
        ids = example_prompts(model, 1, 128)[0]
        drafters = {
            "tree of best paths": ModelDrafter(model.draft, KBest(depth=5, width=6, nodes=64)),
            "n-grams": NGramDrafter(),
            "chain of 4": ModelDrafter(model.draft, Chain(4)),
        }
        bounds = [*product(("with_replacement", "without_replacement", "greedy"), (2, 4)), ("without_replacement", 8)]
        return [
            *(partial(self.loop, model, ids, name, drafter) for name, drafter in drafters.items()),
            *(partial(self.proposal, search) for search in ("best_first", "puct")),
            *(partial(self.bound, sampler, n) for sampler, n in bounds),
        ]

    def measure(self, case: Callable[[], Row]) -> list[dict[str, Any]]:
        return [asdict(case())]

    def repeated(self, once: Callable[[], float]) -> dict[str, float]:
        """Of all rounds after an untimed one."""
        return spread([once() for _ in range(1 + self.options.rounds)][1:])

    def loop(self, model: Any, ids: torch.Tensor, name: str, drafter: Any) -> Row:
        """A round outside forwards, of which the drafter takes a part."""
        options = {"do_sample": False, "max_new_tokens": 96}
        plain = model.target.generate(ids, **options)

        def once() -> float:
            with timed_forwards(model.target, model.draft) as forwards:
                out = model.target.generate(ids, **options, custom_generate=speculative, drafter=drafter, pace=None)
            if not torch.equal(out, plain):
                self.failures.append(f"{name} wrote something else than plain decoding")
            done = report(drafter)
            # Not those of the prompt.
            in_rounds = forwards[len(forwards) - done.target_forwards - done.draft_forwards :]
            return 1e3 * (done.seconds - done.prompt_seconds - sum(in_rounds)) / done.rounds

        ms = self.repeated(once)
        done = report(drafter)
        return Row(f"loop, {name}", round(done.drafted / done.rounds, 1), ms, ROUND)

    def proposal(self, search: str) -> Row:
        """A proposal of 64 nodes from a well-filled table."""
        draws = random.Random(0)
        text = [min(int(draws.expovariate(0.15)), 60) for _ in range(200_000)]
        drafter = NGramDrafter(NGramTable([text]), search=search)

        def trees() -> list[Any]:
            return [drafter.tree(text[i : i + 2], 5) for i in range(200)]

        nodes = sum(len(tree.tokens) for tree in trees()) / 200
        ms = self.repeated(lambda: 1e3 * timed(trees, torch.device("cpu"))[1] / 200)
        return Row(f"n-gram proposal, {search}", nodes, ms, PROPOSAL)

    def bound(self, sampler: str, n: int) -> Row:
        """The bound for a large vocabulary."""
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(VOCABULARY, generator=generator)
        p, q = logits.softmax(-1), (logits + torch.randn(VOCABULARY, generator=generator)).softmax(-1)

        def once() -> float:
            bound, seconds = timed(lambda: acceptance_upper_bound(p, q, n, sampler), torch.device("cpu"))
            if not 0 < bound <= 1:
                self.failures.append(f"the bound of {n} drafts {sampler} is {bound}")
            return 1e3 * seconds

        return Row(f"bound, {n} drafts {sampler}", None, self.repeated(once), BOUND)

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["rows"], COLUMNS)


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
