"""From the timed calls of bench_dit.py to the figures of its rows, and from rows to a table. Arithmetic only.

A row's attention time is measured by the clocks of draftdiff's hook: in the dense step with "dense, hooked", whose
attention is the stock one. Compiled blocks have no clocks inside; they call the same attention, so their attention time
is that of the eager calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench_common import median_and_spread

from draftdiff import DraftAttentionConfig
from draftdiff.compare.timing import ATTENTION_PARTS

DENSE, HOOKED = "dense", "dense, hooked"
RUN_STEPS = 50


@dataclass(frozen=True)
class Sample:
    """One denoising step of one setting.

    seconds: of all its transformer calls, and `parts` of them by draftdiff's clocks, empty for the stock transformer.
    peak_bytes: most memory in use during the step, None where that cannot be told.
    error: |output - eager dense output| / |eager dense output|.  density: of the sparse layers that ran.
    """

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    error: float = 0.0
    finite: bool = True
    density: float | None = None

    @property
    def attention(self) -> float:
        return sum(self.parts.get(part, 0.0) for part in ATTENTION_PARTS)

    @property
    def hook(self) -> float:
        """Seconds of the hook itself, before and after the transformer's own forward."""
        return self.seconds - self.parts.get("dense forward", 0.0) - self.parts.get("sparse forward", 0.0)


Samples = dict[str, list[Sample]]  # by setting, one per round


def amdahl(share: float, attention_speedup: float) -> float:
    """Speed-up of the whole if a share of it becomes so many times as fast."""
    return 1 / (1 - share + share / attention_speedup)


def run_of(dense_step: float, sparse_step: float) -> float:
    """Seconds of a run of RUN_STEPS whose first steps are dense, as many as the default config says."""
    share = DraftAttentionConfig().dense_steps
    dense_steps = round(share * RUN_STEPS) if isinstance(share, float) else share
    return dense_steps * dense_step + (RUN_STEPS - dense_steps) * sparse_step


def row(name: str, group: Samples, eager: Samples, plain: Samples, depth: float) -> dict[str, Any]:
    """The figures of one setting.

    group: of this mode, with "dense".  eager: the same with eager blocks, for attention times.  plain: eager, without
    a cache: what all 50-step runs are compared with.  depth: full depth over measured depth.
    """
    own, dense = group[name], group[DENSE]
    peaks = [sample.peak_bytes for sample in own if sample.peak_bytes is not None]
    seconds = [sample.seconds for sample in own]
    finite = all(sample.finite for sample in own)
    figures: dict[str, Any] = {
        "setting": name,
        "seconds_per_step": median_and_spread(seconds),
        "seconds_per_step_rounds": seconds,
        "peak_memory_gib": max(peaks) / 2**30 if peaks else None,
        "relative_l2": max(sample.error for sample in own) if finite else None,
        "finite": finite,
        "density": own[-1].density,
    }
    hooked = eager.get(HOOKED, [])
    if name == DENSE:
        if hooked:
            figures["attention_seconds"] = median(h.attention for h in hooked)
            figures["attention_share"] = median(h.attention / d.seconds for h, d in zip(hooked, dense))
    else:
        figures["speedup_rounds"] = [b.seconds / s.seconds for b, s in zip(dense, own)]
        figures["speedup"] = median_and_spread(figures["speedup_rounds"])
        hook = median(sample.hook for sample in own)
        figures |= {"hook_seconds": hook, "hook_share": hook / median(seconds)}
    if name not in (DENSE, HOOKED):
        clocked = eager.get(name, [])
        if hooked and clocked:
            # Within a round, so that a machine that slows down slows both sides of a ratio.
            faster = [h.attention / c.attention for h, c in zip(hooked, clocked)]
            predicted = [amdahl(min(1.0, h.attention / d.seconds), f) for h, d, f in zip(hooked, dense, faster)]
            routing = median(c.parts.get("draft", 0.0) + c.parts.get("select", 0.0) for c in clocked)
            figures |= {
                "attention_seconds": median(c.attention for c in clocked),
                "attention_speedup": median(faster),
                "draft_select_seconds": routing,
                "draft_select_share": routing / median(seconds),
                "predicted_speedup": median(predicted),
                "off_prediction": median(s / p for s, p in zip(figures["speedup_rounds"], predicted)) - 1,
                "parts_seconds": {part: median(c.parts.get(part, 0.0) for c in clocked) for part in ATTENTION_PARTS},
            }
    # A dense step of a run with draftdiff goes through its hook.
    warm_up = dense if name == DENSE else group.get(HOOKED, dense)
    totals = [depth * run_of(first.seconds, later.seconds) for first, later in zip(warm_up, own)]

    def gain(base: list[Sample]) -> float:
        return median(depth * RUN_STEPS * b.seconds / total for b, total in zip(base, totals))

    figures["run"] = {"seconds": median(totals), "speedup": gain(dense)}
    if DENSE in plain:
        figures["run"]["speedup_over_eager_dense"] = gain(plain[DENSE])
    return figures


