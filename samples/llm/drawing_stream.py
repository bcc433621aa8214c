"""Drafters that learn as they go on a stream of drawing revisions: tokens per forward of the target, block by block.

An office sends one project after another; within a block of the stream files and types of task repeat. ADED's n-grams
(arXiv 2407.12021) and OmniDraft (arXiv 2507.02659), whose draft has another tokenizer, are each run twice: adapting
over the whole stream, and begun anew for every case. All answers are the target's own, which is checked.

    python samples/llm/drawing_stream.py --json stream.json --plot stream.png
    python samples/llm/drawing_stream.py --model Qwen/Qwen2.5-7B-Instruct --draft HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from workload_script import parsed, save

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, whole
from draftdiff.compare.paired import mean_interval
from draftdiff.llm import CrossVocabDistiller, CrossVocabDrafter, NGramCache, NGramDrafter, speculative
from draftdiff.llm.workloads.drawing.workload import DrawingWorkload
from draftdiff.models.devices import device_name, versions
from draftdiff.models.llm import LanguageModel, encode, load

RATE = 1e-3  # of OmniDraft's training while decoding


def drafters(model: LanguageModel, rate: float) -> dict[str, Callable[[], Any]]:
    """What gives the drafter of the next case, by name."""
    kept = NGramDrafter(nodes=model.nodes)
    found: dict[str, Callable[[], Any]] = {
        "n-grams, kept": lambda: kept,
        "n-grams, anew": lambda: NGramDrafter(nodes=model.nodes),
    }
    if model.cross is None:
        return found
    known = model.cross.vocabularies
    learner = copy.deepcopy(model.cross.model)
    learning = CrossVocabDrafter(
        learner, known.tokenizer, model.tokenizer, length=model.length, online=CrossVocabDistiller(learner, lr=rate)
    )

    def anew() -> CrossVocabDrafter:
        drafter = copy.copy(model.cross)
        assert drafter is not None
        drafter.cache, drafter.length = NGramCache(), model.length
        return drafter

    return found | {"OmniDraft, learning": lambda: learning, "OmniDraft, anew": anew}


def measured(model: LanguageModel, cases: Sequence[Any], tokens: int, rate: float) -> dict[str, list[dict[str, float]]]:
    """Of every case and drafter: tokens, forwards, and the share of first drafts that were accepted."""
    made: dict[str, list[dict[str, float]]] = {}
    given = {"do_sample": False, "max_new_tokens": tokens}
    everyone = drafters(model, rate)
    for case in tqdm(cases, desc="stream", unit="case"):
        ids = encode(model, case.prompt)
        plain = model.target.generate(ids, **given)
        for name, drafter_of in everyone.items():
            drafter = drafter_of()
            out = model.target.generate(ids, custom_generate=speculative, drafter=drafter, pace=None, **given)
            if not torch.equal(out, plain):
                raise SystemExit(f"{name} changed what the target says to {case.prompt[-80:]!r}")
            report = drafter.last_report
            first = (report.acceptance or [0.0])[0]
            made.setdefault(name, []).append(
                {"tokens": report.tokens, "forwards": report.target_forwards, "accepted": first}
            )
    return made


def summary(made: dict[str, list[dict[str, float]]], block: int) -> list[dict[str, Any]]:
    """Per drafter: tokens per forward over blocks of the stream, and over its second half with the gain of adapting."""
    rows = []
    rates = {name: [one["tokens"] / one["forwards"] for one in found] for name, found in made.items()}
    for name, found in made.items():
        blocks = [found[start : start + block] for start in range(0, len(found), block)]
        half = len(found) // 2
        later = found[half:]
        partner = next(other for other in made if other.endswith("anew") and other[:4] == name[:4])
        gain = mean_interval([a - b for a, b in zip(rates[name][half:], rates[partner][half:])])
        rows.append(
            {
                "drafter": name,
                "tokens_per_forward": [sum(o["tokens"] for o in b) / sum(o["forwards"] for o in b) for b in blocks],
                "accepted": [fmean(one["accepted"] for one in part) for part in blocks],
                "second_half": sum(one["tokens"] for one in later) / sum(one["forwards"] for one in later),
                "gain": None if name == partner else vars(gain),
            }
        )
    return rows


def draw(rows: Sequence[dict[str, Any]], block: int, file: Path) -> None:
    """Tokens per forward over the stream."""
    from matplotlib.figure import Figure

    from draftdiff.compare.charts import PALETTE

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        ends = [block * (at + 1) for at in range(len(row["tokens_per_forward"]))]
        line = "--" if row["drafter"].endswith("anew") else "-"
        style = {"marker": "o", "ms": 4, "color": PALETTE[number // 2], "label": row["drafter"]}
        axes.plot(ends, row["tokens_per_forward"], line, **style)
    axes.set_xlabel("answers so far")
    axes.set_ylabel("tokens per forward of the target")
    axes.set_ylim(bottom=1)
    save(figure, file)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="drawing_stream", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=whole(2), default=96, help="answers in all (default 96)")
    parser.add_argument("--block", type=whole(1), default=12, help="answers of a project (default 12)")
    draft = "a draft; OmniDraft needs one of another tokenizer"
    options = parsed(parser, argv, pair="the embedded drawing pair", draft=draft)
    model = load(options.model, options.draft, workload="drawing")
    workload = DrawingWorkload(compact=options.model is None)
    cases = workload.stream(options.seed, options.cases, options.block)
    rows = summary(measured(model, cases, workload.tokens, RATE), options.block)
    for row in rows:
        gain = row["gain"]
        more = "" if gain is None else f", {gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f}) an answer"
        first = row["tokens_per_forward"][0]
        print(f"{row['drafter']:<22}{first:.2f} in the first block, {row['second_half']:.2f} in the second half{more}")
    if options.json:
        where = {"device": device_name(model.device), "versions": versions(), "model": model.name}
        settings = {"cases": options.cases, "block": options.block, "seed": options.seed, "rate": RATE}
        write_json(options.json, {"rows": rows, "settings": settings, **where})
    if options.plot:
        draw(rows, options.block, options.plot)


if __name__ == "__main__":
    sys.exit(run(main, "drawing_stream"))
