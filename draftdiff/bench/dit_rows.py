"""From the timed steps of `bench dit` to the figures of its rows, and from rows to a table. Arithmetic only.

A row's attention time is measured by the clocks of draftdiff's hook: in the dense step with "dense, hooked", whose
attention is the stock one. Compiled blocks have no clocks inside; they call the same attention, so their attention time
is that of the eager calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from draftdiff import DraftAttentionConfig
from draftdiff.bench.runner import ratios
from draftdiff.compare.table import Column, megabytes, spread, text_table, with_spread
from draftdiff.compare.timing import ATTENTION_PARTS, Timing, amdahl

DENSE, HOOKED = "dense", "dense, hooked"
RUN_STEPS = 50


@dataclass(frozen=True)
class Mode:
    """compiled: the repeated blocks, by torch.compile.  cached: with diffusers' First Block Cache.

    Random weights tell nothing about how often a cache hits, so a cached step stands for two calls with one input: one
    that computes all blocks, and one that hits.
    """

    compiled: bool = False
    cached: bool = False

    @property
    def calls(self) -> int:
        return 2 if self.cached else 1

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'}{', first block cache' if self.cached else ''}"


@dataclass(frozen=True)
class Cell:
    """A setting in a mode."""

    mode: Mode
    setting: str

    def __str__(self) -> str:
        return f"{self.mode}, {self.setting}"


@dataclass
class Step(Timing):
    """One denoising step. seconds, parts: of all its transformer calls; no parts of the stock transformer.

    memory: most bytes above what was in use before, None where unknown.  error: |output - eager dense output| / |eager
    dense output|.  density: of the sparse layers that ran.
    """

    memory: int | None = None
    error: float = 0.0
    finite: bool = True
    density: float | None = None

    @property
    def hook(self) -> float:
        """Seconds of the hook itself, before and after the transformer's own forward."""
        return self.breakdown()["rest of pipeline"]

    @property
    def routing(self) -> float:
        return self.parts.get("draft", 0.0) + self.parts.get("select", 0.0)


Steps = dict[Cell, list[Step]]  # one per round


@dataclass
class Row:
    """The figures of a setting, or why there are none. Seconds are of a denoising step, shares of its time.

    attention_speedup: of the attention alone, dense over sparse.  predicted_speedup: by Amdahl's law from it.
    off_prediction: measured over predicted speed-up, less one.  run: of RUN_STEPS steps.
    """

    mode: str
    compiled: bool
    cached: bool
    setting: str
    sparsity: float | None = None
    skipped: str | None = None
    seconds_per_step: dict[str, float] | None = None
    seconds_per_step_rounds: list[float] = field(default_factory=list)
    speedup: dict[str, float] | None = None
    memory: int | None = None
    relative_l2: float | None = None
    finite: bool | None = None
    density: float | None = None
    attention_seconds: float | None = None
    attention_share: float | None = None
    attention_speedup: float | None = None
    predicted_speedup: float | None = None
    off_prediction: float | None = None
    hook_seconds: float | None = None
    hook_share: float | None = None
    draft_select_seconds: float | None = None
    draft_select_share: float | None = None
    parts_seconds: dict[str, float] | None = None
    run: dict[str, float] | None = None

    @classmethod
    def of(cls, cell: Cell, sparsity: float | None = None, skipped: str | None = None) -> Row:
        return cls(str(cell.mode), cell.mode.compiled, cell.mode.cached, cell.setting, sparsity, skipped)

    def fill(self, steps: Steps, cell: Cell, depth: float) -> None:
        """depth: full depth over measured depth. The cell's mode has "dense"."""
        own, dense = steps[cell], steps[Cell(cell.mode, DENSE)]
        eager = Mode(cached=cell.mode.cached)
        hooked, clocked = steps.get(Cell(eager, HOOKED), []), steps.get(Cell(eager, cell.setting), [])
        known = [step.memory for step in own if step.memory is not None]
        self.seconds_per_step_rounds = [step.seconds for step in own]
        self.seconds_per_step = spread(self.seconds_per_step_rounds)
        self.memory = max(known) if known else None
        self.finite = all(step.finite for step in own)
        self.relative_l2 = max(step.error for step in own) if self.finite else None
        self.density = own[-1].density
        middle = self.seconds_per_step["median"]
        if cell.setting == DENSE:
            if hooked:
                self.attention_seconds = median(h.attention for h in hooked)
                self.attention_share = median(h.attention / d.seconds for h, d in zip(hooked, dense))
        else:
            self.speedup = spread(gains(dense, own))
            self.hook_seconds = median(step.hook for step in own)
            self.hook_share = self.hook_seconds / middle
        if cell.setting not in (DENSE, HOOKED) and hooked and clocked:
            # Within a round, so that a machine that slows down slows both sides of a ratio.
            faster = ratios([h.attention for h in hooked], [c.attention for c in clocked])
            predicted = [amdahl(min(1.0, h.attention / d.seconds), f) for h, d, f in zip(hooked, dense, faster)]
            self.attention_seconds = median(c.attention for c in clocked)
            self.attention_speedup = median(faster)
            self.predicted_speedup = median(predicted)
            self.off_prediction = median(ratios(gains(dense, own), predicted)) - 1
            self.draft_select_seconds = median(c.routing for c in clocked)
            self.draft_select_share = self.draft_select_seconds / middle
            self.parts_seconds = {part: median(c.parts.get(part, 0.0) for c in clocked) for part in ATTENTION_PARTS}
        # A dense step of a run with draftdiff goes through its hook.
        warm_up = dense if cell.setting == DENSE else steps.get(Cell(cell.mode, HOOKED), dense)
        totals = [depth * run_of(first.seconds, later.seconds) for first, later in zip(warm_up, own)]
        plain = steps.get(Cell(Mode(), DENSE), [])
        bases = {"speedup": dense, "speedup_over_eager_dense": plain}
        self.run = {"seconds": median(totals)} | {
            name: median(ratios([depth * RUN_STEPS * b.seconds for b in base], totals))
            for name, base in bases.items()
            if base
        }


