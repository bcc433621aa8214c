"""Methods of draftdiff.llm measured against plain decoding on the same prompts.

All methods run in turn within a round, in one process, so that a machine that slows down slows all of them; a speed-up
is a ratio within a round. What a method writes is looked at in an untimed run before, and every timed run is checked
against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from draftdiff.compare.comparison import Comparison
from draftdiff.compare.llm_workload import Judgement
from draftdiff.compare.table import Column, megabytes, spread, with_spread
from draftdiff.errors import UserError
from draftdiff.llm.workloads.base import Case, Workload
from draftdiff.models.llm import LanguageModel
from draftdiff.models.llm_methods import METHODS, Run, check_method

COLUMNS: tuple[Column, ...] = (
    ("method", "method", str, "plain is one token per forward of the target"),
    ("lossless", "lossless", str, "whether the text is the target's own whatever the draft says"),
    ("tokens/forward", "tokens_per_forward", "{:.2f}".format, "tokens per forward of the target, its prompt left out"),
    ("drafts/round", "drafts_per_round", "{:.1f}".format, "forwards of the draft per forward of the target"),
    (
        "MBSU",
        "mbsu",
        "{:.2f}x".format,
        "memory-bound speed-up: what the bytes of weights that are read predict, the prompt left out",
    ),
    (
        "speed-up",
        "speedup",
        with_spread("x", 2),
        "plain time per token over this one in the same round: median (least-most)",
    ),
    ("ms/token", "milliseconds", with_spread("", 2), "time of whole calls, prompt included: median (least-most)"),
    ("cache", "cache", megabytes, "the target's keys and values at the end of a call"),
    ("of plain", "cache_share", "{:.0%}".format, "the cache as a share of the plain one"),
    (
        "same text",
        "same_text",
        "{:.0%}".format,
        "share of the longer text before the first token that differs from plain's",
    ),
    (
        "next token",
        "next_token",
        "{:.0%}".format,
        "share of plain's tokens that are also this method's choice after plain's text so far",
    ),
    ("score", "score", "{:.1f}".format, "the headline figure of the workload, mean over its cases"),
    ("difference", "difference", str, "from plain's score, case by case: mean (95 % interval by bootstrap)"),
    ("verdict", "verdict", str, "lossless methods are judged by their tokens, lossy ones by the difference"),
)


@dataclass
class MethodResult:
    """runs: untimed ones, one per prompt.  seconds, tokens: of all prompts together, per round.  next_token: share of
    plain's tokens that the method's target would choose too, given plain's before it; None when sampling.  repeats:
    whether all timed runs wrote the same."""

    name: str
    runs: list[Run]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    next_token: float | None = None
    repeats: bool = True

    @property
    def per_token(self) -> list[float]:
        """Seconds per token in each round: texts may end at different lengths."""
        return [seconds / tokens for seconds, tokens in zip(self.seconds, self.tokens)]


@dataclass
class LlmComparison(Comparison[MethodResult]):
    """Results, plain first. prompts: their tokens.  options: arguments of generate.  about: where and with what."""

    made_by = "draftdiff llm compare"
    columns = COLUMNS

    model: str
    prompts: list[Tensor]
    capacity: int
    options: dict[str, Any]
    results: list[MethodResult]
    texts: dict[str, list[str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    judgement: Judgement | None = None

    @property
    def sampling(self) -> bool:
        return bool(self.options["do_sample"])

    def row(self, result: MethodResult) -> dict[str, Any]:
        others = result is not self.baseline
        reports = [run.report for run in result.runs if run.report is not None]
        rounds = sum(report.target_forwards for report in reports)
        drafts = sum(report.draft_forwards for report in reports)
        same = [_same_start(run.tokens, base.tokens) for run, base in zip(result.runs, self.baseline.runs)]
        return {
            "method": METHODS[result.name].title,
            "lossless": "yes" if METHODS[result.name].lossless else "no",
            "tokens_per_forward": sum(report.tokens for report in reports) / rounds if reports else 1.0,
            "drafts_per_round": drafts / rounds if reports else None,
            "mbsu": fmean(report.mbsu for report in reports) if reports else None,
            "speedup": spread([base / own for base, own in zip(self.baseline.per_token, result.per_token)])
            if others
            else None,
            "milliseconds": spread([1e3 * seconds for seconds in result.per_token]),
            "cache": max(run.cache for run in result.runs),
            "cache_share": max(run.cache for run in result.runs) / max(run.cache for run in self.baseline.runs)
            if others
            else None,
            "same_text": fmean(same) if others and not self.sampling else None,
            "next_token": result.next_token,
            **self._judged(result),
        }

    def _judged(self, result: MethodResult) -> dict[str, Any]:
        """The columns of a workload."""
        judged = self.judgement
        if judged is None:
            return dict.fromkeys(("score", "difference", "verdict"))
        lossless, others = METHODS[result.name].lossless, result is not self.baseline
        same = [torch.equal(run.tokens, base.tokens) for run, base in zip(result.runs, self.baseline.runs)]
        identity = "same tokens" if all(same) else f"other tokens in {same.count(False)} of {len(same)}"
        exact = "exact in law" if self.sampling else identity
        return {
            "score": judged.mean(result.name),
            "difference": judged.difference(result.name) if not lossless else None,
            "verdict": None if not others else exact if lossless else judged.verdict(result.name),
        }

    def notes(self) -> list[str]:
        unlike = [
            f"{METHODS[result.name].title} did not write the same text in every round"
            for result in self.results
            if not result.repeats and not self.sampling
        ]
        lossy = any(not METHODS[result.name].lossless for result in self.results)
        refusal = self.judgement.refusal() if self.judgement is not None and lossy else None
        return [*unlike, *([refusal] if refusal else [])]

    def content(self) -> dict[str, Any]:
        methods = [
            {
                "name": result.name,
                **row,
                "difference": row["difference"] and vars(row["difference"]),
                "seconds": result.seconds,
                "tokens": result.tokens,
                "repeats": result.repeats,
                "reports": [run.report and run.report.to_dict() for run in result.runs],
                "texts": self.texts.get(result.name),
            }
            for result, row in zip(self.results, self.rows())
        ]
        return {
            "model": self.model,
            "prompt_tokens": [prompt.shape[1] for prompt in self.prompts],
            "capacity": self.capacity,
            "options": self.options,
            "methods": methods,
            **({} if self.judgement is None else {"workload": self.judgement.content()}),
        }


def compare_methods(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    methods: Sequence[str],
    *,
    capacity: int,
    options: dict[str, Any],
    repeat: int = 3,
    seed: int = 0,
    about: dict[str, Any] | None = None,
    progress: bool = True,
    workload: tuple[Workload, Sequence[Case]] | None = None,
) -> LlmComparison:
    """Run plain decoding and every method on all prompts, `repeat` times, and compare.

    prompts: int64 [1, tokens] each.  methods: keys of METHODS.  capacity: tokens that SpecKV and SpecPC keep.
    options: arguments of generate, do_sample and max_new_tokens among them.  about: where and with what it runs.
    workload: by which answers are scored, with the cases whose prompts these are.
    Raises UserError for no prompts, unknown methods, or a capacity below 1.
    """
    if not prompts:
        raise UserError("a comparison needs at least one prompt")
    if repeat < 1:
        raise UserError(f"repeat must be at least 1, got {repeat}")
    if capacity < 1:
        raise UserError(f"capacity must be at least 1, got {capacity}")
    names = list(dict.fromkeys(["plain", *methods]))
    for name in names:
        check_method(model, name)
    prompts = [prompt.to(model.device) for prompt in prompts]
    results: list[MethodResult] = []

    def run_all(name: str) -> list[Run]:
        torch.manual_seed(seed)
        return [METHODS[name].run(model, prompt, options, capacity) for prompt in prompts]

    with tqdm(total=len(names) * (1 + repeat), desc="compare", unit="run", disable=not progress, leave=False) as bar:
        for name in names:
            bar.set_postfix_str(f"{name} (warm-up)")
            results.append(MethodResult(name, run_all(name)))
            bar.update()
        for result in (result for _ in range(repeat) for result in results):
            bar.set_postfix_str(result.name)
            runs = run_all(result.name)
            result.seconds.append(sum(run.seconds for run in runs))
            result.tokens.append(sum(len(run.tokens) for run in runs))
            result.repeats &= all(torch.equal(a.tokens, b.tokens) for a, b in zip(runs, result.runs))
            bar.update()
    if not options["do_sample"]:
        for result in results[1:]:
            result.next_token = _next_token(result, results[0])
    texts = {result.name: [model.tokenizer.decode(run.tokens) for run in result.runs] for result in results}
    judgement = None if workload is None else Judgement.of(*workload, texts)
    return LlmComparison(
        model.name, list(prompts), capacity, dict(options), results, texts, dict(about or {}), judgement
    )


def _same_start(tokens: Tensor, plain: Tensor) -> float:
    """Share of the longer text's tokens before the first that differs or that only one of them has."""
    length = min(len(tokens), len(plain))
    different = (tokens[:length] != plain[:length]).nonzero()
    return (int(different[0]) if len(different) else length) / max(len(tokens), len(plain))


def _next_token(result: MethodResult, plain: MethodResult) -> float | None:
    """Share of plain's tokens that are this method's choice after plain's tokens before them."""
    if METHODS[result.name].lossless:
        # The target sees everything: it would choose differently only if speculation were wrong.
        return fmean(_same_start(run.tokens, base.tokens) for run, base in zip(result.runs, plain.runs))
    shares = []
    for run, base in zip(result.runs, plain.runs):
        assert run.logits is not None
        chosen = run.logits(base.tokens).argmax(-1).cpu()
        shares.append(float((chosen == base.tokens).float().mean()))
    return fmean(shares)
