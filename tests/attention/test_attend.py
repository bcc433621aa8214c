"""The method as one function: against dense attention, with gradients, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.attention.attend import attend, attend_op, compute_dtype
from draftdiff.attention.rule import Rule
from draftdiff.core.grid import LatentGrid

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
    call = (q, k, v, half(), None, [2, 9, 11], 0, None, Rule(backend="torch").packed)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]), "q, k and v must have the same batch, heads and head_dim, got"),
        (lambda q, k, v: (q, k, v[..., :16]), "q, k and v must have the same batch, heads and head_dim, got"),
        (lambda q, k, v: (q[:, :50], k[:, :50], v[:, :50]), "k has 50 tokens, fewer than the 198 of the grid 2x9x11"),
        (lambda q, k, v: (q[:, :199], k, v), "q has 199 tokens, needs the grid's 198 or all 200 of k"),
        (lambda q, k, v: (q, k.half(), v), "q, k and v must have one floating dtype, got"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(change, message):
    parts = change(*made(GRID.tokens + 2))
    with pytest.raises(ValueError, match=message) as error:
        draftdiff.draft_attention(*parts, grid=GRID, lead=2)
    assert "\n" not in str(error.value)


def test_a_text_mask_of_numbers_is_refused():
    q, k, v = made(GRID.tokens + 2)
    with pytest.raises(ValueError, match=r"text_mask must be torch\.bool"):
        draftdiff.draft_attention(q, k, v, grid=GRID, text_mask=torch.ones(2, 2, dtype=torch.int64))
