"""A rule is checked where it is made, and packed into one value for compiled graphs."""

import pytest

from draftdiff.attention.rule import Rule, unpack
from draftdiff.core.grid import LatentGrid

RULES = [
    Rule(),
    Rule("upstream", tail=False, backend="torch"),
    Rule(selection="error", single=0.05, tile=(2, 4, 8), block_size=128),
    Rule("full", block_size=64, backend="reference"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_packing_and_unpacking_gives_the_same_rule(rule):
    assert unpack(rule.packed) == rule
    assert len({r.packed for r in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selection": "best"}, "selection must be one of draft, upstream, full, error, got 'best'"),
        ({"block_size": 96}, r"block_size must be one of \(64, 128\), got 96"),
        ({"tile": (1, 8)}, r"tile must be \(frames, rows, columns\) of at most 128 tokens, got \(1, 8\)"),
        ({"tile": (1, 8.0, 8)}, r"tile must be .* of at most 128 tokens, got \(1, 8.0, 8\)"),
        ({"tile": (True, 8, 8)}, "tile must be .* of at most 128 tokens"),
        ({"tile": (1, 8, None)}, "tile must be .* of at most 128 tokens"),
        ({"tile": ("1", 8, 8)}, "tile must be .* of at most 128 tokens"),
        ({"tile": (0, 8, 8)}, "tile must be .* of at most 128 tokens"),
        ({"tile": (1, 8, 16), "block_size": 64}, "tile must be .* of at most 64 tokens"),
        ({"selection": "upstream", "block_size": 64}, r"block_size must be 128 for the tile \(1, 8, 16\), got 64"),
        ({"backend": "fast"}, "backend must be one of auto, reference, torch, .*, got 'fast'"),
        ({"precision": "int4"}, "precision must be one of full, int8, got 'int4'"),
    ],
)
def test_what_is_not_allowed_is_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Rule(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rule", "grid", "expected"),
    [
        (Rule(), (4, 16, 16), 64),
        (Rule(), (16, 32, 32), 128),  # 16,384 tokens
        (Rule(), (16, 32, 31), 64),
        (Rule(block_size=128), (4, 16, 16), 128),
        (Rule(tile=(1, 8, 8)), (16, 32, 32), 64),
        (Rule(tile=(1, 8, 9)), (4, 16, 16), 128),
    ],
)
def test_blocks_grow_with_the_grid_and_follow_a_given_tile(rule, grid, expected):
    tile, block_size = rule.tile_for(LatentGrid(*grid))
    assert block_size == expected
    assert tile == rule.tile or tile[0] * tile[1] * tile[2] == expected


def test_the_papers_rule_has_the_papers_tile():
    assert Rule("upstream").tile_for(LatentGrid(4, 16, 32)) == ((1, 8, 16), 128)
    assert Rule("upstream", tile=(1, 8, 8)).tile_for(LatentGrid(4, 16, 32)) == ((1, 8, 8), 64)
