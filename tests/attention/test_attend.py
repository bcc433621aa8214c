"""The method as one function: against dense attention, with gradients, and what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.attention import attend as attend_module
from draftdiff.attention.attend import attend, attend_op, compute_dtype, packed_places
from draftdiff.attention.rule import Rule
from draftdiff.core.budget import Budget
from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError

GRID = LatentGrid(2, 9, 11)
BACKENDS = ("auto", "torch", "reference")


def made(tokens, heads=2, head_dim=32, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, head_dim, generator=generator).to(dtype) for _ in range(3)]


def dense(q, k, v, mask=None, scale=None):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def close(out, expected, dtype=torch.float32, times=16):
    """Within a few roundings of the largest value."""
    scale = float(expected.abs().max())
    assert float((out.double() - expected).abs().max()) <= times * torch.finfo(dtype).eps * scale


def half(heads=2):
    return torch.full((heads,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [0, 3, 7])
@pytest.mark.parametrize("scale", [None, 0.0, 0.3])
def test_everything_kept_is_dense_attention(backend, lead, scale):
    q, k, v = made(GRID.tokens + 7)
    rule = Rule("full", backend=backend)
    out, (density, mass) = attend(q, k, v, half(), rule, grid=GRID, lead=lead, scale=scale)
    close(out, dense(q, k, v, scale=scale))
    assert float(density) == pytest.approx(1)
    assert float(mass) == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [5, 70])
def test_keys_without_queries_stand_before_the_grid(backend, before):
    q, k, v = made(GRID.tokens + before)
    rule = Rule("full", backend=backend)
    out, _ = attend(q[:, before:], k, v, half(), rule, grid=GRID, lead=before)
    assert out.shape == q[:, before:].shape
    close(out, dense(q[:, before:], k, v))
    sparse, (density, _) = attend(q[:, before:], k, v, half(), Rule(backend=backend), grid=GRID, lead=before)
    whole, _ = attend(q, k, v, half(), Rule(backend=backend), grid=GRID, lead=before)
    close(sparse, whole[:, before:].double())
    assert 0 < float(density) < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stretches", [[(0, 90)], [(30, 31), (60, 205)], [(100, 208)]], ids=str)
@pytest.mark.parametrize("rule", [Rule("full"), Rule("error", single=0.06)], ids=["full", "sparse"])
def test_some_queries_give_what_they_give_among_all(backend, rule, stretches):
    q, k, v = made(GRID.tokens + 10)
    rule = replace(rule, backend=backend)
    places = torch.cat([torch.arange(*stretch) for stretch in stretches])
    # Tiles whose queries are not all there choose by those that are.
    tiling = rule.tiling(GRID, 10, 4, q.device)
    there = torch.isin(tiling.slots, torch.cat([places, torch.tensor([-1])])).all(1)
    whole = tiling.slots[there][tiling.slots[there] >= 0]
    found, (density, _) = attend(q[:, places], k, v, half(), rule, grid=GRID, lead=4, queries=stretches)
    assert found.shape == q[:, places].shape
    expected, _ = attend(q, k, v, half(), rule, grid=GRID, lead=4)
    alike = places if rule.selection == "full" else whole[torch.isin(whole, places)]
    assert len(alike)
    close(found[:, torch.isin(places, alike)], expected[:, alike.sort().values].double())
    assert 0 < float(density) <= 1


@pytest.mark.parametrize(("stretch", "rows"), [((0, 4), 1), ((0, 60), 2), ((4, 208), 4)], ids=str)
def test_only_tiles_that_are_asked_for_are_drafted(monkeypatch, stretch, rows):
    """The text alone, which has no tile of the video to draft, some frames' tiles, and all of them."""
    drafted = []
    stock = attend_module.errors
    monkeypatch.setattr(attend_module, "errors", lambda q, *a, **b: drafted.append(q.shape[2]) or stock(q, *a, **b))
    q, k, v = made(GRID.tokens + 10)
    attend(q[:, slice(*stretch)], k, v, half(), Rule("error", tile=(1, 8, 8)), grid=GRID, lead=4, queries=[stretch])
    tiling = Rule("error", tile=(1, 8, 8)).tiling(GRID, 10, 4, q.device)
    asked = (tiling.slots[: tiling.video_tiles, :, None] == torch.arange(*stretch)).any(-1).any(-1)
    assert drafted == [max(1, int(asked.sum()))]
    assert rows <= drafted[0] <= tiling.video_tiles


