"""Every backend against attention in fp64, and that against attention written out; what is refused, and by whom."""

import math
from dataclasses import replace

import pytest
import torch

from draftdiff.core.draft import Tail
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.kernels.block_sparse import (
    BACKENDS,
    backend_module,
    block_sparse_attention,
    block_sparse_attention_lse,
    preferred_on,
    resolve,
    unavailable,
)
from draftdiff.kernels.problem import Problem
from tests.kernels.cases import KERNEL_CASES, KernelCase, assert_attends, make
from tests.oracle import attention_of, attention_row

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
cases = pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
PADDED = KERNEL_CASES[3]
SMALL = KernelCase("few ragged tiles, text last with padding", (2, 5, 9), (2, 4, 8), 64, text=77, padded=True)


@pytest.fixture
def run(request, backend):
    """Output and log-sum-exp of a problem by the backend of the test; skips where it cannot serve."""
    if backend == "triton":
        request.getfixturevalue("triton_interpreter")

    def call(problem):
        reason = unavailable(backend, CPU, problem.q.dtype, problem.q.shape[-1])
        if reason:
            pytest.skip(f"{backend} {reason}")
        return block_sparse_attention_lse(problem, backend=backend)

    return call


@cases
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
def test_the_oracle_is_attention_written_out(case, with_tail):
    problem = make(case, 16, torch.float32, with_tail)
    expected = attention_of(problem)
    for row in torch.linspace(0, problem.tiling.tokens - 1, 9).long().tolist():
        for b, h in ((0, 1), (1, 0)):
            valid = None if problem.text_mask is None else problem.text_mask[b]
            q, k, v = (x[b, :, h] for x in (problem.q, problem.k, problem.v))
            out, lse = attention_row(q, k, v, problem.keep[b, h], problem.tiling, row, with_tail, valid)
            # The tail's means are fp32 in a problem, fp64 in the row.
            tolerance = {"atol": 1e-5 if with_tail else 1e-12, "rtol": 0}
            torch.testing.assert_close(expected.out[b, h, row], out, **tolerance)
            torch.testing.assert_close(expected.lse[b, h, row], lse, **tolerance)


# Every case in fp32 at head_dim 64; the hardest one in every type and size.
SIZES = [(case, 64, torch.float32) for case in KERNEL_CASES]
SIZES += [(PADDED, d, t) for d in (64, 96, 128) for t in DTYPES if (d, t) != (64, torch.float32)]


