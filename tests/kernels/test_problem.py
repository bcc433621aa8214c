"""A problem is checked where it is made, and knows what several backends need."""

import math

import numpy as np
import pytest
import torch

from draftdiff.core.draft import Tail
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.kernels.problem import Problem
from tests.kernels.cases import KERNEL_CASES, make


def tiny(**changes):
    q = torch.zeros(1, 64, 2, 16)
    tiling = tiling_for(LatentGrid(1, 8, 8), (1, 8, 8), 64)
    parts = {"q": q, "k": q, "v": q, "keep": torch.ones(1, 2, 1, 1, dtype=torch.bool), "tiling": tiling}
    return Problem(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(64, 2, 16)}, r"q must be \[batch, tokens, heads, head_dim\], .*got \(64, 2, 16\)"),
        ({"k": torch.zeros(1, 64, 2, 8)}, r"must have the same batch .* got \(1, 64, 2, 16\), \(1, 64, 2, 8\), "),
        ({"q": torch.zeros(1, 63, 2, 16)}, r"must have one shape, got \(1, 63, 2, 16\) and \(1, 64, 2, 16\)"),
        ({"scale": float("nan")}, "scale must be a finite number or None, got nan"),
        (
            {"v": torch.zeros(1, 64, 2, 16).half()},
            r"must have one floating dtype, got torch.float32, .*, torch.float16",
        ),
        (dict.fromkeys("qkv", torch.zeros(1, 64, 2, 16, dtype=torch.int32)), "one floating dtype, got torch.int32"),
        (dict.fromkeys("qkv", torch.zeros(1, 65, 2, 16)), "q has 65 tokens, the grid 1x8x8 with 0 text tokens has 64"),
        ({"keep": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, r"keep must be torch.bool \(1, 2, 1, 1\), got torch.bool"),
        ({"keep": torch.ones(1, 2, 1, 1)}, r"keep must be torch.bool \(1, 2, 1, 1\), got torch.float32 \(1, 2, 1, 1\)"),
        ({"text_mask": torch.ones(1, 3, dtype=torch.bool)}, r"text_mask must be torch.bool \(1, 0\), got .* \(1, 3\)"),
        ({"text_mask": torch.ones(1, 0, dtype=torch.int64)}, r"text_mask must be torch.bool, .*got torch.int64"),
        ({"tail": Tail(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 2, 16))}, r"tail.v_mean must be .*\(1, 2, 2, 16\)"),
        ({"tail": Tail(*torch.zeros(2, 1, 2, 1, 16).half())}, "tail.k_mean must be torch.float32 .*got torch.float16"),
    ],
)
def test_parts_that_do_not_fit_are_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        tiny(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("scale", "factor"), [(None, 0.25), (0, 0.0), (0.5, 0.5)])
def test_a_scale_of_zero_is_no_default(scale, factor):
    assert tiny(scale=scale).factor == factor


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_each_token_knows_its_tile_and_each_tile_its_weight(case):
    problem = make(case, 16, torch.float32, False)
    for tile, slots in enumerate(problem.tiling.slots):
        tokens = slots[slots >= 0]
        assert bool((problem.tile_of[tokens] == tile).all())
        if tile < problem.tiling.video_tiles:
            weights = problem.log_counts.expand(case.batch, case.heads, problem.tiling.tiles, -1)
            for (b, h, row), found in zip(np.ndindex(*weights.shape[:3]), weights[..., tile].flatten().tolist()):
                singly = problem.tokens is not None and row < problem.tiling.video_tiles
                taken = set(problem.tokens[b, h, row].tolist()) if singly else set()
                left = len(set(tokens.tolist()) - taken)
                assert found == pytest.approx(math.log(left) if left else -math.inf)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
def test_it_knows_which_query_tiles_read_nothing(case, with_tail):
    problem = make(case, 16, torch.float32, with_tail)
    for b in range(case.batch):
        readable = problem.readable[b if case.padded else 0].any(-1)
        for h in range(case.heads):
            for tile, row in enumerate(problem.keep[b, h]):
                read = bool((row & readable).any()) or (with_tail and not bool(row[: problem.tiling.video_tiles].all()))
                if problem.tokens is not None and tile < problem.tiling.video_tiles:
                    read |= bool((problem.tokens[b, h, tile] >= 0).any())
                assert bool(problem.reads_nothing[b, h, tile]) == (not read)