def gains(dense: list[Step], own: list[Step]) -> list[float]:
    return ratios([step.seconds for step in dense], [step.seconds for step in own])


def run_of(dense_step: float, sparse_step: float) -> float:
    """Seconds of a run of RUN_STEPS of which as many are sparse as the default config says."""
    sparse_steps = len(DraftAttentionConfig().sparse_steps(RUN_STEPS))
    return (RUN_STEPS - sparse_steps) * dense_step + sparse_steps * sparse_step


def run_seconds(run: Mapping[str, float]) -> str:
    return f"{run['seconds']:.4g} s"


def over_eager_dense(run: Mapping[str, float]) -> str:
    return f"{run['speedup_over_eager_dense']:.2f}x" if "speedup_over_eager_dense" in run else ""


def verdict(finite: bool) -> str:
    return "" if finite else "NOT FINITE"


COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, ""),
    ("s/step", "seconds_per_step", with_spread("", 3), ""),
    ("attention", "attention_share", "{:.1%}".format, ""),
    ("density", "density", "{:.2f}".format, ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("attn. alone", "attention_speedup", "{:.2f}x".format, ""),
    ("Amdahl", "predicted_speedup", "{:.2f}x".format, ""),
    ("off by", "off_prediction", "{:+.1%}".format, ""),
    ("draft+select", "draft_select_share", "{:.1%}".format, ""),
    ("hook", "hook_share", "{:.1%}".format, ""),
    ("memory", "memory", megabytes, ""),
    ("rel. L2", "relative_l2", "{:.1e}".format, ""),
    ("", "finite", verdict, ""),
    ("50 steps", "run", run_seconds, ""),
    ("v eager dense", "run", over_eager_dense, ""),
    ("", "skipped", str, ""),
)


def table(payload: Mapping[str, Any]) -> Iterator[str]:
    """All rows for a terminal, a block per model and mode."""
    yield f"{payload['device']} (timed on {payload['measured_on']}); dense: {payload['dense_attention']}"
    for model in payload["models"]:
        size = f"{model['tokens']:,} video tokens, {model['text_tokens']} text, {model['layers']} layers"
        yield ""
        yield f"{model['title']} [{model['size']} size, {model['dtype']}: {size}]"
        if "skipped" in model:
            yield f"  skipped: {model['skipped']}"
        if model["layers"] < model["full_layers"]:
            yield f"  50 steps are extrapolated to {model['full_layers']} layers"
        if check := model.get("check"):
            verdict = "equals dense" if check["passed"] else "DIFFERS FROM DENSE"
            yield f"  full selection {verdict}: relative L2 {check['relative_l2']:.1e} (at most {check['tolerance']:g})"
        for mode in dict.fromkeys(row["mode"] for row in model["rows"]):
            yield f"  {mode}"
            rows = [row for row in model["rows"] if row["mode"] == mode]
            yield from (f"    {line}" for line in text_table(rows, COLUMNS))
