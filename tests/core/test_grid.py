"""Tilings: a partition of the grid, text where the model put it, tiles that fit."""

import math

import pytest
import torch

from draftdiff.core.grid import BLOCK_SIZES, LatentGrid, Part, choose_tile, tiling_for

GRIDS = [(1, 1, 1), (5, 13, 9), (21, 30, 52), (3, 8, 16), (1, 45, 80)]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_is_in_one_tile_and_every_tile_has_tokens(grid, block_size):
    grid = LatentGrid(*grid)
    tiling = tiling_for(grid, choose_tile(grid, block_size), block_size, text=70, lead=20)
    slots = tiling.slots[tiling.slots >= 0]
    assert torch.equal(slots.sort().values, torch.arange(tiling.tokens))
    assert torch.equal((tiling.slots >= 0).sum(1), tiling.counts)
    assert int(tiling.counts.min()) > 0
    assert torch.equal(tiling.order[tiling.restore], torch.arange(tiling.tokens))


def extents(tiling):
    """How far each tile of a grid reaches along frames, rows and columns."""
    _, height, width = tiling.grid.shape
    for slots in tiling.slots[: tiling.video_tiles]:
        tokens = slots[slots >= 0]
        axes = tokens // (height * width), tokens // width % height, tokens % width
        yield tuple(int(axis.max() - axis.min()) + 1 for axis in axes)


def test_boxes_are_of_neighbours_and_come_first():
    tiling = tiling_for(LatentGrid(5, 13, 9), (2, 4, 8), 64)
    assert tiling.boxes == (2, 3, 1)
    assert list(extents(tiling))[:6] == [(2, 4, 8)] * 6


@pytest.mark.parametrize("grid", [*GRIDS, (37, 24, 42), (13, 30, 45)], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_no_slot_is_empty_but_in_the_last_tile(grid, block_size):
    grid = LatentGrid(*grid)
    tiling = tiling_for(grid, choose_tile(grid, block_size), block_size)
    assert tiling.tiles == math.ceil(grid.tokens / block_size)
    assert (tiling.counts[:-1] == block_size).all()


def test_what_boxes_do_not_hold_is_in_tiles_of_neighbours_too():
    tiling = tiling_for(LatentGrid(21, 45, 80), (2, 8, 8), 128)
    reach = list(extents(tiling))[math.prod(tiling.boxes) :]
    compact = [frames * rows * columns <= 1.5 * 128 for frames, rows, columns in reach]
    # At a turn a tile lies in two strips: six of the last frame, ten of the last rows.
    assert len(compact) - sum(compact) <= 16


def test_text_stands_around_the_video_and_follows_it_in_tile_order():
    tiling = tiling_for(LatentGrid(1, 2, 3), (1, 2, 3), 64, text=5, lead=2)
    assert tiling.order.tolist() == [2, 3, 4, 5, 6, 7, 0, 1, 8, 9, 10]


def test_grids_of_several_pictures_are_tiled_each_by_itself_and_text_fills_the_gaps():
    reference = Part(9, LatentGrid(1, 1, 2), (1, 1, 1))
    tiling = tiling_for(LatentGrid(1, 2, 3), (1, 2, 3), 64, text=5, lead=2, others=(reference,))
    assert tiling.order.tolist() == [2, 3, 4, 5, 6, 7, 9, 10, 0, 1, 8, 11, 12]
    assert tiling.counts.tolist() == [6, 1, 1, 2, 1, 2]
    assert (tiling.video_tiles, tiling.video_tokens, tiling.tokens) == (3, 8, 13)
    mask = torch.tensor([[True, False, True, False, True]])
    assert tiling.readable(mask)[0, 3:, :2].tolist() == [[True, False], [True, False], [False, True]]


@pytest.mark.parametrize("start", [-1, 1, 7, 12])
def test_a_grid_that_overlaps_another_or_leaves_the_sequence_is_refused_in_one_line(start):
    reference = Part(start, LatentGrid(1, 1, 2), (1, 1, 1))
    with pytest.raises(ValueError, match=rf"must not overlap or leave the sequence of 13 tokens, got .* from {start}"):
        tiling_for(LatentGrid(1, 2, 3), (1, 2, 3), 64, text=5, lead=2, others=(reference,))


def test_padding_text_and_empty_slots_are_not_readable():
    tiling = tiling_for(LatentGrid(1, 8, 9), (1, 8, 8), 64, text=3)
    text_mask = torch.tensor([[True, True, False], [True, False, False]])
    readable = tiling.readable(text_mask)
    assert readable.sum((1, 2)).tolist() == [74, 73]
    assert readable[:, -1, :3].tolist() == text_mask.tolist()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_chosen_tile_fills_a_block(grid, block_size):
    assert math.prod(choose_tile(LatentGrid(*grid), block_size)) == block_size


@pytest.mark.parametrize(("block_size", "tile"), [(64, (2, 4, 8)), (128, (2, 8, 8))])
def test_where_any_fits_the_chosen_tile_is_a_compact_brick_that_is_short_in_time(block_size, tile):
    assert choose_tile(LatentGrid(64, 64, 64), block_size) == tile


@pytest.mark.parametrize(("grid", "tile"), [((21, 45, 80), (2, 8, 8)), ((1, 64, 64), (1, 8, 16))])
def test_the_chosen_tile_of_grids_that_people_use(grid, tile):
    assert choose_tile(LatentGrid(*grid), 128) == tile


def test_the_chosen_tile_leaves_few_tokens_to_strips():
    assert choose_tile(LatentGrid(8, 12, 64), 128)[1] == 4  # rows of eight would leave a third of them


@pytest.mark.parametrize(
    ("tile", "block_size", "message"),
    [
        ((2, 8, 8), 64, "tile must be .* at most 64 tokens, got \\(2, 8, 8\\)"),
        ((0, 8, 8), 64, "tile must be"),
        ((1, 8, 8), 96, "block_size must be one of \\(64, 128\\), got 96"),
    ],
)
def test_a_tile_that_does_not_fit_is_named(tile, block_size, message):
    with pytest.raises(ValueError, match=message):
        tiling_for(LatentGrid(2, 8, 8), tile, block_size)


@pytest.mark.parametrize("lead", [-1, 4])
def test_no_more_text_stands_before_the_video_than_there_is(lead):
    with pytest.raises(ValueError, match=f"lead must be between 0 and the 3 text tokens, got {lead}"):
        tiling_for(LatentGrid(2, 8, 8), (1, 8, 8), 64, text=3, lead=lead)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="grid sizes must be positive whole numbers"):
        LatentGrid(0, 8, 8)


def test_a_tiling_made_in_inference_mode_serves_gradients_later():
    with torch.inference_mode():
        tiling = tiling_for(LatentGrid(3, 7, 5), (1, 8, 8), 64, text=11)
    tensors = tiling.order, tiling.restore, tiling.counts, tiling.slots
    assert not any(x.is_inference() for x in tensors)
