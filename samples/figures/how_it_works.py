"""Draws samples/figures/how_it_works.svg, the README's figure, from a real draft map of a small random video."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from draftdiff.core.draft import draft_map, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import select_draft

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
    coarse = torch.randn(1, 32, 3, 5, 5)
    field = F.interpolate(coarse, grid.shape, mode="trilinear").flatten(2).transpose(1, 2)[:, :, None] * 2.2
    tiling = tiling_for(grid, (1, 8, 8), 64)
    means = pool(field, tiling)
    probabilities = draft_map(means, means)
    keep = select_draft(probabilities, torch.tensor([0.3], dtype=torch.float64))[0, 0]
    shown = (probabilities[0, 0] / probabilities[0, 0].max()).sqrt()

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
    out = columns[2]
    for i in range(3):
        x, y = out + 18 * (2 - i), TOP + 18 * i
        parts.append(box(x, y, 112, 112, "white", INK))
        parts.append(box(x + 2, y + 2, 108, 108, TAIL))
    for x, words in ((180, "pool q, k"), (416, "budget"), (656, "kernel")):
        parts.append(arrow(x - 2, words))
    titles = [(94, "video tokens in tiles"), (308, "draft map"), (548, "selection"), (784, "output")]
    parts += [text(x, 36, words, 15, "bold") for x, words in titles]
    y = TOP + size + 26
    notes = [
        (94, "any size; tiles at edges"),
        (94, "are ragged, not padded"),
        (308, "attention between tile means,"),
        (308, "thousands of times cheaper"),
        (548, "dark: computed exactly"),
        (548, "light: one pooled key and value"),
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
