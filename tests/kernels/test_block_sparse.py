"""Every backend against attention in fp64, and that against attention written out; what is refused, and by whom."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from draftdiff.core.draft import Tail, pool
from draftdiff.kernels.block_sparse import (
    BACKENDS,
    block_sparse_attention,
    block_sparse_attention_lse,
    preferred_on,
    resolve,
    unavailable,
)
from tests.kernels.cases import KERNEL_CASES, SMALL, assert_attends, make
from tests.oracle import attention_of, attention_row, reads

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
cases = pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


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
            singles = None if problem.tokens is None else problem.tokens[b, h]
            out, lse = attention_row(q, k, v, problem.keep[b, h], problem.tiling, row, with_tail, valid, singles)
            # Both are fp64, but for the tail's means: they are fp32 in a problem.
            times = 1 if with_tail else torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            assert ((expected.out[b, h, row] - out).abs() <= times * expected.out_bound[b, h, row]).all()
            assert lse == expected.lse[b, h, row] or (
                (expected.lse[b, h, row] - lse).abs() <= times * expected.lse_bound[b, h, row]
            )


# Every case in fp32 at head_dim 64; a small one that has all of it in every type and size.
SIZES = [(case, 64, torch.float32) for case in KERNEL_CASES]
SIZES += [(SMALL, d, t) for d in (64, 96, 128) for t in DTYPES]


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


# Both ends of the video and of the text, and padding; two are enough for Triton's interpreter.
POISONED = [(name, t) for name in BACKENDS for t in ((90, 166) if name == "triton" else (0, 7, 89, 90, 166))]


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
@pytest.mark.parametrize(("backend", "token"), POISONED)
def test_a_nan_comes_through_where_it_is_read_and_nowhere_else(run, backend, where, with_tail, token):
    problem = make(SMALL, 64, torch.float16 if backend == "triton" else torch.float32, False)  # by descriptors
    poisoned = getattr(problem, where).clone()
    poisoned[0, token, 1, 3] = math.nan
    problem = replace(problem, **{where: poisoned})
    if with_tail:
        problem = replace(problem, tail=Tail(pool(problem.k, problem.tiling), pool(problem.v, problem.tiling)))
    out, lse = run(problem)
    expected = torch.zeros_like(out, dtype=torch.bool)
    if where == "q":
        expected[0, token, 1] = True
    elif where == "k":
        expected[0, :, 1] = reads(problem)[0, 1, :, token, None]
    else:
        expected[0, :, 1, 3] = reads(problem)[0, 1, :, token]
    found = out.isnan()
    if (backend, where) == ("flex", "v"):  # unfused: within the feature it spreads over the head
        assert bool((found | ~expected).all())
        found[0, :, 1, 3] = expected[0, :, 1, 3]
    assert torch.equal(found, expected)
    assert torch.equal(lse.isnan(), expected.all(-1))


@every_backend
def test_an_infinite_score_counts_as_in_dense_attention(run):
    """-inf has no weight, +inf leaves nothing but NaN."""
    problem = replace(make(SMALL, 64, torch.float32, False), text_mask=None)
    problem = replace(problem, q=problem.q.abs(), keep=torch.ones_like(problem.keep))
    for value in (-math.inf, math.inf):
        k = problem.k.clone()
        k[0, 3, 1, 5] = value
        out, _ = run(replace(problem, k=k))
        q, v = (x.transpose(1, 2) for x in (problem.q, problem.v))
        dense = F.scaled_dot_product_attention(q, k.transpose(1, 2), v).transpose(1, 2)
        assert torch.equal(out.isnan(), dense.isnan()) and bool(dense.isnan().any()) == (value > 0)
        assert not bool((out - dense).abs().nan_to_num(0.0).max() > 1e-5)


@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
@every_backend
def test_what_stands_in_padding_is_never_read(run, with_tail):
    problem = make(SMALL, 64, torch.float32, with_tail)
    expected = run(problem)
    absent = ~F.pad(problem.text_mask, (problem.tiling.grid.tokens, 0), value=True)
    poisoned = {name: getattr(problem, name).masked_fill(absent[:, :, None, None], math.nan) for name in "kv"}
    for found, clean in zip(run(replace(problem, **poisoned)), expected):
        assert torch.equal(found, clean)


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