def test_queries_that_do_not_fit_are_refused_in_one_line():
    q, k, v = made(GRID.tokens + 10)
    for stretches in ([(0, 10)], [(50, 60), (0, 40)], [(180, 230)]):
        with pytest.raises(UserError, match=r"queries must be stretches of 50 in 208 tokens, got \[\("):
            attend(q[:, :50], k, v, half(), Rule(), grid=GRID, lead=4, queries=stretches)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule", [Rule("full"), Rule("error", single=0.06), Rule("upstream")], ids=lambda r: r.selection
)
def test_grids_beside_the_first_are_drafted_too(backend, rule):
    references = [(5, LatentGrid(1, 10, 8)), (290, LatentGrid(1, 7, 13))]
    q, k, v = made(5 + 80 + 6 + GRID.tokens + 1 + 91 + 4)
    out, (density, _) = attend(q, k, v, half(), replace(rule, backend=backend), grid=GRID, lead=91, others=references)
    reference, (same, _) = attend(
        q, k, v, half(), replace(rule, backend="reference"), grid=GRID, lead=91, others=references
    )
    close(out, reference.double())
    assert float(density) == pytest.approx(float(same), rel=1e-6)
    if rule.selection == "full":
        close(out, dense(q, k, v))
    else:
        alone = attend(q, k, v, half(), replace(rule, backend=backend), grid=GRID, lead=91)[1][0]
        assert float(density) < float(alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_head_serves_neighbouring_query_heads(backend):
    q, k, v = made(GRID.tokens + 3, heads=6)
    k, v = k[:, :, :2], v[:, :, :2]
    density = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    rule = Rule("error", single=0.06, backend=backend)
    out, stats = attend(q, k, v, density, rule, grid=GRID)
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    expected, same = attend(q, *repeated, density, rule, grid=GRID)
    close(out, expected.double())
    assert torch.allclose(stats, same)


def test_gradients_reach_shared_key_heads_further_grids_and_some_queries():
    q, k, v = made(GRID.tokens + 60, heads=4)
    parts = [x.requires_grad_() for x in (q[:, 8:], k[:, :, :2].clone(), v[:, :, :2].clone())]
    places = packed_places(GRID.shape, 8, [(8 + GRID.tokens, (1, 6, 8))], [(8, GRID.tokens + 60)])
    density = torch.ones(4, dtype=torch.float64)
    out, _ = attend_op(*parts, density, None, places, None, Rule("full").packed)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, parts, weights)
    wide = [x.detach().double().requires_grad_() for x in parts]
    repeated = [x.repeat_interleave(2, dim=2) for x in wide[1:]]
    expected = torch.autograd.grad(dense(wide[0], *repeated), wide, weights.double())
    for gradient, wanted in zip(found, expected):
        close(gradient, wanted, times=64)


def test_a_head_of_full_density_is_dense_beside_one_that_reads_single_tokens():
    q, k, v = made(GRID.tokens)
    rule = Rule(selection="error", single=0.125, tile=(2, 4, 8), block_size=64)
    out, _ = attend(q, k, v, torch.tensor([1.0, 0.5], dtype=torch.float64), rule, grid=GRID)
    expected = dense(q, k, v)
    close(out[:, :, 0], expected[:, :, 0])
    assert float((out[:, :, 1] - expected[:, :, 1]).abs().max()) > 1e-3


