"""A comparison of decoding methods for the eye: one self-contained page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from draftdiff.compare.charts import bars
from draftdiff.compare.html import document, html_table
from draftdiff.compare.llm import LlmComparison
from draftdiff.compare.table import Column, mean_of_known
from draftdiff.models.llm_methods import METHODS


def write(comparison: LlmComparison, folder: Path | str) -> Path:
    """Write results.json and report.html. Raises UserError as `check_folder` does."""
    return comparison.write(folder, fill)


def fill(comparison: LlmComparison, folder: Path) -> None:
    """Add report.html to a folder."""
    (folder / "report.html").write_text(page(comparison), encoding="utf-8")


def page(comparison: LlmComparison) -> str:
    rows = comparison.rows()
    lossless = [row for row in rows[1:] if row["lossless"] == "yes"]
    headline = f"{len(comparison.prompts)} prompts, up to {comparison.options['max_new_tokens']} new tokens each."
    if lossless:
        best = max(lossless, key=lambda row: row["speedup"]["median"])
        headline += (
            f" Fastest without any loss: <b>{escape(best['method'])}</b>, {best['speedup']['median']:.2f}x, "
            f"{best['tokens_per_forward']:.2f} tokens per forward of the target."
        )
    sections = [
        *_judged(comparison),
        "<h2>Tokens per forward and speed</h2>",
        _bars(rows),
        "<h2>What was written</h2>",
        *(_texts(comparison, index) for index in range(min(len(comparison.prompts), 3))),
    ]
    return document(comparison, f"Decoding methods: {comparison.model}", headline, sections, _facts(comparison))


def _judged(comparison: LlmComparison) -> list[str]:
    """Each figure of the workload for plain decoding, and how far the lossy methods are from it."""
    judged = comparison.judgement
    lossy = [name for name in comparison.texts if not METHODS[name].lossless]
    if judged is None:
        return []
    rows = []
    for metric, meaning in judged.workload.metrics.items():
        plain = mean_of_known(judged.values("plain", metric))
        beside: dict[str, Any] = {name: judged.difference(name, metric) for name in lossy}
        rows.append({"metric": metric.replace("_", " "), "meaning": meaning, "plain": plain, **beside})
    columns: list[Column] = [("figure", "metric", str, "of 100"), ("plain", "plain", "{:.1f}".format, "its mean")]
    columns += [(name, name, str, "from plain: mean (95 % interval)") for name in lossy]
    columns.append(("what it is", "meaning", str, ""))
    title = f"The {judged.workload.name} workload, {len(judged.cases)} cases"
    return [f"<h2>{escape(title)}</h2>", html_table(rows, columns)]


def _bars(rows: list[dict[str, Any]]) -> str:
    tokens = [(row["method"], {"tokens per forward of the target": row["tokens_per_forward"]}) for row in rows]
    speed = [(row["method"], {"milliseconds per token": row["milliseconds"]["median"]}) for row in rows]
    cache = [(row["method"], {"MB of keys and values": row["cache"] / 1e6}) for row in rows]
    return bars(tokens, "", "tokens per forward") + bars(speed, "ms", "time per token") + bars(cache, "MB", "cache")


def _texts(comparison: LlmComparison, index: int) -> str:
    plain = comparison.texts["plain"][index]
    same = [name for name, texts in comparison.texts.items() if texts[index] == plain and name != "plain"]
    others = [name for name, texts in comparison.texts.items() if texts[index] != plain]
    blocks = [_block(f"plain, and {len(same)} methods word for word" if same else "plain", plain)]
    blocks += [_block(name, comparison.texts[name][index]) for name in others]
    return f"<h3>Prompt {index + 1}, {comparison.prompts[index].shape[1]} tokens</h3>{''.join(blocks)}"


def _block(name: str, text: str) -> str:
    state = " open" if name.startswith("plain") else ""
    return f"<details{state}><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _facts(comparison: LlmComparison) -> dict[str, Any]:
    kept = {"tokens kept by SpecKV and SpecPC": comparison.capacity, "generate": comparison.options}
    return {**comparison.about, **kept}
