"""Charts of a comparison as inline SVG: quality against speed, where the time goes, density by step and layer.

Text takes the page's colour, so the charts follow its light and dark look.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape

import numpy as np

# Okabe and Ito's palette: told apart by colour-blind readers too.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#b8a600")
_DENSITY_COLOURS = np.array([(247, 251, 255), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 28, 72)], float)
_SKIPPED = (176, 176, 176)


def scatter(
    points: list[tuple[str, dict[str, float], float]],
    quality: str,
    ceiling: float = math.inf,
    base: str = "dense",
    best: float = math.inf,
) -> str:
    """Quality against speed-up. points: (setting, speed-up as median, min and max, quality).  base: what is sped up.
    best: the highest quality there is."""
    width, height, left, right, top, bottom = 640, 360, 64, 24, 28, 52
    fastest = max([1.0, *(speed["max"] for _, speed, _ in points)])
    slowest = min([1.0, *(speed["min"] for _, speed, _ in points)])
    # A ceiling far out would squeeze the points together; the page's text names it in any case.
    reachable = ceiling <= 1 + 3 * (fastest - 1) or ceiling < 1.5
    x_ticks = ticks(slowest, max(fastest, ceiling) if reachable else fastest)
    lowest, highest = min(y for *_, y in points), max(y for *_, y in points)
    y_ticks = ticks(lowest, min(highest + 0.15 * (highest - lowest), best))  # room for a name above the best

    def x_at(value: float) -> float:
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - left - right)

    def y_at(value: float) -> float:
        return height - bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    parts = []
    for tick in x_ticks:
        parts.append(_line(x_at(tick), top, x_at(tick), height - bottom, "grid"))
        parts.append(_text(x_at(tick), height - bottom + 18, f"{tick:g}x", "middle"))
    for tick in y_ticks:
        parts.append(_line(left, y_at(tick), width - right, y_at(tick), "grid"))
        parts.append(_text(left - 8, y_at(tick) + 4, f"{tick:g}", "end"))
    parts.append(_line(x_at(1), top, x_at(1), height - bottom, "mark"))
    parts.append(_text(x_at(1), top - 8, base, "middle", "small"))
    if reachable:
        parts.append(_line(x_at(ceiling), top, x_at(ceiling), height - bottom, "mark dashed"))
        anchor = "middle" if x_at(ceiling) < width - 70 else "end"
        parts.append(_text(x_at(ceiling), top - 8, f"ceiling {ceiling:.2f}x", anchor, "small"))
    names: list[tuple[float, float, float]] = []
    for (name, speed, y), colour in zip(points, _cycle(1)):
        x, at = x_at(speed["median"]), y_at(y)
        parts.append(
            f'<line x1="{x_at(speed["min"]):.1f}" x2="{x_at(speed["max"]):.1f}" y1="{at:.1f}" y2="{at:.1f}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
        hint = f"{name}: {speed['median']:.2f}x ({speed['min']:.2f} to {speed['max']:.2f}), {quality} {y:.2f}"
        parts.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="6" fill="{colour}"><title>{escape(hint)}</title></circle>')
        over = x > width * 0.7
        left_end = x - 10 - 7.8 * len(name) if over else x + 10
        height_of = _free_line(at - 9, left_end, 7.8 * len(name), names)
        parts.append(_text(x - 10 if over else x + 10, height_of, name, "end" if over else "start"))
    parts.append(_text((left + width - right) / 2, height - 12, f"speed-up over {base}, whole pipeline call", "middle"))
    parts.append(_upright(18, (top + height - bottom) / 2, quality))
    return _svg(width, height, parts, f"{quality} against speed-up")


def _free_line(y: float, x: float, width: float, taken: list[tuple[float, float, float]]) -> float:
    """Where near y a text at x does not cover one of those taken, (x, y, width) each; adds it to them."""
    for shift in (0, 27, -14, 41, -28, 55, -42, 69, -56):
        free = all(abs(y + shift - b) >= 13 or x + width <= a or a + w <= x for a, b, w in taken)
        if free:
            break
    taken.append((x, y + shift, width))
    return y + shift


def bars(rows: list[tuple[str, dict[str, float]]], unit: str = "s", title: str = "where the time goes") -> str:
    """Seconds, or another unit, by what they were spent on: one stacked bar per setting."""
    names = list({part: None for _, split in rows for part in split})
    colours = dict(zip(names, _cycle(0)))
    label = 16 + 7.8 * max(len(name) for name, _ in rows)
    width, line, right = 860, 34, 84
    top = 30 * math.ceil(len(names) / 4) + 8
    longest = max(sum(split.values()) for _, split in rows)
    scale = (width - label - right) / longest
    parts = []
    for i, name in enumerate(names):
        x, y = label + (i % 4) * 172, 8 + 26 * (i // 4)
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="14" height="14" rx="2" fill="{colours[name]}"/>')
        parts.append(_text(x + 20, y + 12, name, "start"))
    for i, (setting, split) in enumerate(rows):
        y, x, total = top + i * line, label, sum(split.values())
        parts.append(_text(label - 10, y + 18, setting, "end"))
        for part, seconds in split.items():
            hint = f"{setting}, {part}: {seconds:.3g} {unit}, {seconds / total:.1%}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{seconds * scale:.1f}" height="24" fill="{colours[part]}">'
                f"<title>{escape(hint)}</title></rect>"
            )
            x += seconds * scale
        parts.append(_text(x + 8, y + 17, f"{total:.3g} {unit}", "start"))
    return _svg(width, top + len(rows) * line + 4, parts, title)


def heat_map(
    title: str, rows: list[list[float | None]], across: str = "attention layer", down: str = "denoising step"
) -> str:
    """Density from 0 to 1, rows [down][across]; None, drawn grey, where a layer did not run."""
    values = np.array([[np.nan if value is None else value for value in row] for row in rows], float)
    steps, layers = values.shape
    left, top, bottom, plot_width, plot_height = 56, 30, 46, 300, 190
    width, height = left + plot_width + 14, top + plot_height + bottom
    image = base64.b64encode(_png(values)).decode()
    parts = [
        _text(left, 18, title, "start", "strong"),
        f'<image x="{left}" y="{top}" width="{plot_width}" height="{plot_height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{image}"/>',
        f'<rect x="{left}" y="{top}" width="{plot_width}" height="{plot_height}" class="frame"/>',
        _text(left + plot_width / 2, height - 8, across, "middle"),
        _upright(14, top + plot_height / 2, down),
    ]
    for count, axis in ((layers, "x"), (steps, "y")):
        for index in sorted({0, count // 2, count - 1}):
            at = (index + 0.5) / count
            if axis == "x":
                parts.append(_text(left + at * plot_width, top + plot_height + 17, str(index), "middle"))
            else:
                parts.append(_text(left - 8, top + at * plot_height + 4, str(index), "end"))
    return _svg(width, height, parts, f"density by {down} and {across}, {title}")


def density_legend() -> str:
    """The colour scale of the heat maps."""
    image = base64.b64encode(_png(np.linspace(0, 1, 64)[None])).decode()
    parts = [
        _text(0, 14, "density: share of token pairs computed", "start"),
        f'<image x="0" y="22" width="220" height="14" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{image}"/><rect x="0" y="22" width="220" height="14" class="frame"/>',
        *(_text(220 * at, 52, f"{at:g}", anchor) for at, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))),
        f'<rect x="240" y="22" width="14" height="14" fill="rgb{_SKIPPED}"/>',
        _text(260, 34, "not run", "start"),
    ]
    return _svg(330, 58, parts, "colour scale of density")


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low and high."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _png(density: np.ndarray) -> bytes:
    """One pixel per value."""
    from PIL import Image

    at = np.linspace(0, 1, len(_DENSITY_COLOURS))
    known = np.nan_to_num(density)
    colours = np.stack([np.interp(known, at, channel) for channel in _DENSITY_COLOURS.T], axis=-1)
    colours[np.isnan(density)] = _SKIPPED
    buffer = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _cycle(start: int) -> list[str]:
    return [PALETTE[(start + i) % len(PALETTE)] for i in range(64)]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _upright(x: float, y: float, text: str) -> str:
    return f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _svg(width: float, height: float, parts: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