def test_less_is_computed_at_a_lower_density():
    q, k, v = made(LatentGrid(4, 16, 16).tokens)
    found = []
    for share in (0.2, 0.5, 1.0):
        density = torch.full((2,), share, dtype=torch.float64)
        found.append(float(attend(q, k, v, density, Rule(), grid=LatentGrid(4, 16, 16))[1][0]))
    assert found == sorted(found)
    assert found[0] <= 0.2
    assert found[2] == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_a_full_selection_are_those_of_dense_attention(backend, masked):
    text = 6
    parts = [x.requires_grad_() for x in made(GRID.tokens + text)]
    text_mask = torch.ones(2, text, dtype=torch.bool)
    text_mask[1, 4:] = False
    config = DraftAttentionConfig(selection="full", backend=backend)
    out = draftdiff.draft_attention(*parts, grid=GRID, config=config, text_mask=text_mask if masked else None)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, parts, weights)
    wide = [x.detach().double().requires_grad_() for x in parts]
    valid = F.pad(text_mask, (GRID.tokens, 0), value=True)[:, None, None] if masked else None
    expected = torch.autograd.grad(dense(*wide, mask=valid), wide, weights.double())
    for gradient, wanted in zip(found, expected):
        close(gradient, wanted, times=64)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("selection", ["draft", "upstream"])
def test_gradients_of_a_sparse_selection_are_the_references(selection, tail):
    found = {}
    for backend in ("auto", "torch", "reference"):
        parts = [x.requires_grad_() for x in made(GRID.tokens + 5)]
        config = DraftAttentionConfig(0.4, selection=selection, tail=tail, backend=backend)
        out = draftdiff.draft_attention(*parts, grid=GRID, config=config)
        found[backend] = torch.autograd.grad(out.square().sum(), parts)
    with torch.no_grad():
        lengths = [float(x.abs().max()) for x in found["reference"]]
    for backend in ("auto", "torch"):
        for gradient, wanted, length in zip(found[backend], found["reference"], lengths):
            assert float((gradient - wanted).abs().max()) <= 256 * torch.finfo(torch.float32).eps * length


def test_what_the_op_saves_and_takes_is_what_autograd_expects():
    q, k, v = (x.requires_grad_() for x in made(GRID.tokens, batch=1))
    call = (q, k, v, half(), None, packed_places([2, 9, 11]), None, Rule(backend="torch").packed)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(attend_op, call, test_utils=tests)


