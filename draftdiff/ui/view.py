"""What a pair of runs looks like: clips under a slider, figures, and where the sparse one computed; as HTML.

Clips are part of the page itself, so that no file has to be served. `VIEWER` is the element that plays them in step.
"""

from __future__ import annotations

import base64
import re
import tempfile
from html import escape
from pathlib import Path

import numpy as np

from draftdiff.compare.charts import bars, density_legend, heat_map
from draftdiff.models.frames import write_frames
from draftdiff.ui.session import Shown

_GAIN = 8  # of the view of differences


def clips(shown: Shown, fps: float) -> str:
    """The viewer with dense, sparse and their difference, frames [frames, height, width, 3]."""
    dense, sparse = shown.dense.frames, shown.sparse.frames
    apart = np.abs(dense.astype(np.int16) - sparse) * _GAIN
    count, height, width, _ = dense.shape
    made = {"dense": dense, "sparse": sparse, "difference": apart.clip(max=255).astype(np.uint8)}
    media = []
    for name, frames in made.items():
        link = _encoded(frames, fps)
        media.append(
            f'<video class="{name}" src="{link}" muted playsinline loop preload="auto"></video>'
            if count > 1
            else f'<img class="{name}" src="{link}" alt="{name}">'
        )
    slug = "-".join(re.findall(r"\w+", shown.asked.prompt.lower())[:6])[:48] or "clip"
    ending = "mp4" if count > 1 else "png"
    save = "".join(
        f'<a download="{slug}-{name}.{ending}" data-of="{name}">save {name}</a>' for name in ("dense", "sparse")
    )
    play = '<button type="button" class="play" aria-label="pause"></button>' if count > 1 else ""
    moment = (
        f'<input type="range" class="moment" min="0" max="{count - 1}" value="0" aria-label="frame"><output></output>'
        if count > 1
        else ""
    )
    modes = "".join(
        f'<button type="button" data-mode="{mode}" aria-pressed="{str(mode == "slider").lower()}">{label}</button>'
        for mode, label in (
            ("slider", "slider"),
            ("beside", "side by side"),
            ("difference", f"difference x{_GAIN}"),
        )
    )
    return (
        f'<dense-sparse data-mode="slider" data-frames="{count}" data-fps="{fps:g}" '
        f'style="--ratio:{width}/{height}"><div class="modes" role="group" aria-label="view">{modes}</div>'
        f'<div class="stage">{"".join(media)}<span class="tag of-dense">dense</span>'
        f'<span class="tag of-sparse">{escape(_named(shown))}</span><span class="edge"></span>'
        '<input type="range" class="wipe" min="0" max="100" step="0.1" value="50" aria-label="dense and sparse">'
        f'</div><div class="controls">{play}{moment}<span class="saves">{save}</span></div></dense-sparse>'
    )


def _named(shown: Shown) -> str:
    return "profile" if shown.asked.sparsity is None else f"sparsity {shown.asked.sparsity:g}"


def _encoded(frames: np.ndarray, fps: float) -> str:
    kind, ending = ("video/mp4", "mp4") if len(frames) > 1 else ("image/png", "png")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"clip.{ending}")
        write_frames(file, frames, fps)
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def figures(shown: Shown) -> str:
    """The figures as tiles, and notes."""
    dense, sparse = shown.dense.timing, shown.sparse.timing
    tiles = [("speed-up", f"{shown.speedup:.2f}x", f"{dense.seconds:.2f} s → {sparse.seconds:.2f} s")]
    if shown.attention_speedup:
        told = f"{dense.attention:.2f} s → {sparse.attention:.2f} s"
        tiles.append(("attention alone", f"{shown.attention_speedup:.2f}x", told))
    tiles.append(("PSNR", f"{shown.psnr:.1f} dB", "against dense; 100 is identical"))
    tiles.append(("SSIM", f"{shown.ssim:.3f}", "against dense; 1 is identical"))
    told_of = [one for one in shown.sparse.reports if one.mean_density is not None]
    if told_of:
        one = told_of[0]
        steps = f"{one.sparse_steps} sparse, {one.dense_steps} dense steps"
        tiles.append(("density", f"{one.mean_density:.1%}", steps))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>'
        for name, value, more in tiles
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    return f'<div class="tiles">{cells}</div>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def where(shown: Shown) -> str:
    """Density by step and layer, and the time of both runs by what it was spent on."""
    maps = []
    for number, one in enumerate(shown.sparse.reports, start=1):
        rows = one.to_dict()["density_by_step_and_layer"]
        if rows:
            name = _named(shown) + (f", transformer {number}" if len(shown.sparse.reports) > 1 else "")
            maps.append(heat_map(name, rows))
    times = bars([("dense", shown.dense.timing.breakdown()), ("sparse", shown.sparse.timing.breakdown())])
    return (
        f'<div class="where"><section><h3>Where it computes</h3>{"".join(maps)}{density_legend()}</section>'
        f"<section><h3>Where the time goes</h3>{times}"
        "<p>One run each, with clocks around the attention. <code>draftdiff compare</code> repeats them in turns and "
        "tells the spread.</p></section></div>"
    )


EMPTY = (
    '<div class="empty"><p>Choose a prompt and press <b>Run</b>: the same clip is made twice, by dense and by sparse '
    "attention, and laid under one slider.</p></div>"
)

_HERE = Path(__file__).parent
STYLE = (_HERE / "style.css").read_text(encoding="utf-8")
VIEWER = f"<script>{(_HERE / 'viewer.js').read_text(encoding='utf-8')}</script>"
