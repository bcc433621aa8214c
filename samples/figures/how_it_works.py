"""Draws samples/figures/how_it_works.svg, the README's figure, from what the probe finds in a small random video."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from draftdiff.core.draft import Tail, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.probe import errors, singles, worst

CELL, SIDE, TOP = 13, 12, 64
INK, KEPT, TAIL, PALE = "#1f2933", "#1769aa", "#cfe3f5", "#e4e7eb"


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "middle") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style} fill="{INK}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "white") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}"/>'


def shade(value: float) -> str:
    """White to blue."""
    ends = ((255, 255, 255), (23, 105, 170))
    return "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip(*ends))


def arrow(x: float, words: str) -> str:
    y = TOP + SIDE * CELL / 2
    line = f'<path d="M{x} {y} h34 m-8 -6 l8 6 l-8 6" fill="none" stroke="{INK}" stroke-width="2"/>'
    return line + text(x + 17, y - 14, words, 11)


def main() -> None:
    torch.manual_seed(4)
    grid = LatentGrid(3, 16, 16)
    coarse = torch.randn(2, 32, 3, 7, 7)
    k, v = F.interpolate(coarse, grid.shape, mode="trilinear").flatten(2).transpose(1, 2)[:, None, :, None]
    tiling = tiling_for(grid, (1, 8, 8), 64)
    k = 2.2 * k
    q_mean, means = pool(k, tiling), Tail(pool(k, tiling), pool(v, tiling))
    error = errors(q_mean, k, v, means, tiling, scale=0.4)
    keep = worst(error, torch.tensor([0.25], dtype=torch.float64))
    tokens = singles(q_mean, k, v, means, tiling, keep, scale=0.4, tokens=40)[0, 0]
    keep, error = keep[0, 0], error[0, 0].exp()
    shown = (error / error.amax(-1, keepdim=True)) ** 0.35
    tile_of = torch.empty(grid.tokens, dtype=torch.long)
    tile_of[tiling.order] = torch.arange(tiling.tiles).repeat_interleave(tiling.counts)
    read = F.one_hot(tile_of[tokens], tiling.tiles).sum(1)

    size = SIDE * CELL
    parts = []
    for i in range(3):  # three frames, cut into tiles
        x, y = 20 + 18 * (2 - i), TOP + 18 * i
        parts.append(box(x, y, 112, 112, "white", INK))
        cells = [(a, b) for a in range(2) for b in range(2)]
        parts += [box(x + 56 * b + 2, y + 56 * a + 2, 52, 52, PALE if (a + b + i) % 2 else TAIL) for a, b in cells]
    columns = [230, 470, 710]
    for row in range(SIDE):
        for column in range(SIDE):
            x, y = column * CELL, TOP + row * CELL
            parts.append(box(columns[0] + x, y, CELL, CELL, shade(float(shown[row, column])), PALE))
            parts.append(box(columns[1] + x, y, CELL, CELL, KEPT if keep[row, column] else TAIL))
            side = min(CELL - 3.0, float(read[row, column]) ** 0.5 * 1.8)
            if side:
                edge = (CELL - side) / 2
                parts.append(box(columns[1] + x + edge, y + edge, side, side, KEPT, "none"))
    out = columns[2]
    for i in range(3):
        x, y = out + 18 * (2 - i), TOP + 18 * i
        parts.append(box(x, y, 112, 112, "white", INK))
        parts.append(box(x + 2, y + 2, 108, 108, TAIL))
    for x, words in ((180, "probe"), (416, "budget"), (656, "kernel")):
        parts.append(arrow(x - 2, words))
    titles = [(94, "video tokens in tiles"), (308, "error of each mean"), (548, "selection"), (784, "output")]
    parts += [text(x, 36, words, 15, "bold") for x, words in titles]
    y = TOP + size + 26
    notes = [
        (94, "any size; tiles at edges"),
        (94, "are ragged, not padded"),
        (308, "mean queries against all keys,"),
        (308, "a hundredth of the work"),
        (548, "dark: exact, tiles and single tokens"),
        (548, "light: one mean key and value"),
        (784, "one softmax over both,"),
        (784, "in the model's own order"),
    ]
    parts += [text(x, y + 17 * (i % 2), words, 12) for i, (x, words) in enumerate(notes)]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 280" font-family="sans-serif">'
        f'<rect width="880" height="280" fill="white"/>{"".join(parts)}</svg>\n'
    )
    Path(__file__).with_suffix(".svg").write_text(svg)


if __name__ == "__main__":
    main()