def test_autocast_is_what_attention_computes_in_and_does_not_reach_inside():
    q, k, v = made(GRID.tokens)
    assert compute_dtype(q) == torch.float32
    plain, _ = attend(q, k, v, half(), Rule(), grid=GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(q) == torch.bfloat16
        within, _ = attend(q, k, v, half(), Rule(), grid=GRID)
    assert compute_dtype(q.to("meta")) == torch.float32
    assert torch.equal(plain, within)


FITS = made(GRID.tokens + 2)
SHORT = "q, k and v must have the same batch and head_dim, and heads that fit, got"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :, [0, 1, 1]], v[:, :, [0, 1, 1]]), SHORT),
        (lambda q, k, v: (q, k, v[..., :16]), SHORT),
        (lambda q, k, v: (q, k[:1], v[:1]), SHORT),
        (lambda q, k, v: (q[:, :50], k[:, :50], v[:, :50]), "k has 50 tokens, fewer than the 198 of the grid 2x9x11"),
        (lambda q, k, v: (q[:, :199], k, v), "q has 199 tokens, needs the grid's 198 or all 200 of k"),
        (lambda q, k, v: (q, k.half(), v), "q, k and v must have one floating dtype, got"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "q, k and v must have one floating dtype, got"),
        (lambda q, k, v: (q[0], k[0], v[0]), r"q must be \[batch, tokens, heads, head_dim\], .* got \(200, 2, 32\)"),
        (lambda q, k, v: (q, k, v[..., None]), r"v must be \[batch, tokens, heads, head_dim\]"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "none of them 0, got"),
        (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), "none of them 0, got"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), "none of them 0, got"),
        (lambda q, k, v: (q, k.numpy(), v), "k must be a tensor, got ndarray"),
        (lambda q, k, v: (q, None, v), "k must be a tensor, got NoneType"),
        (lambda q, k, v: (q, k.to("meta"), v), "q, k and v must be on one device, got cpu, meta, cpu"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_tensors_that_do_not_fit_are_named_in_one_line(change, message, gradient):
    q, k, v = FITS
    parts = change(q.clone().requires_grad_(gradient), k, v)
    with pytest.raises(UserError, match=message) as error:
        draftdiff.draft_attention(*parts, grid=GRID, lead=2)
    assert "\n" not in str(error.value)


TRUE = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_mask": TRUE.long()}, r"text_mask must be torch\.bool, .*got torch.int64"),
        ({"text_mask": TRUE.byte()}, r"text_mask must be torch\.bool, .*got torch.uint8"),
        ({"text_mask": TRUE.float()}, r"text_mask must be torch\.bool, .*got torch.float32"),
        ({"text_mask": TRUE.tolist()}, r"text_mask must be torch\.bool, .*got list"),
        ({"text_mask": TRUE.to("meta")}, "text_mask must be on cpu as q is, got meta"),
        ({"text_mask": TRUE[:, :1]}, r"text_mask must be torch\.bool \(2, 2\), got torch\.bool \(2, 1\)"),
        ({"text_mask": TRUE[0]}, r"text_mask must be torch\.bool \(2, 2\), got torch\.bool \(2,\)"),
        ({"text_mask": TRUE[:, None, None]}, r"text_mask must be torch\.bool \(2, 2\), got"),
        ({"scale": math.nan}, "scale must be a finite number or None, got nan"),
        ({"scale": -math.inf}, "scale must be a finite number or None, got -inf"),
        ({"scale": "1"}, "scale must be a finite number or None, got '1'"),
        ({"scale": True}, "scale must be a finite number or None, got True"),
        ({"scale": torch.ones(2)}, r"scale must be a finite number or None, got \(1.0, 1.0\)"),
        ({"grid": (0, 9, 11)}, r"grid sizes must be positive whole numbers, got \(0, 9, 11\)"),
        ({"grid": (2.0, 9, 11)}, r"grid sizes must be positive whole numbers, got \(2.0, 9, 11\)"),
        ({"grid": (True, 18, 11)}, r"grid sizes must be positive whole numbers, got \(True, 18, 11\)"),
        ({"grid": (2, 9, None)}, r"grid sizes must be positive whole numbers, got \(2, 9, None\)"),
        ({"grid": (2, 99)}, r"grid must be \(frames, height, width\), got \(2, 99\)"),
        ({"grid": np.zeros((30, 30))}, r"grid must be \(frames, height, width\), got array"),
        ({"grid": None}, r"grid must be \(frames, height, width\), got None"),
        ({"grid": 198}, r"grid must be \(frames, height, width\), got 198"),
        ({"lead": 3}, "lead must be between 0 and the 2 text tokens, got 3"),
        ({"lead": -1}, "lead must be between 0 and the 2 text tokens, got -1"),
        ({"lead": 1.0}, "lead must be a whole number, got 1.0"),
        ({"lead": None}, "lead must be a whole number, got None"),
        ({"lead": True}, "lead must be a whole number, got True"),
        ({"config": "0.8"}, "config must be a DraftAttentionConfig, a sparsity or a dict"),
        ({"config": Budget(0.5, heads=(1.0, 1.0, 1.0))}, r"budget weights heads must have shape \(2,\) for this model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("gradient", [False, True])
def test_arguments_that_cannot_be_are_named_in_one_line(given, message, gradient):
    q, k, v = FITS
    with pytest.raises(UserError, match=message) as error:
        draftdiff.draft_attention(q.clone().requires_grad_(gradient), k, v, **{"grid": GRID, "lead": 2, **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"grid": [2, 9, 11]},
        {"grid": np.array([2, 9, 11])},
        {"grid": torch.Size([2, 9, 11])},
        {"lead": np.int64(2)},
        {"lead": torch.tensor(2)},
        {"scale": np.float64(32**-0.5)},
        {"scale": None},
        {"config": 0.75},
        {"config": {"sparsity": 0.75}},
        {"config": np.float64(0.75)},
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient", [False, True])
def test_what_stands_for_an_argument_is_taken(given, gradient):
    q, k, v = FITS
    expected = draftdiff.draft_attention(q, k, v, grid=GRID, lead=2)
    found = draftdiff.draft_attention(q.clone().requires_grad_(gradient), k, v, **{"grid": GRID, "lead": 2, **given})
    assert torch.equal(found.detach(), expected)