_COLUMNS = (
    ("setting", lambda r: r["setting"]),
    ("s/step", lambda r: _spread(r["seconds_per_step"], "")),
    ("attention", lambda r: _percent(r.get("attention_share"))),
    ("density", lambda r: _number(r["density"])),
    ("speed-up", lambda r: _spread(r.get("speedup"), "x")),
    ("attn. alone", lambda r: _number(r.get("attention_speedup"), "x")),
    ("Amdahl", lambda r: _number(r.get("predicted_speedup"), "x")),
    ("off by", lambda r: _percent(r.get("off_prediction"), "+")),
    ("draft+select", lambda r: _percent(r.get("draft_select_share"))),
    ("hook", lambda r: _percent(r.get("hook_share"))),
    ("peak GiB", lambda r: _number(r["peak_memory_gib"])),
    ("rel. L2", lambda r: f"{r['relative_l2']:.1e}" if r["finite"] else "NOT FINITE"),
    ("50 steps", lambda r: f"{r['run']['seconds']:.4g} s"),
    ("v eager dense", lambda r: _number(r["run"].get("speedup_over_eager_dense"), "x")),
)


def table(payload: dict[str, Any]) -> str:
    """All rows for a terminal, a block per model and mode."""
    lines = [f"{payload['device']} (timed on {payload['measured_on']}); dense: {payload['dense_attention']}"]
    for model in payload["models"]:
        size = f"{model['tokens']:,} video tokens, {model['text_tokens']} text, {model['layers']} layers"
        lines += ["", f"{model['title']} [{model['size']} size, {model['dtype']}: {size}]"]
        if "skipped" in model:
            lines.append(f"  skipped: {model['skipped']}")
        if model["layers"] < model["full_layers"]:
            lines.append(f"  50 steps are extrapolated to {model['full_layers']} layers")
        if "check" in model:
            check = model["check"]
            verdict = "equals dense" if check["passed"] else "DIFFERS FROM DENSE"
            lines.append(
                f"  full selection {verdict}: relative L2 {check['relative_l2']:.1e} (at most {check['tolerance']:g})"
            )
        for mode in dict.fromkeys(r["mode"] for r in model["rows"]):
            rows = [r for r in model["rows"] if r["mode"] == mode]
            shown = [r for r in rows if "skipped" not in r]
            lines.append(f"  {mode}")
            columns = [[title, *(cell(r) for r in shown)] for title, cell in _COLUMNS if shown]
            widths = [max(map(len, column)) for column in columns]
            for first, *others in zip(*columns):
                cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
                lines.append("    " + "  ".join(cells))
            lines += [f"    {r['setting']}: skipped: {r['skipped']}" for r in rows if "skipped" in r]
    return "\n".join(lines)


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1%}"


def _spread(values: dict[str, float] | None, unit: str) -> str:
    return "" if values is None else f"{values['median']:.3g}{unit} ({values['min']:.3g}-{values['max']:.3g})"
