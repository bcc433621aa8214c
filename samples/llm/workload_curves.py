"""What smaller caches and shorter prompts cost on a workload: its score over the tokens that are kept, with intervals.

SpecKV, SpecPC and both at several budgets beside plain decoding, the same cases for all; on travel planning the
Scrubber too, and SpecPC at as many tokens as the Scrubber leaves of each prompt. Differences are paired, their
intervals 95 % by bootstrap over the cases. Where plain decoding is at the floor it says so and gives no verdict.

    python samples/llm/workload_curves.py --workload drawing --json curves.json --plot curves.png
    python samples/llm/workload_curves.py --workload travel --model Qwen/Qwen2.5-7B --draft Qwen/Qwen2.5-0.5B \\
        --noise 1 --capacity 1024 2048 4096
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor
from tqdm import tqdm
from workload_script import parsed, save

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, whole
from draftdiff.compare.llm_workload import Judgement, checked_cases
from draftdiff.llm.workloads.base import Case
from draftdiff.llm.workloads.named import WORKLOADS, named_workload
from draftdiff.llm.workloads.travel.workload import TravelWorkload
from draftdiff.models.devices import device_name, versions
from draftdiff.models.llm import LanguageModel, encode, load
from draftdiff.models.llm_methods import check_method, generate_options

METHODS = ("speckv", "specpc", "speckv-pc")
CAPACITY = {"drawing": [32, 48, 64, 96, 128], "travel": [128, 256, 384, 512]}  # of compact prompts


class Curves:
    """A pair, its cases, and what each way of answering wrote."""

    def __init__(self, options: Any) -> None:
        self.options = options
        compact = options.model is None
        self.workload = named_workload(options.workload, compact=compact, noise=options.noise)
        self.cases = checked_cases(self.workload, options.seed, options.cases)
        self.model: LanguageModel = load(options.model, options.draft, workload=options.workload)
        for method in METHODS:
            check_method(self.model, method)
        self.arguments = generate_options(options.tokens or self.workload.tokens, 0.0)
        self.prompts = [encode(self.model, case.prompt) for case in self.cases]
        self.texts: dict[str, list[str]] = {}
        self.rows: list[dict[str, Any]] = []

    def answer(self, name: str, method: str, prompts: Sequence[Tensor], kept: Sequence[int]) -> None:
        """Answers of a method that keeps so many tokens of each prompt, and its row."""
        act = check_method(self.model, method)
        runs = [act.run(self.model, ids, self.arguments, keep) for ids, keep in zip(prompts, kept)]
        self.texts[name] = [self.model.tokenizer.decode(run.tokens) for run in runs]
        whole_ones = [ids.shape[1] for ids in self.prompts]
        held = [min(keep, ids.shape[1]) for keep, ids in zip(kept, prompts)]
        self.rows.append(
            {
                "name": name,
                "method": method,
                "kept": fmean(held),
                "kept_share": sum(held) / sum(whole_ones),
                "cache": fmean(run.cache for run in runs),
                "seconds": sum(run.seconds for run in runs),
            }
        )

    def all(self) -> None:
        everything = [ids.shape[1] for ids in self.prompts]
        budgets = [(method, capacity) for method in METHODS for capacity in self.options.capacity]
        with tqdm(total=1 + len(budgets) + 2 * isinstance(self.workload, TravelWorkload), unit="way") as bar:
            self.answer("plain", "plain", self.prompts, everything)
            bar.update()
            for method, capacity in budgets:
                self.answer(f"{method} {capacity}", method, self.prompts, [capacity] * len(everything))
                bar.update()
            if isinstance(self.workload, TravelWorkload):
                shorter = [encode(self.model, self.workload.scrubbed(case).prompt) for case in self.cases]
                kept = [ids.shape[1] for ids in shorter]
                self.answer("scrubber", "plain", shorter, kept)
                self.answer("specpc as the scrubber", "specpc", self.prompts, kept)
                bar.update(2)

    def judged(self) -> tuple[Judgement, list[dict[str, Any]]]:
        """The judgement, and the rows with score and paired difference."""
        cases: Sequence[Case] = self.cases
        judgement = Judgement.of(self.workload, cases, self.texts)
        rows = []
        for row in self.rows:
            name, difference = row["name"], judgement.difference(row["name"])
            scored = {"score": judgement.mean(name), "difference": difference and vars(difference)}
            verdict = None if name == "plain" else judgement.verdict(name)
            summary = self.workload.summary(cases, judgement.scores[name])
            rows.append(row | scored | {"verdict": verdict, "summary": summary})
        return judgement, rows


def draw(rows: Sequence[dict[str, Any]], headline: str, file: Path) -> None:
    """The score over the tokens kept, with the intervals of its difference from plain decoding."""
    from matplotlib.figure import Figure

    from draftdiff.compare.charts import PALETTE

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    plain = rows[0]["score"]
    axes.axhline(plain, color="grey", lw=1, label="plain decoding")
    for colour, method in zip(PALETTE, METHODS):
        own = [row for row in rows if row["method"] == method and row["name"] != "specpc as the scrubber"]
        low, high = ([plain + row["difference"][end] for row in own] for end in ("low", "high"))
        axes.plot([row["kept"] for row in own], [row["score"] for row in own], "o-", ms=4, color=colour, label=method)
        axes.fill_between([row["kept"] for row in own], low, high, color=colour, alpha=0.15, lw=0)
    for marker, row in zip("^s", [row for row in rows if "scrubber" in row["name"]]):
        axes.plot([row["kept"]], [row["score"]], marker, color="black", label=row["name"])
    axes.set_xlabel("tokens kept of a prompt")
    axes.set_ylabel(headline)
    save(figure, file)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="workload_curves", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--capacity", type=whole(1), nargs="+", help="tokens to keep (default: by workload)")
    parser.add_argument("--cases", type=whole(2), default=48, help="(default 48)")
    parser.add_argument("--noise", type=float, help="of travel's tables with --model, 0 to 1 (default 0.3)")
    parser.add_argument("--tokens", type=whole(1), help="new tokens (default: what answers need)")
    options = parsed(parser, argv, pair="an embedded pair", draft="a smaller model of the same tokenizer")
    options.capacity = options.capacity or CAPACITY[options.workload]
    curves = Curves(options)
    curves.all()
    judgement, rows = curves.judged()
    headline = judgement.workload.headline
    print(f"{'method':<24}{'kept':>8}{headline:>10}   difference from plain (95 % interval)")
    for row in rows:
        found = judgement.difference(row["name"])
        said = "" if row["name"] == "plain" else f"   {found}: {row['verdict']}"
        print(f"{row['name']:<24}{row['kept']:>8.0f}{row['score']:>10.1f}{said}")
    refusal = judgement.refusal()
    print(refusal or f"floor, right answers to other cases: {judgement.floor:.1f}")
    if options.json:
        where = {"device": device_name(curves.model.device), "versions": versions(), "model": curves.model.name}
        settings = {name: getattr(options, name) for name in ("workload", "cases", "seed", "noise")}
        made = {"rows": rows, "headline": headline, "floor": judgement.floor, "refusal": refusal}
        write_json(options.json, {**made, "settings": settings, **where})
    if options.plot:
        draw(rows, headline, options.plot)


if __name__ == "__main__":
    sys.exit(run(main, "workload_curves"))
