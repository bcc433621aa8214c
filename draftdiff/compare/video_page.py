"""A comparison of videos for the eye: the videos, and one self-contained HTML page."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from draftdiff.compare.charts import bars, density_legend, heat_map, scatter
from draftdiff.compare.clips import SIDE_BY_SIDE, contact_sheet, file_name, side_by_side
from draftdiff.compare.html import document, figure
from draftdiff.compare.video import VideoComparison
from draftdiff.models.frames import write_frames


def write(comparison: VideoComparison, folder: Path | str) -> Path:
    """Write results.json, the videos and report.html. Raises UserError as `check_folder` does."""
    return comparison.write(folder, fill)


def fill(comparison: VideoComparison, folder: Path) -> None:
    """Add the videos and report.html to a folder."""
    write_videos(comparison, folder / "videos")
    (folder / "report.html").write_text(page(comparison, folder / "videos"), encoding="utf-8")


def write_videos(comparison: VideoComparison, folder: Path) -> None:
    """One file per prompt and setting, and per prompt all settings side by side, as a video and as a picture."""
    folder.mkdir()
    for index, prompt_clips in enumerate(_clips_by_prompt(comparison)):
        for name, frames in prompt_clips.items():
            write_frames(folder / file_name(index, name, len(frames)), frames, comparison.fps)
        together = side_by_side(prompt_clips)
        write_frames(folder / file_name(index, SIDE_BY_SIDE, len(together)), together, comparison.fps)
        if len(together) > 1:
            write_frames(folder / file_name(index, SIDE_BY_SIDE, 1), contact_sheet(together)[None], comparison.fps)


def _clips_by_prompt(comparison: VideoComparison) -> list[dict[str, np.ndarray]]:
    return [
        {result.name: result.clips[index].frames for result in comparison.results}
        for index in range(len(comparison.prompts))
    ]


def page(comparison: VideoComparison, videos: Path) -> str:
    """The page. videos: the folder that `write_videos` filled; its files are embedded."""
    model = comparison.about.get("model") or comparison.pipeline
    headline = (
        f"Attention takes <b>{comparison.attention_share:.0%}</b> of the dense run, so no sparse attention can be "
        f"faster than <b>{comparison.ceiling:.2f}x</b> here (Amdahl's law)."
    )
    sections = [
        "<h2>Videos</h2>",
        *(_videos(comparison, index, videos) for index in range(len(comparison.prompts))),
        "<h2>Quality against speed</h2>",
        _scatters(comparison),
        "<h2>Where the time goes</h2>",
        '<p class="note">Mean of the runs with clocks. The dense bar is its clocked run, which the times above leave '
        "out. Draft, select and kernel make up the sparse attention.</p>",
        bars([(result.name, result.breakdown()) for result in comparison.results]),
        "<h2>Density by step and layer</h2>",
        _heat_maps(comparison),
    ]
    return document(comparison, f"Dense and sparse attention: {model}", headline, sections, _facts(comparison))


def _videos(comparison: VideoComparison, index: int, folder: Path) -> str:
    figures = []
    for result in comparison.results:
        clip = result.clips[index]
        file = folder / file_name(index, result.name, len(clip.frames))
        data = base64.b64encode(file.read_bytes()).decode()
        height, width = clip.frames.shape[1:3]
        size = f'style="aspect-ratio:{width}/{height}"'
        media = (
            f'<video src="data:video/mp4;base64,{data}" {size} autoplay loop muted playsinline></video>'
            if file.suffix == ".mp4"
            else f'<img src="data:image/png;base64,{data}" {size} alt="{escape(result.name)}">'
        )
        seconds = median(row[index].seconds for row in result.timings)
        facts = [f"{seconds:.2f} s"]
        if clip.quality:
            facts.append(f"PSNR {clip.quality.psnr:.1f} dB")
            facts.append(f"SSIM {clip.quality.ssim:.3f}")
        if clip.verdict:
            wrong = [name for name, right in clip.verdict.items() if not right]
            facts.append(f"wrong: {', '.join(wrong)}" if wrong else "prompt right")
        figures.append(figure(media, result.name, facts))
    return f'<h3>“{escape(comparison.prompts[index])}”</h3><div class="videos">{"".join(figures)}</div>'


def _scatters(comparison: VideoComparison) -> str:
    rows = [row for row in comparison.rows() if row["speedup"]]
    charts = []
    for key, title in (("psnr", "PSNR (dB)"), ("vmaf", "VMAF")):
        points = [(row["setting"], row["speedup"], row[key]) for row in rows if row[key] is not None]
        if points:
            charts.append(scatter(points, title, comparison.ceiling))
    return f'<div class="charts">{"".join(charts)}</div>'


def _heat_maps(comparison: VideoComparison) -> str:
    charts = [density_legend()]
    maps = []
    for result in comparison.results:
        reports = [report for report in result.clips[0].reports if report["density_by_step_and_layer"]]
        for number, report in enumerate(reports, start=1):
            name = result.name if len(reports) == 1 else f"{result.name}, transformer {number}"
            maps.append(heat_map(name, report["density_by_step_and_layer"]))
    charts.append(f'<div class="charts">{"".join(maps)}</div>')
    note = '<p class="note">First prompt. Dense steps and layers have density 1.</p>'
    return note + "".join(charts)


def _facts(comparison: VideoComparison) -> dict[str, Any]:
    facts: dict[str, Any] = {"pipeline": comparison.pipeline, **comparison.about, "seed": comparison.seed}
    facts |= {name: value for name, value in comparison.plain_call.items() if value is not None}
    for result in comparison.results:
        if result.config is not None:
            told = {(report["selection"], report["tokens"]) for clip in result.clips for report in clip.reports}
            reads = [f"tiles by {name!r}, {count} single tokens per query tile" for name, count in sorted(told) if name]
            facts[f"setting “{result.name}”"] = "; ".join([*reads, str(result.config)])
    return facts
