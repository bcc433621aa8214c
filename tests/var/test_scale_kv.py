"""ScaleKV: full budgets change nothing, others hold what they promise, whatever the model, size and order of calls."""

import pytest
import torch

from draftdiff.var.head_budgets import SHARES, head_capacities
from draftdiff.var.layers import CosineAttention, Step
from draftdiff.var.scale_kv import ScaleKVConfig, check_cache_budget, scale_capacities, window
from draftdiff.var.scale_kv_cache import ScaleKVCache
from draftdiff.var.schedules import SCHEDULES, scales_for
from draftdiff.var.selectivity import Selectivity
from draftdiff.var.vq_model import PATCH_NUMS_256
from tests.rounding import rounded
from tests.var import tiny, tiny_infinity


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def watched(pipe, *arguments, **call):
    """Latents, and after each scale the cache's bytes and its keys per layer."""
    seen = []

    def look(_pipe, _scale, _step, tensors):
        cache = tensors["cache"]
        seen.append((cache.nbytes, [cache.tokens(layer) for layer in sorted(cache.keys, key=str)]))
        return {}

    latents = pipe(
        *arguments,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["cache"],
        **call,
    ).images
    return latents, seen


@pytest.fixture(scope="module")
def infinity():
    return tiny_infinity.infinity_pipeline(num_layers=4)


@pytest.fixture(autouse=True)
def _off(infinity):
    yield
    infinity.disable_scale_kv()


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


def test_calibration_finds_the_layer_that_spreads_its_attention(infinity):
    with torch.no_grad():
        for block, scale in zip(infinity.transformer.blocks, (4.0, -3.0, 4.0, 4.0)):
            block.attn1.log_scale.fill_(scale)  # the second layer looks at everything alike
    found = infinity.calibrate_scale_kv(["a red circle", "a green square"], size="0.25M", generator=seeded())
    assert found.index.shape == (4, 10)
    assert found.index[:, 0].isnan().all() and found.index[:, 1:].isfinite().all()
    wide = found.wide_layers(0.25)
    assert all(wide[scale] == (1,) for scale in range(3, 10))  # before, all history is among the strongest
    infinity.enable_scale_kv(0.1, wide_layers={str(scale): list(layers) for scale, layers in wide.items()})
    _, seen = watched(infinity, "a red circle", size="0.25M")
    assert max(range(4), key=lambda layer: seen[-2][1][layer]) == 1


