"""Selections stay within budget, leave no row empty, and keep the most mass where they may."""

import pytest
import torch

from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import RULES, SELECTIONS, select, select_draft, select_upstream, tile_lists, with_text


def peaked_and_flat(tiles: int = 32) -> torch.Tensor:
    """A map whose first half of rows is peaked and whose second half is nearly flat."""
    scores = torch.randn(2, 3, tiles, tiles)
    scores[:, :, : tiles // 2] *= 3
    scores[:, :, tiles // 2 :] *= 0.05
    return scores.softmax(-1)


def density_of(value: float, heads: int = 3) -> torch.Tensor:
    return torch.full((heads,), value, dtype=torch.float64)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("row_floor", [0.0, 0.5, 1.0])
def test_draft_spends_its_budget_and_no_more(density, row_floor):
    probabilities = peaked_and_flat()
    kept = select_draft(probabilities, density_of(density), row_floor=row_floor)
    share = kept.float().mean((-1, -2))
    assert bool((share <= max(density, 1 / 32) + 1e-6).all())
    # A plain top-k can only spend whole tiles per row; and what carries no mass need not be bought.
    slack = 1 / 32 if row_floor == 1.0 else 0.02
    covered = (probabilities * kept).sum(-1).amin(-1)
    assert bool(((share >= density - slack) | (covered > 1 - 1e-4)).all())


@pytest.mark.parametrize("row_floor", [0.0, 0.5, 1.0])
def test_draft_leaves_no_row_empty_and_keeps_the_own_tile(row_floor):
    kept = select_draft(peaked_and_flat(), density_of(0.1), row_floor=row_floor)
    assert bool(kept.diagonal(dim1=-2, dim2=-1).all())


def test_upstream_leaves_rows_empty_where_draft_does_not():
    probabilities = peaked_and_flat()
    assert not bool(select_upstream(probabilities, density_of(0.1)).any(-1).all())
    assert bool(select_draft(probabilities, density_of(0.1)).any(-1).all())


def test_an_even_floor_is_the_top_k_of_each_row():
    probabilities = peaked_and_flat()
    kept = select_draft(probabilities, density_of(0.25), row_floor=1.0)
    boosted = probabilities + 2 * torch.eye(32)
    expected = torch.zeros_like(kept).scatter_(-1, boosted.topk(8, dim=-1).indices, True)
    assert torch.equal(kept, expected)


def test_without_a_floor_rows_cover_equal_mass():
    probabilities = peaked_and_flat()
    kept = select_draft(probabilities, density_of(0.5), row_floor=0.0)
    covered = (probabilities * kept).sum(-1)
    # A row stops with the tile that takes it over the mark, so it overshoots by that tile at most.
    last = torch.where(kept & ~torch.eye(32, dtype=torch.bool), probabilities, 1.0).amin(-1)
    mark = covered.amin(-1, keepdim=True)
    assert bool((covered - last <= mark + 1e-4).all())


def test_heads_may_have_budgets_of_their_own():
    kept = select_draft(peaked_and_flat(), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    share = kept.float().mean((0, 2, 3))
    torch.testing.assert_close(share, torch.tensor([0.1, 0.5, 1.0]), atol=0.02, rtol=0)
    assert bool(kept[:, 2].all())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9, 0.99])
def test_upstream_keeps_what_its_rule_says(sparsity):
    probabilities = peaked_and_flat(12)
    kept = select_upstream(probabilities, density_of(1 - sparsity))
    n = 144
    k = int((1.0 - (1 - sparsity)) * n)
    for b in range(2):
        for h in range(3):
            values = probabilities[b, h].flatten()
            threshold = values.sort().values[k - 1] if k else -1.0
            assert torch.equal(kept[b, h].flatten(), values >= threshold)


def test_a_rule_is_found_by_its_name():
    probabilities, density = peaked_and_flat(), density_of(0.3)
    assert tuple(RULES) == SELECTIONS == ("draft", "upstream", "full")
    assert torch.equal(select("draft", probabilities, density), select_draft(probabilities, density))
    assert torch.equal(select("upstream", probabilities, density), select_upstream(probabilities, density))


@pytest.mark.parametrize("rule", SELECTIONS)
def test_the_device_of_the_map_need_not_have_fp64(rule):
    """The density stays where it is: nothing but its counts goes to the map's device, here one without values."""
    kept = select(rule, torch.empty(1, 3, 8, 8, device="meta"), density_of(0.3))
    assert kept.is_meta and kept.dtype == torch.bool


def test_full_keeps_everything():
    assert bool(select("full", peaked_and_flat(), density_of(0.1)).all())


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="selection must be one of draft, upstream, full, got 'best'"):
        select("best", peaked_and_flat(), density_of(0.1))


def test_text_tiles_read_everything_and_are_read_by_all():
    tiling = tiling_for(LatentGrid(1, 8, 24), (1, 8, 8), 64, text=70)
    keep = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask = with_text(keep, tiling)[0, 0]
    assert not mask[:3, :3].any()
    assert mask[3:].all()
    assert mask[:, 3:].all()


def test_lists_name_the_kept_tiles_in_order():
    keep = torch.tensor([[[[False, True, True], [False, False, False], [True, True, True]]]])
    counts, indices = tile_lists(keep)
    assert counts.tolist() == [[[2, 0, 3]]]
    assert indices[0, 0, 0, :2].tolist() == [1, 2]
    assert indices[0, 0, 2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("row_floor", [0.0, 0.5, 1.0])
def test_rows_of_nan_keep_their_own_tile_and_take_nothing_from_others(row_floor):
    probabilities = peaked_and_flat()
    probabilities[0, 1, 5] = torch.nan
    probabilities[1, 2] = torch.nan
    kept = select_draft(probabilities, density_of(0.2), row_floor=row_floor)
    assert bool(kept.diagonal(dim1=-2, dim2=-1).all())
    assert bool((kept.float().mean((-1, -2)) <= 0.2).all())
    floor = max(1, int(row_floor * 0.2 * 32))
    assert kept[0, 1, 5].sum() == floor and bool((kept[1, 2].sum(-1) == floor).all())


def test_the_papers_rule_keeps_what_is_nan_and_other_heads_as_they_are():
    probabilities = peaked_and_flat()
    expected = select_upstream(probabilities, density_of(0.2))
    poisoned = probabilities.clone()
    poisoned[0, 1, 5] = torch.nan
    poisoned[1, 2] = torch.nan
    kept = select_upstream(poisoned, density_of(0.2))
    assert bool(kept[0, 1, 5].all()) and bool(kept[1, 2].all())
    for b, h in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert torch.equal(kept[b, h], expected[b, h])
