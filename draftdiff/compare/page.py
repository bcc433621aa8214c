"""A comparison for the eye: the columns of its table, the videos with labels, and one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from draftdiff.compare.charts import bars, density_legend, heat_map, scatter
from draftdiff.compare.html import Column, document, facts_list, figure, html_table, with_spread
from draftdiff.media import write_frames

if TYPE_CHECKING:
    from draftdiff.compare.run import Comparison

SIDE_BY_SIDE = "side by side"
STRIP = 34  # height of the names above the clips, in pixels


COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, "dense is the pipeline without draftdiff"),
    ("time", "seconds", with_spread(" s", 2), "wall time of the whole pipeline call: median (least-most)"),
    ("speed-up", "speedup", with_spread("x", 2), "dense time over this time in the same round: median (least-most)"),
    (
        "attention",
        "attention_speedup",
        lambda value: f"{value['median']:.2f}x",
        "speed-up of the video self-attentions alone, dense layers and steps included",
    ),
    ("predicted", "predicted_speedup", "{:.2f}x".format, "whole speed-up that follows from the attention's, by Amdahl"),
    ("density", "density", "{:.3f}".format, "share of token pairs computed in sparse layers, text included"),
    ("missed mass", "missed_mass", "{:.3f}".format, "share of attention on skipped tiles, by the draft's estimate"),
    ("PSNR", "psnr", "{:.1f} dB".format, "against the dense video, RGB, mean of frames; 100 is identical"),
    ("SSIM", "ssim", "{:.3f}".format, "structural similarity to the dense video, RGB; 1 is identical"),
    (
        "VMAF",
        "vmaf",
        "{:.1f}".format,
        "Netflix's perceptual score (v0.6.1, luma) at the video's own size; 97-100 is alike",
    ),
    ("ST-LPIPS", "lpips", "{:.3f}".format, "learned perceptual distance (shift-tolerant, AlexNet); 0 is identical"),
    (
        "latent L2",
        "latent_l2",
        "{:.3f}".format,
        "distance of the final latents over the dense ones' length; 0 is identical",
    ),
    (
        "prompt right",
        "accuracy",
        "{:.0%}".format,
        "share of videos that show all that the prompt says, by the rule-based judge",
    ),
)


def write_videos(comparison: Comparison, folder: Path) -> None:
    """One file per prompt and setting, and per prompt all settings side by side, as a video and as a picture."""
    folder.mkdir()
    for index, prompt_clips in enumerate(_clips_by_prompt(comparison)):
        for name, frames in prompt_clips.items():
            write_frames(folder / file_name(index, name, len(frames)), frames, comparison.fps)
        together = side_by_side(prompt_clips)
        write_frames(folder / file_name(index, SIDE_BY_SIDE, len(together)), together, comparison.fps)
        if len(together) > 1:
            write_frames(folder / file_name(index, SIDE_BY_SIDE, 1), contact_sheet(together)[None], comparison.fps)


def file_name(prompt: int, setting: str, frames: int) -> str:
    slug = re.sub(r"[^a-z0-9.]+", "-", setting.lower()).strip("-.") or "setting"
    return f"{prompt + 1:02d}-{slug}{'.mp4' if frames > 1 else '.png'}"


def _clips_by_prompt(comparison: Comparison) -> list[dict[str, np.ndarray]]:
    return [
        {result.name: result.clips[index].frames for result in comparison.results}
        for index in range(len(comparison.prompts))
    ]


def side_by_side(clips: dict[str, np.ndarray], widest: int = 3840) -> np.ndarray:
    """Clips of one size in a row, each under its name: uint8 [frames, height, width, 3]. Small clips are magnified by
    whole pixels so that the names can be read; a row beyond `widest` pixels is shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = next(iter(clips.values())).shape[1:3]
    scale: float = max(1, -(-256 // width))
    if scale * width * len(clips) > widest:
        scale = widest / (width * len(clips))
    size = (round(width * scale) // 2 * 2, round(height * scale) // 2 * 2)
    font = ImageFont.load_default(size=max(10, min(20, size[0] // max(map(len, clips)) * 1.6)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS

    columns = []
    for name, frames in clips.items():
        label = Image.new("RGB", (size[0], STRIP), (24, 26, 30))
        ImageDraw.Draw(label).text((size[0] / 2, STRIP / 2), name, font=font, anchor="mm", fill=(240, 240, 240))
        scaled = [np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames]
        columns.append(np.stack([np.concatenate([np.asarray(label), frame]) for frame in scaled]))
    return np.concatenate(columns, axis=2)


def contact_sheet(together: np.ndarray, moments: int = 3) -> np.ndarray:
    """Some frames of `side_by_side` below one another, the names on top only: uint8 [height, width, 3]."""
    chosen = together[np.linspace(0, len(together) - 1, moments).round().astype(int)]
    return np.concatenate([chosen[0], *chosen[1:, STRIP:]])


def write_page(comparison: Comparison, videos: Path, path: Path) -> None:
    """Write the page. videos: the folder that `write_videos` filled; its files are embedded."""
    path.write_text(page(comparison, videos), encoding="utf-8")


def page(comparison: Comparison, videos: Path) -> str:
    about = comparison.about
    model = about.get("model") or comparison.pipeline
    headline = (
        f"Attention takes <b>{comparison.attention_share:.0%}</b> of the dense run, so no sparse attention can be "
        f"faster than <b>{comparison.ceiling:.2f}x</b> here (Amdahl's law)."
    )
    sections = [
        f"<h1>Dense and sparse attention: {escape(str(model))}</h1>",
        f'<p class="lead">{headline}</p>',
        html_table(comparison.rows(), COLUMNS),
        *(f'<p class="note">{escape(note)}</p>' for note in comparison.notes()),
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
        "<h2>How it was run</h2>",
        _details(comparison),
    ]
    return document(f"draftdiff compare: {model}", sections)


def _videos(comparison: Comparison, index: int, folder: Path) -> str:
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


def _scatters(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows() if row["speedup"]]
    charts = []
    for key, title in (("psnr", "PSNR (dB)"), ("vmaf", "VMAF")):
        points = [(row["setting"], row["speedup"], row[key]) for row in rows if row[key] is not None]
        if points:
            charts.append(scatter(points, title, comparison.ceiling))
    return f'<div class="charts">{"".join(charts)}</div>'


def _heat_maps(comparison: Comparison) -> str:
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


def _details(comparison: Comparison) -> str:
    facts: dict[str, Any] = {"pipeline": comparison.pipeline, **comparison.about, "seed": comparison.seed}
    facts |= {name: value for name, value in comparison.to_dict()["call"].items() if value is not None}
    for result in comparison.results:
        if result.config is not None:
            facts[f"setting “{result.name}”"] = result.config
    return facts_list(facts)
