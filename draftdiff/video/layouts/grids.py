"""Grids read off what a transformer is called with: latents that are patched, or positions of packed tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from draftdiff.core.grid import LatentGrid
from draftdiff.video.layouts.layout import Arguments, Places


def patched(model: Any, video: Tensor, axes: tuple[int, int, int] = (2, 3, 4)) -> LatentGrid:
    """Grid of a latent video after patching. axes: its frame, row and column dimensions."""
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (model.config.get("patch_size_t") or 1, patch, patch)
    return LatentGrid(*(video.shape[axis] // size for axis, size in zip(axes, patch)))


def channels_first(model: Any, arguments: Arguments) -> LatentGrid:
    return patched(model, arguments["hidden_states"])


def frames_first(model: Any, arguments: Arguments) -> LatentGrid:
    return patched(model, arguments["hidden_states"], axes=(1, 3, 4))


def last_channels(model: Any, arguments: Arguments) -> LatentGrid:
    return patched(model, arguments["hidden_states"], axes=(1, 2, 3))


def picture(model: Any, arguments: Arguments) -> LatentGrid | None:
    """Of latents [batch, channels, height, width]; others, such as packed ones, do not tell their grid."""
    latents, patch = arguments["hidden_states"], model.config.patch_size
    if latents.ndim != 4:
        return None
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return LatentGrid(1, latents.shape[2] // rows, latents.shape[3] // columns)


def text_before(model: Any, arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def in_a_row(start: int, grids: list[LatentGrid]) -> Places:
    """Grids that follow each other from a position on."""
    places = []
    for grid in grids:
        places.append((start, grid))
        start += grid.tokens
    return places


def rasters(positions: Tensor, stacked: bool = False) -> Places:
    """The grids that tokens at these positions (frame, row, column) [tokens, 3] are of, in order, and each one's start.

    Tokens that are of no raster are in none. stacked: frames of the same rows and columns, in order of time, are those
    of one video; else each is a picture of its own.
    """
    places = positions.detach().cpu().double()
    if not len(places):
        return []
    time, row, column = places.T
    back = (row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] <= column[:-1]))
    starts = [0, *(((time[1:] != time[:-1]) | back).nonzero()[:, 0] + 1).tolist(), len(places)]
    found: list[tuple[int, LatentGrid]] = []
    before: Tensor | None = None
    for start, stop in pairwise(starts):
        frame = places[start:stop, 1:]
        width = int((frame[:, 0] == frame[0, 0]).sum())
        cells = frame.unflatten(0, (-1, width)) if len(frame) % width == 0 else None
        if cells is None or not bool((cells == torch.stack(_lattice(cells), dim=-1)).all()):
            before = None
            continue
        follows = before is not None and before.shape == frame.shape and bool((before == frame).all())
        if stacked and follows and bool(time[start] > time[start - 1]):
            at, grid = found[-1]
            found[-1] = at, LatentGrid(grid.frames + 1, grid.height, grid.width)
        else:
            found.append((start, LatentGrid(1, *cells.shape[:2])))
        before = frame
    return found


def _lattice(cells: Tensor) -> tuple[Tensor, ...]:
    """Rows and columns of cells [rows, columns, 2] as they would be in a raster that begins as they do."""
    return torch.meshgrid(cells[:, 0, 0], cells[0, :, 1], indexing="ij")


def last_of(places: Places, tokens: int) -> LatentGrid | None:
    """The last grid, if a sequence of so many tokens ends with it; a lone token is none."""
    start, grid = places[-1] if places else (0, LatentGrid(1, 1, 1))
    return grid if grid.tokens > 1 and start + grid.tokens == tokens else None


def shifted(places: Places, by: int) -> Places:
    return [(start + by, grid) for start, grid in places]


def batch_alike(rows: Tensor) -> Tensor:
    """What is the same for all items of a batch, of positions [tokens, axes] or [batch, tokens, axes]."""
    return rows[0] if rows.ndim == 3 else rows