def test_selectivity_is_the_product_of_the_means_it_is_defined_by():
    pipe = tiny.var_pipeline(num_layers=1)
    found = pipe.calibrate_scale_kv([1], guidance_scale=0, generator=seeded())
    attention, block = [], pipe.transformer.blocks[0].attn
    original = torch.nn.functional.scaled_dot_product_attention

    def keep(q, k, v, scale):
        attention.append((q @ k.transpose(-1, -2) * scale).softmax(-1))
        return original(q, k, v, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
        pipe(1, guidance_scale=0, generator=seeded(), output_type="latent")
    assert block.heads == 2
    for scale, weights in enumerate(attention[:6]):
        new = weights.shape[2]
        if scale:
            past = weights[..., :-new].sort(descending=True).values[..., :16].sum(-1)
            expected = weights[..., -new:].sum(-1).mean() * past.mean()
            assert float(found.index[0, scale]) == pytest.approx(float(expected), rel=1e-4)


def test_pairs_with_the_lowest_z_score_are_wide():
    index = torch.tensor([[torch.nan, 1.0, 5.0], [torch.nan, 2.0, 1.0], [torch.nan, 3.0, 6.0]], dtype=torch.float64)
    assert Selectivity(index).wide_layers(0.34) == {0: (), 1: (0,), 2: (1,)}
    with pytest.raises(ValueError, match="share of wide layers must be at least 0 and below 1, got 1"):
        Selectivity(index).wide_layers(1)


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


def test_calibration_needs_prompts_and_one_model(infinity):
    with pytest.raises(ValueError, match="calibration needs at least one prompt"):
        infinity.calibrate_scale_kv([])
    pipe = tiny.var_pipeline()
    pipe.enable_collaborative(tiny.transformer(7), 2)
    with pytest.raises(ValueError, match="calibrate one model at a time"):
        pipe.calibrate_scale_kv([1])


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


def calibrated(pipe, *prompts, **call):
    return pipe.calibrate_scale_kv(prompts, generator=seeded(9), **call).missed


def test_what_a_calibration_finds_a_head_to_miss_is_what_its_definition_says():
    pipe = tiny.var_pipeline(num_layers=1)
    missed = calibrated(pipe, 1, guidance_scale=0)
    assert missed.shape == (1, 6, 2, len(SHARES)) and missed[:, 0].isnan().all()
    assert (missed[:, 1:].diff(dim=-1) <= 0).all() and missed[:, 1:, :, -1].abs().max() < 1e-6
    attention = []
    original = torch.nn.functional.scaled_dot_product_attention

    def keep(q, k, v, scale):
        attention.append((q, k, (q @ k.transpose(-1, -2) * scale).softmax(-1)))
        return original(q, k, v, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
        pipe(1, guidance_scale=0, generator=seeded(9), output_type="latent")
    for scale in range(1, 6):
        history = sum(side**2 for side in tiny.PATCH_NUMS[:scale])
        (q, k, _), (_, _, weights) = attention[scale - 1], attention[scale]
        side = tiny.PATCH_NUMS[scale - 1]
        at = window((side, side), min(4, side))
        scores = torch.nn.functional.avg_pool1d((q[:, :, at] @ k.transpose(-1, -2)).softmax(-1).sum(2), 5, 1, 2)
        scores[..., at + history - side**2] = torch.inf
        for number, share in enumerate(SHARES):
            best = scores.argsort(dim=-1, descending=True, stable=True)[..., : round(share * history)]
            past = weights[..., :history].mean(2)
            expected = past.sum(-1) - past.gather(-1, best).sum(-1)
            torch.testing.assert_close(missed[0, scale, :, number].float(), expected[0], atol=1e-5, rtol=1e-4)


def test_equal_budgets_per_head_are_those_per_layer_to_the_bit(infinity):
    tokens = [h * w for h, w in scales_for(1.0, "0.25M")]
    infinity.enable_scale_kv(0.1)
    by_layer, held = watched(infinity, "a red circle", size="0.25M")
    rows = infinity.scale_kv.capacities(tokens, 4)
    alike = [row and [[capacity] * 2 for capacity in row] for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScaleKVConfig, "capacities", lambda *_: alike)
        by_head, held_by_head = watched(infinity, "a red circle", size="0.25M")
    assert torch.equal(by_layer, by_head) and held == held_by_head


def test_heads_in_groups_read_what_they_would_read_alone():
    """Against a mask in whole attention: every head, by itself, over the keys that it kept."""
    scales, generator = [(1, 1), (2, 2), (3, 3), (4, 4)], seeded(3)
    capacities = [None, [[2, 5, 3]], [[4, 4, 9]]]
    cache = ScaleKVCache(scales, capacities, ScaleKVConfig(0.5))
    attention = CosineAttention(48, 3).eval()
    alone = [ScaleKVCache(scales, [row and [[row[0][h]]] for row in capacities], ScaleKVConfig(0.5)) for h in range(3)]
    alone_side = min(n for row in capacities if row for n in row[0])
    assert alone_side == 2  # the window is of the smallest budget, here one token, for all heads alike
    for cached in (cache, *alone):
        cached.window_side = 1
    for number, (height, width) in enumerate(scales):
        x = torch.randn(2, height * width, 48, generator=generator)
        with torch.no_grad():
            both = attention(x, Step([height * width], cache, number < 3))
            q, k, v = attention.to_qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            stretch = attention.log_scale.exp()[:, None, None]
            q, k = torch.nn.functional.normalize(q, dim=-1) * stretch, torch.nn.functional.normalize(k, dim=-1)
            outs = []
            for head, cached in enumerate(alone):
                one = [t[:, head : head + 1] for t in (q, k, v)]
                keys, values = cached.extend(0, *one[1:], keep=number < 3)
                outs.append(torch.nn.functional.scaled_dot_product_attention(one[0], keys, values, scale=1.0))
                cached.observe(0, one[0], keys, lambda: None)
            expected = attention.to_out(torch.cat(outs, dim=1).transpose(1, 2).flatten(2))
        torch.testing.assert_close(both, expected, atol=1e-6, rtol=1e-5)
        assert cache.nbytes == sum(cached.nbytes for cached in alone)
    assert [heads.tolist() for _, heads in cache.groups(0)] == [[0, 1], [2]]


@pytest.mark.parametrize("budget", [0.04, 0.1, 0.5])
def test_budgets_per_head_hold_the_bytes_of_budgets_per_layer_and_come_off_without_a_trace(infinity, budget):
    call = {"size": "0.25M"}
    plain, whole = watched(infinity, "a red circle", **call)
    infinity.enable_scale_kv(budget, per="head", missed=calibrated(infinity, "a green square", **call))
    cut, seen = watched(infinity, "a red circle", **call)
    assert 0.98 * budget * whole[-2][0] <= seen[-2][0] <= budget * whole[-2][0]
    assert torch.equal(cut, watched(infinity, "a red circle", **call)[0])
    assert budget == 0.5 or not torch.equal(cut, plain)  # half of the cache is enough for the same bits here
    infinity.disable_scale_kv()
    assert torch.equal(plain, watched(infinity, "a red circle", **call)[0])


def test_a_head_that_misses_more_keeps_more_and_the_mean_is_kept():
    missed = torch.linspace(1, 0, len(SHARES), dtype=torch.float64).pow(2).expand(2, 4, 2, -1).clone()
    missed[1, :, 0] *= 0.1
    rows = head_capacities([4, 16, 36, 64], 14, missed, floor=2)
    assert rows[0] is None and all(sum(map(sum, row)) == 4 * 14 for row in rows[1:])
    for row in rows[1:]:
        assert row[0][0] >= row[1][1] > row[1][0] >= 2 or row[0][0] > row[1][0] >= 2
    assert head_capacities([4, 16, 36, 64], 56, missed, floor=2) == [None] * 3
    with pytest.raises(ValueError, match="calibration has 4 scales, this picture 5: calibrate at its size"):
        head_capacities([4, 16, 36, 64, 81], 14, missed, floor=2)


def test_a_budget_is_divided_as_well_as_by_trying_every_division():
    generator = seeded(4)
    missed = torch.rand(1, 2, 3, len(SHARES) - 1, generator=generator, dtype=torch.float64).cumsum(-1).flip(-1)
    missed = torch.nn.functional.pad(missed.cumsum(-1).flip(-1).cumsum(-1).flip(-1), (0, 1))  # convex, and 0 at last
    missed /= missed.amax()
    (row,) = head_capacities([64, 1], 32, missed, floor=0)
    counts = torch.tensor([round(share * 64) for share in SHARES])

    def lost(kept):
        total = 0.0
        for head, n in enumerate(kept):
            right = min(int((counts < n).sum()), len(SHARES) - 1)
            left = max(right - 1, 0)
            share = (n - counts[left]) / max(counts[right] - counts[left], 1)
            total += float(missed[0, 1, head, left].lerp(missed[0, 1, head, right], share.double()))
        return total

    every = [(a, b, 96 - a - b) for a in range(65) for b in range(65) if 0 <= 96 - a - b <= 64]
    assert lost(row[0]) <= min(map(lost, every)) + 1e-9


def test_the_heads_of_a_refiner_have_their_own_budgets():
    pipe = tiny.var_pipeline(num_layers=3)
    missed, refiner = calibrated(pipe, 1), tiny.transformer(7)
    of_refiner = calibrated(tiny.var_pipeline(seed=7), 1)
    pipe.enable_collaborative(refiner, 2)
    with pytest.raises(ValueError, match="need each other"):
        pipe.enable_scale_kv(0.5, per="head", missed=missed)
    with pytest.raises(ValueError, match=r"must be \[2 layers, scales, 2 heads, 12 shares\], got \[3, 6, 2, 12\]"):
        pipe.enable_scale_kv(0.5, per="head", missed=missed, refiner_missed=missed)
    pipe.enable_scale_kv(0.5, per="head", missed=missed, refiner_missed=of_refiner)
    assert watched(pipe, [1])[0].isfinite().all()
    pipe.disable_collaborative()
    assert watched(pipe, [1])[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "token"}, "per must be one of layer, head, got 'token'"),
        ({"per": "head"}, "per='head' and missed="),
        ({"missed": torch.zeros(4, 10, 2, 12)}, "per='head' and missed="),
        ({"per": "head", "missed": torch.zeros(4, 10, 2, 12), "wide_layers": (0,)}, "are for per='layer'"),
        ({"per": "head", "missed": torch.zeros(4, 10, 2, 12) + 2}, "must be from 0 to 1"),
        ({"per": "head", "missed": torch.zeros(3, 10, 2, 12)}, r"must be \[4 layers, scales, 2 heads, 12 shares\]"),
    ],
)
def test_budgets_per_head_that_cannot_be_are_named(infinity, options, message):
    with pytest.raises(ValueError, match=message):
        infinity.enable_scale_kv(0.1, **options)


def test_budgets_per_head_go_together_with_draft_attention(infinity):
    call = {"size": "0.06M"}
    infinity.enable_scale_kv(0.1, per="head", missed=calibrated(infinity, "a green square", **call))
    alone, held = watched(infinity, "a red circle", **call)
    infinity.enable_draft_attention(0.5, min_tokens=128)
    try:
        drafted, held_too = watched(infinity, "a red circle", **call)
    finally:
        infinity.disable_draft_attention()
    assert drafted.isfinite().all() and not torch.equal(drafted, alone)
    assert [nbytes for nbytes, _ in held] == [nbytes for nbytes, _ in held_too]


@pytest.mark.slow
def test_compiled_blocks_with_budgets_per_head_give_the_same_picture(infinity):
    call = {"size": "0.06M"}
    infinity.enable_scale_kv(0.1, per="head", missed=calibrated(infinity, "a green square", **call))
    alone, _ = watched(infinity, "a red circle", **call)
    pipe = tiny_infinity.infinity_pipeline(num_layers=4)
    pipe.scale_kv = infinity.scale_kv
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True)
        assert torch.equal(watched(pipe, "a red circle", **call)[0], alone)
