"""ScaleKV: full budgets change nothing, others hold what they promise, whatever the model, size and order of calls."""

import pytest
import torch

from draftdiff.var.scale_kv import ScaleKVConfig, check_cache_budget, scale_capacities, window
from draftdiff.var.schedules import SCHEDULES, scales_for
from draftdiff.var.selectivity import Selectivity
from draftdiff.var.vq_model import PATCH_NUMS_256
from tests.rounding import rounded
from tests.var import tiny
from tests.var.watching import seeded, watched


@pytest.mark.parametrize("scoring", ["paper", "upstream"])
def test_a_full_budget_is_bit_identical_to_no_scale_kv(infinity, scoring):
    plain, _ = watched(infinity, "a red circle", size="0.25M")
    infinity.enable_scale_kv(1.0, scoring=scoring)
    full, _ = watched(infinity, "a red circle", size="0.25M")
    assert torch.equal(plain, full)
    infinity.enable_scale_kv(0.1, scoring=scoring)
    assert not torch.equal(plain, watched(infinity, "a red circle", size="0.25M")[0])


@pytest.mark.parametrize("ratio", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("allocation", ["full", "linear"])
def test_a_tenth_of_the_budget_holds_a_tenth_of_the_bytes(infinity, ratio, allocation):
    call = {"aspect_ratio": ratio, "size": "1M"}
    _, plain = watched(infinity, "a red circle", **call)
    infinity.enable_scale_kv(0.1, allocation=allocation)
    _, cut = watched(infinity, "a red circle", **call)
    tokens = [h * w for h, w in scales_for(ratio, "1M")]
    whole = plain[-2][0]
    assert plain[-2][1] == [sum(tokens[:-1])] * 4
    for scale, (nbytes, held) in enumerate(cut):
        if sum(tokens[: scale + 1]) > 0.1 * sum(tokens[:-1]):
            assert nbytes <= 0.1 * whole
            assert sum(held) <= 4 * 0.1 * sum(tokens[:-1])
    if allocation == "full":
        assert cut[-2][0] >= 0.099 * whole


def test_the_second_picture_is_the_first_one_again(infinity):
    infinity.enable_scale_kv(0.1)
    first, _ = watched(infinity, "a red circle", size="0.25M")
    watched(infinity, "a green square", size="0.06M")
    again, _ = watched(infinity, "a red circle", size="0.25M")
    assert torch.equal(first, again)


def test_a_picture_does_not_depend_on_the_others_of_its_batch(infinity):
    infinity.enable_scale_kv(0.1)
    call = {"size": "0.25M", "output_type": "latent"}
    prompts = ["a red circle", "the green square"]
    both = infinity(prompts, generator=[seeded(1), seeded(2)], **call).images
    for index, prompt in enumerate(prompts):
        alone = rounded(lambda: infinity(prompt, generator=[seeded(index + 1)], **call).images)  # noqa: B023
        alone.check(both[index : index + 1])


def test_wide_layers_keep_more_than_local_ones(infinity):
    infinity.enable_scale_kv(0.1, wide_layers=(2,))
    _, seen = watched(infinity, "a red circle", size="0.25M")
    held = seen[-2][1]
    assert held[2] > 2 * max(held[0], held[1], held[3]) and held[0] == held[1] == held[3]


def test_the_window_is_the_middles_of_a_four_by_four_grid():
    assert window((20, 20)).tolist()[:5] == [42, 47, 52, 57, 142]
    rows, columns = window((21, 14)).div(14, rounding_mode="floor"), window((21, 14)) % 14
    assert rows.unique().tolist() == [2, 7, 12, 17] and columns.unique().tolist() == [1, 4, 7, 10]


def test_the_window_survives_every_eviction(infinity):
    infinity.enable_scale_kv(0.1, scoring="upstream")
    capacities = infinity.scale_kv.capacities([h * w for h, w in SCHEDULES[1.5]], 4)
    assert all(min(row) >= 32 for row in capacities if row)


@pytest.mark.parametrize("budget", [0.04, 0.1, 0.5])
def test_var_has_it_too_alone_and_with_a_refiner(budget):
    pipe = tiny.var_pipeline(PATCH_NUMS_256, num_layers=3)
    plain, whole = watched(pipe, [1, 2])
    pipe.enable_scale_kv(budget)
    cut, seen = watched(pipe, [1, 2])
    assert seen[-2][0] <= budget * whole[-2][0]
    assert not torch.equal(plain, cut)

    # With itself as a refiner the first scales were cut as before; the prefill saw them whole.
    pipe.enable_collaborative(tiny.transformer(7, patch_nums=PATCH_NUMS_256, num_layers=2), 6)
    _, both = watched(pipe, [1, 2])
    assert both[-2][0] <= budget * 2 / 3 * whole[-2][0]
    pipe.enable_scale_kv(1.0)
    full, _ = watched(pipe, [1, 2])
    pipe.disable_scale_kv()
    assert torch.equal(full, watched(pipe, [1, 2])[0])


@pytest.mark.parametrize("budget", [0.0001, 0.002, 0.01])
def test_the_smallest_budgets_still_make_a_picture(infinity, budget):
    infinity.enable_scale_kv(budget)
    latents, seen = watched(infinity, "a red circle", size="0.25M")
    assert latents.isfinite().all() and min(seen[-2][1]) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget must be above 0 and at most 1, got 0"),
        ({"budget": 1.5}, "budget must be above 0 and at most 1, got 1.5"),
        ({"allocation": "even"}, "allocation must be one of full, linear, got 'even'"),
        ({"scoring": "mine"}, "scoring must be one of paper, upstream, got 'mine'"),
        ({"kernel": 4}, "kernel must be odd and positive, got 4"),
        ({"wide_layers": (0, 4)}, "wide layers must be from 0 to 3, got 4"),
        ({"wide_layers": {5: [-1]}}, "wide layers must be from 0 to 3, got -1"),
        ({"pooling": "sum"}, "pooling must be one of None, max, average, got 'sum'"),
    ],
)
def test_settings_that_cannot_be_are_named(infinity, arguments, message):
    with pytest.raises(ValueError, match=message):
        infinity.enable_scale_kv(**arguments)