@pytest.mark.parametrize(("case", "head_dim", "dtype"), SIZES, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
@every_backend
def test_it_is_attention_up_to_rounding(run, head_dim, dtype, with_tail, case):
    problem = make(case, head_dim, dtype, with_tail)
    assert_attends(*run(problem), problem)


@every_backend
def test_without_a_log_sum_exp_the_output_is_the_same(run, backend):
    problem = make(SMALL, 64, torch.float32, True)
    assert torch.equal(run(problem)[0], block_sparse_attention(problem, backend=backend))


@pytest.mark.parametrize("scale", [0.0, -0.1, 30.0, 200.0])
@every_backend
def test_any_scale_is_honoured(run, scale):
    problem = replace(make(SMALL, 64, torch.float32, True), scale=scale)
    assert_attends(*run(problem), problem)


@every_backend
def test_a_row_that_may_read_nothing_gives_zero(run):
    """One that keeps no tile, and one that keeps a tile of nothing but padding."""
    problem = make(SMALL, 64, torch.float32, False)
    text_mask = problem.text_mask.clone()
    text_mask[0, 64:] = False  # the second tile of text
    keep = problem.keep.clone()
    keep[:, :, 1] = False
    keep[:, :, 2] = False
    keep[:, :, 2, -1] = True
    problem = replace(problem, keep=keep, text_mask=text_mask)
    out, lse = run(problem)
    for tile, empty in ((1, (0, 1)), (2, (0,))):
        tokens = problem.tiling.slots[tile]
        for b in empty:
            assert not out[b, tokens[tokens >= 0]].any()
            assert bool((lse[b, tokens[tokens >= 0]] == -math.inf).all())
    assert_attends(out, lse, problem)


@every_backend
def test_nothing_kept_at_all_gives_zeros(run):
    problem = make(SMALL, 64, torch.float32, False)
    out, lse = run(replace(problem, keep=torch.zeros_like(problem.keep)))
    assert not out.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
@every_backend
def test_a_nan_that_is_read_comes_through(run, where, with_tail):
    problem = make(SMALL, 64, torch.float32, with_tail)
    tiling, token = problem.tiling, 7
    poisoned = getattr(problem, where).clone()
    poisoned[0, token, 1] = math.nan
    out, lse = run(replace(problem, **{where: poisoned}))
    tile = int((tiling.slots == token).any(1).nonzero())
    if where == "q":
        rows = torch.tensor([token])
    else:
        readers = tiling.slots[problem.keep[0, 1, :, tile]]
        rows = readers[readers >= 0]
    assert bool(out[0, rows, 1].isnan().all())
    assert where == "v" or bool(lse[0, rows, 1].isnan().all())
    assert not bool(out[1].isnan().any()), "the other sample of the batch"
    assert not bool(out[:, :, 0].isnan().any()), "the other head"


@every_backend
def test_every_query_may_be_nan(run):
    problem = make(SMALL, 64, torch.float32, True)
    out, lse = run(replace(problem, q=torch.full_like(problem.q, math.nan)))
    assert bool(out.isnan().all()) and bool(lse.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_a_surrounding_autocast_changes_nothing(run, dtype):
    problem = make(SMALL, 64, dtype, True)
    expected = run(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(problem)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(*pair) for pair in zip(found, expected))


GRADED = ["reference", "torch"]  # and flex, to which PyTorch gives a backward pass on a GPU only


def test_the_backends_with_gradients_are_those_of_plain_torch():
    assert [name for name in BACKENDS if backend_module(name).differentiable] == [*GRADED, "flex"]


def dense_gradients(problem, weight, lse_weight):
    """Gradients to q, k, v and the tail's means, of attention written out densely in the precision of its tensors."""
    tiling = problem.tiling
    own = torch.empty(tiling.tokens, dtype=torch.long)
    for tile, slots in enumerate(tiling.slots):
        own[slots[slots >= 0]] = tile
    leaves = [x.double().detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    means = [x.double().detach().requires_grad_() for x in (problem.tail.k_mean, problem.tail.v_mean)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    scores = q @ torch.cat([k, means[0]], 2).mT / math.sqrt(q.shape[-1])
    read = problem.keep[:, :, own][..., own].clone()
    text = torch.tensor([t for t in range(tiling.tokens) if t >= tiling.grid.tokens])
    read[..., text] &= problem.text_mask[:, None, None]
    video = tiling.video_tiles
    read = torch.cat([read, ~problem.keep[:, :, own, :video]], -1)
    weights = torch.cat([torch.ones(tiling.tokens), tiling.counts[:video]]).double().log()
    scores = (scores + weights).masked_fill(~read, -math.inf)
    out, lse = scores.softmax(-1) @ torch.cat([v, means[1]], 2), scores.logsumexp(-1)
    total = (out.transpose(1, 2) * weight).sum() + (lse.transpose(1, 2) * lse_weight).sum()
    return torch.autograd.grad(total, leaves + means)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", GRADED)
def test_gradients_reach_q_k_v_and_the_tail(run, dtype):
    problem = make(SMALL, 16, dtype, True)
    weight, lse_weight = torch.randn(problem.q.shape), torch.randn(problem.q.shape[:3])
    expected = dense_gradients(problem, weight, lse_weight)
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    means = [x.detach().requires_grad_() for x in (problem.tail.k_mean, problem.tail.v_mean)]
    out, lse = run(replace(problem, **dict(zip("qkv", leaves)), tail=Tail(*means)))
    found = torch.autograd.grad((out * weight).sum() + (lse * lse_weight).sum(), leaves + means)
    for got, want in zip(found, expected):
        # Summed over hundreds of terms of the gradient's own size.
        bound = 16 * torch.finfo(dtype).eps * want.abs().amax()
        assert float((got.double() - want).abs().max()) <= bound


@pytest.mark.parametrize("backend", GRADED)
def test_rows_that_read_nothing_have_no_gradient_and_spoil_none(run):
    problem = make(KERNEL_CASES[-1], 16, torch.float32, False)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, _ = run(problem)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not gradients[0][:, problem.tiling.slots[1]].any()


def tiny(**changes):
    q = torch.zeros(1, 64, 2, 16)
    tiling = tiling_for(LatentGrid(1, 8, 8), (1, 8, 8), 64)
    parts = {"q": q, "k": q, "v": q, "keep": torch.ones(1, 2, 1, 1, dtype=torch.bool), "tiling": tiling}
    return Problem(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(64, 2, 16)}, r"q must be \[batch, tokens, heads, head_dim\], got \(64, 2, 16\)"),
        ({"k": torch.zeros(1, 64, 2, 8)}, r"q, k and v must have one shape, got \(1, 64, 2, 16\), \(1, 64, 2, 8\), "),
        (
            {"v": torch.zeros(1, 64, 2, 16).half()},
            r"must have one floating dtype, got torch.float32, .*, torch.float16",
        ),
        (dict.fromkeys("qkv", torch.zeros(1, 64, 2, 16, dtype=torch.int32)), "one floating dtype, got torch.int32"),
        (dict.fromkeys("qkv", torch.zeros(1, 65, 2, 16)), "q has 65 tokens, the grid 1x8x8 with 0 text tokens has 64"),
        ({"keep": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, r"keep must be torch.bool \(1, 2, 1, 1\), got torch.bool"),
        ({"keep": torch.ones(1, 2, 1, 1)}, r"keep must be torch.bool \(1, 2, 1, 1\), got torch.float32 \(1, 2, 1, 1\)"),
        ({"text_mask": torch.ones(1, 3, dtype=torch.bool)}, r"text_mask must be torch.bool \(1, 0\), got .* \(1, 3\)"),
        ({"text_mask": torch.ones(1, 0, dtype=torch.int64)}, r"text_mask must be torch.bool .*, got torch.int64"),
        ({"tail": Tail(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 2, 16))}, r"tail.v_mean must be .*\(1, 2, 2, 16\)"),
        ({"tail": Tail(*torch.zeros(2, 1, 2, 1, 16).half())}, "tail.k_mean must be torch.float32 .*got torch.float16"),
    ],
)
def test_parts_that_do_not_fit_are_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        tiny(**changes)
    assert "\n" not in str(refused.value)


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference, torch.*got 'fast'"):
        resolve("fast", CPU, torch.float32, 64)


DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "privateuseone", "meta", "xla", "mtia", "maia", "ipu", "vulkan")


@pytest.mark.parametrize("kind", DEVICES)
def test_every_type_of_device_has_a_backend(kind):
    device = torch.device(kind)
    assert preferred_on(device)[-1] == "torch"
    if kind not in ("cpu", "cuda"):
        assert preferred_on(device) == ["torch"]
        assert resolve("auto", device, torch.float16, 64) == "torch"


class NoDoubles(torch.utils._python_dispatch.TorchDispatchMode):
    """As a device without fp64: whatever makes such a tensor fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(out):
            assert not (isinstance(made, torch.Tensor) and made.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_no_fp64_is_made(run):
    problem = make(SMALL, 64, torch.float32, True)
    with NoDoubles():
        run(problem)
        with pytest.raises(AssertionError):
            problem.q.double()


def test_the_torch_backend_takes_any_device_in_its_stride(monkeypatch):
    """It knows the CPU; every other type goes the way of a GPU, here a CPU that is called otherwise."""
    from draftdiff.kernels import torch_backend

    problem = make(SMALL, 64, torch.float32, True)
    monkeypatch.setattr(torch_backend, "_is_cpu", lambda device: False)
    assert_attends(*block_sparse_attention_lse(problem, backend="torch"), problem)
