"""Results of many cards on one page: what `draftdiff bench` and `draftdiff compare` wrote, by what was measured and by
device, with the pictures that the bench draws."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from draftdiff.bench.runner import NO_MATPLOTLIB, draw
from draftdiff.compare.html import facts_list, figure, html_table, page
from draftdiff.compare.table import Column, with_spread
from draftdiff.errors import UserError
from draftdiff.files import prepare_file, replacing

_FEW_ROWS = 40  # longer tables are folded


@dataclass(frozen=True)
class Kind:
    """What a file holds. has: keys that it, or its first row, has.  rows: where they are.  columns: module and name of
    their table, "" for the rows' own keys.  per: key of the tables inside each of them.  picture: of `bench.plot`."""

    title: str
    has: frozenset[str]
    rows: str
    columns: str = ""
    per: str | None = None
    picture: str | None = None

    def tables(self, payload: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(what it is about, rows) of each table."""
        if self.per is None:
            found = _rows(payload[self.rows])
            yield "", [_Row(row) for row in found if row.get("absent") is None]
            return
        for part in payload[self.rows]:
            about = [part.get("title") or part["model"], part.get("size"), part.get("dtype"), part.get("skipped")]
            if part.get("batch") is not None:
                about.insert(1, f"batch {part['batch']}")
            rows = [_Row(row) for row in part.get(self.per) or ()]
            for mode in dict.fromkeys(row["mode"] for row in rows) or [None]:
                words = [*about, mode]
                yield ", ".join(str(word) for word in words if word), [row for row in rows if row["mode"] == mode]

    def columns_of(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Column]:
        if self.columns:
            module, _, name = self.columns.rpartition(".")
            return getattr(import_module(f"draftdiff.{module}"), name)
        names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
        return [(name.replace("_", " "), name, _written, "as the file has it") for name in names]


def _kind(title: str, has: str, rows: str, *rest: str, **more: Any) -> Kind:
    return Kind(title, frozenset(has.split()), rows, *rest, **more)


KINDS = (
    _kind("Videos, dense and sparse", "attention_share settings", "settings", "compare.video.COLUMNS"),
    _kind("Denoising steps", "models dense_attention run_steps", "models", "bench.dit_rows.COLUMNS", "rows", "dit"),
    _kind("Attention kernels", "gemm_tflops cases", "rows", "bench.kernels.COLUMNS", picture="kernels"),
    _kind("Configurations of a kernel", "milliseconds about device", "milliseconds"),
    _kind("Correctness of all that computes", "case what error bound right", "rows", "bench.check.COLUMNS"),
    _kind("Kernels compiled for other cards", "capability kernels wrong", "rows", "bench.compile_ahead.COLUMNS"),
    _kind("Rules and schedules", "summary psnr setting", "summary", "bench.quality.COLUMNS", picture="quality"),
    _kind("Pictures scale by scale", "subjects settings", "settings", "compare.image.COLUMNS"),
    _kind("Next-scale models", "results measured_on", "results", "bench.var.COLUMNS", "rows", "var"),
    _kind("Caches of next-scale models", "results pictures model", "results", "bench.var_caches.COLUMNS", "rows"),
    _kind("Attention of the last scales", "scale history density", "rows", "bench.last_scales.COLUMNS"),
    _kind("Accuracy of pictures", "setting interval shape colour", "rows"),
    _kind("Specialised training of pictures", "loss before after gain", "rows"),
    _kind("Language models, methods side by side", "methods prompt_tokens", "methods", "compare.llm.COLUMNS"),
    _kind("Language models on real weights", "model new_tokens capacity", "rows"),
    _kind("What a smaller cache costs in answers", "floor headline refusal", "rows"),
    _kind("Drafters on a stream of answers", "drafter accepted second_half", "rows"),
    _kind("The loop of speculation", "what nodes ms", "rows", "bench.llm.COLUMNS"),
    _kind(
        "When speculation pays",
        "layers cost mbsu speedup",
        "rows",
        "bench.speculation.COLUMNS",
        picture="speculation",
    ),
    _kind("Sparse prefill", "columns local limit", "rows", "bench.sparse_prefill.COLUMNS"),
    _kind("Smaller caches", "kept_mass kept_recall agreement", "rows"),
    _kind("Several drafts, and what is possible", "temperature drafts sampler optimum", "rows"),
    _kind("Trimmed vocabularies", "calibration size tokens_per_forward", "rows"),
    _kind("Training of drafts", "scores draft_parameters", "scores"),
    _kind("Glancing in the training of a draft layer", "glancing tokens_per_forward", "rows"),
    _kind("Feedback-aware tuning of a planner", "metric planner gain", "rows"),
    _kind("DraftRec on a synthetic league", "rules losses settings", "rows"),
)


class _Row(dict):
    """A row of an older file may lack a column."""

    def __missing__(self, name: str) -> None:
        return None


def _rows(found: Any) -> list[dict[str, Any]]:
    """Rows as they are; a mapping's names become their first column."""
    if isinstance(found, list):
        return found
    return [{"name": name, **(v if isinstance(v, dict) else {"value": v})} for name, v in found.items()]


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        if "median" in value:
            return with_spread("", 3)(dict(value))
        return ", ".join(f"{name} {_written(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Result:
    path: Path
    kind: Kind
    payload: dict[str, Any]
    sections: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        about = self.payload.get("about")
        told = self.payload.get("device") or (about.get("device") if isinstance(about, dict) else None)
        return str(told or "no device told")


def read(path: Path) -> Result:
    """A result by what it holds, whatever its name. Raises UserError, in one line, for what is none of ours."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON: {' '.join(str(error).split())}") from None
    if isinstance(payload, dict):
        for kind in KINDS:
            first = payload.get(kind.rows)
            first = first[0] if isinstance(first, list) and first else first
            if kind.has <= payload.keys() | (first.keys() if isinstance(first, dict) else set()):
                return Result(path, kind, payload)
    raise UserError(f"{str(path)!r} is no result of draftdiff bench or draftdiff compare")


def gather(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """Results of files, and of the JSON files in folders and below, each once; and why others are none."""
    results: list[Result] = []
    refused: list[str] = []
    seen: dict[bytes, Path] = {}
    files = [f for path in paths for f in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    for file in tqdm(files, desc="report", unit="file"):
        try:
            result = read(file)
            digest = hashlib.sha256(file.read_bytes()).digest()
            if digest in seen:
                raise UserError(f"{str(file)!r} is the same as {str(seen[digest])!r}")
            result.sections = _sections(result)
            seen[digest] = file
            results.append(result)
        except UserError as error:  # noqa: PERF203 (each file for itself)
            refused.append(str(error))
    return results, refused


def _sections(result: Result) -> list[str]:
    """Its tables and picture as HTML. Raises UserError if the file is damaged."""
    try:
        sections = [] if result.payload.get("complete", True) else ['<p class="note">Not complete.</p>']
        sections += _picture(result)
        for about, rows in result.kind.tables(result.payload):
            wrong = sum(False in (row["correct"], row["right"]) for row in rows)
            sections += [f'<p class="note">{wrong} of {len(rows)} rows failed their check.</p>'] if wrong else []
            sections.append(f"<p><b>{escape(about)}</b></p>" if about else "")
            table = html_table(rows, result.kind.columns_of(rows)) if rows else ""
            long = f"<details><summary>All {len(rows)} rows</summary>{table}</details>"
            sections.append(long if len(rows) > _FEW_ROWS else table)
        if bars := result.payload.get("bars"):
            each = {b["what"]: f"{b['measured']:.3f}, {'met' if b['met'] else 'NOT MET'} ({b['bar']})" for b in bars}
            met = f"{sum(b['met'] for b in bars)} of {len(bars)} bars met"
            sections.append(f"<details><summary>{met}</summary>{facts_list(each)}</details>")
    except Exception as error:  # a file from elsewhere may hold anything
        raise UserError(f"{str(result.path)!r} is damaged: {type(error).__name__}: {error}") from None
    told: dict[str, Any] = {"file": result.path.name, "device": result.device}
    told |= {name: result.payload[name] for name in ("dtype", "threads", "rounds") if name in result.payload}
    more = result.payload.get("about")
    told |= more if isinstance(more, dict) else {"about": more} if more else {}
    told |= {name: result.payload[name] for name in ("versions", "command") if name in result.payload}
    return [*sections, f"<details><summary>How it was run</summary>{facts_list(told)}</details>"]


def _picture(result: Result) -> list[str]:
    if result.kind.picture is None or importlib.util.find_spec("matplotlib") is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.json")
        draw(result.kind.picture, result.payload, file)
        picture = file.with_suffix(".png")
        if not picture.is_file():  # nothing to draw
            return []
        data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="" style="width: auto; max-width: 100%" src="data:image/png;base64,{data}">'
    return [figure(image, result.path.stem, [result.device])]


def html(results: Sequence[Result]) -> str:
    """The whole page."""
    devices = sorted({result.device for result in results})
    order = sorted(results, key=lambda result: (KINDS.index(result.kind), result.device, result.path.name))
    body = [
        "<h1>draftdiff: what was measured</h1>",
        f'<p class="lead">{len(results)} results of {len(devices)} devices: {escape("; ".join(devices))}.</p>',
        "<p>"
        + " &middot; ".join(f'<a href="#{KINDS.index(k)}">{escape(k.title)}</a>' for k, _ in groupby(order, _kind_of))
        + "</p>",
    ]
    for kind, of_kind in groupby(order, _kind_of):
        body.append(f'<h2 id="{KINDS.index(kind)}">{escape(kind.title)}</h2>')
        for result in of_kind:
            body += [f"<h3>{escape(result.device)} <small>({escape(result.path.name)})</small></h3>", *result.sections]
    return page("draftdiff: what was measured", body)


def _kind_of(result: Result) -> Kind:
    return result.kind


def run(options: Namespace) -> int:
    """Write the page. Returns the exit code: 1 if a file was refused. Raises UserError if none is left."""
    for path in options.results:
        if not path.exists():
            raise UserError(f"{str(path)!r} is not there")
    prepare_file(options.output, (".html",))
    results, refused = gather(options.results)
    for line in refused:
        print(f"draftdiff: refused: {line}", file=sys.stderr)
    if not results:
        raise UserError("there is no result to report")
    if importlib.util.find_spec("matplotlib") is None and any(result.kind.picture for result in results):
        print(f"draftdiff: note: {NO_MATPLOTLIB}", file=sys.stderr)
    with replacing(options.output) as partial:
        partial.write_text(html(results), encoding="utf-8")
    print(f"{len(results)} results of {len({result.device for result in results})} devices: {options.output}")
    return 1 if refused else 0
