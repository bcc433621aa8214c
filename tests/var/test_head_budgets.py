"""Budgets per head: what a head misses, how a budget is divided, and caches whose heads keep different keys."""

import pytest
import torch

from draftdiff.var.head_budgets import SHARES, head_capacities
from draftdiff.var.layers import CosineAttention, Step
from draftdiff.var.scale_kv import ScaleKVConfig, window
from draftdiff.var.scale_kv_cache import ScaleKVCache
from draftdiff.var.schedules import scales_for
from tests.var import tiny, tiny_infinity
from tests.var.watching import seeded, watched


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