def test_the_wide_layers_of_a_refiner_are_its_own():
    pipe = tiny.var_pipeline(num_layers=3)
    pipe.enable_collaborative(tiny.transformer(7), 2)
    with pytest.raises(ValueError, match="wide layers must be from 0 to 1, got 2"):
        pipe.enable_scale_kv(0.5, wide_layers=(2,), refiner_wide_layers=(2,))
    pipe.enable_scale_kv(0.5, wide_layers=(2,), refiner_wide_layers=(1,))
    _, seen = watched(pipe, [1])
    assert seen[0][1] == [1, 1, 1] and seen[-2][1][1] > seen[-2][1][0]


def test_the_old_names_are_taken_with_one_warning():
    pipe = tiny.var_pipeline(num_layers=3)
    pipe.enable_collaborative(tiny.transformer(7), 2)
    with pytest.warns(FutureWarning, match="drafters is now wide_layers, refiner_drafters is now ref") as caught:
        pipe.enable_scale_kv(0.5, drafters=(2,), refiner_drafters=(1,), kernel=3)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert pipe.scale_kv == ScaleKVConfig(0.5, (2,), kernel=3)
    assert pipe._scale_kv_for(pipe.refiner) == ScaleKVConfig(0.5, (1,), kernel=3)
    index = torch.tensor([[torch.nan, 1.0], [torch.nan, 2.0]])
    with pytest.warns(FutureWarning, match="Selectivity.drafters is now wide_layers"):
        assert Selectivity(index).drafters(0.5) == Selectivity(index).wide_layers(0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'shapers'"):
        pipe.enable_scale_kv(0.5, shapers=(2,))


TOKENS_1M = [side**2 for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)]

# ScaleKV's published tables: after which scale (number from 0), keys of a drafter and of a refiner layer.
TABLES = {
    "2b": (32, [(0, 23)] * 4 + [(0,)], [(920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465)]),
    "8b": (40, [(0, 1, 2)] * 5, [(909, 629), (1464, 584), (2463, 503), (4054, 374), (6200, 200)]),
}


@pytest.mark.parametrize("name", TABLES)
def test_both_published_tables_of_cache_budgets_come_out(name):
    layers, drafters, table = TABLES[name]
    rows = scale_capacities(TOKENS_1M, 650, layers, [()] * 8 + drafters, floor=200)
    assert rows[:7] == [None] * 7
    for row, drafting, (drafter, refiner) in zip(rows[7:], drafters, table):
        assert row == [drafter if layer in drafting else refiner for layer in range(layers)]


@pytest.mark.parametrize("decay", [None, (600, 70.0)])
@pytest.mark.parametrize("drafting", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_layers_keep_the_mean_together(decay, drafting):
    rows = scale_capacities(TOKENS_1M, 650, 4, [drafting] * 13, floor=200, decay=decay)
    for row in rows[7:]:
        assert sum(row) <= 4 * 650
        if decay is None:
            assert sum(row) == 4 * 650


def test_refiners_shrink_linearly_if_asked_to():
    rows = scale_capacities(TOKENS_1M, 650, 32, [(0, 23)] * 13, floor=200, decay=(600, 70.0))
    assert [row[1] for row in rows[7:]] == [600, 530, 460, 390, 320]


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, True, "half"])
def test_a_cache_budget_outside_its_range_is_an_error(budget):
    with pytest.raises(ValueError, match=r"budget must be above 0 and at most 1, got"):
        check_cache_budget(budget)
