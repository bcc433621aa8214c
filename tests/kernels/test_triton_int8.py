"""`precision="int8"`: Triton's 8-bit kernel in the interpreter, and who refuses it."""

import math
from dataclasses import replace

import pytest
import torch

from draftdiff.attention.rule import Rule, unpack
from draftdiff.core.draft import Tail, pool
from draftdiff.kernels.block_sparse import BACKENDS, block_sparse_attention, block_sparse_attention_lse, resolve
from draftdiff.kernels.triton_configs import CONFIGS, Config
from tests.kernels.cases import KERNEL_CASES, SMALL, KernelCase, assert_attends, make
from tests.oracle import attention_of, reads

CPU = torch.device("cpu")


@pytest.fixture
def run(triton_interpreter):
    return lambda problem: block_sparse_attention_lse(replace(problem, precision="int8"), backend="triton")


def check(found, problem):
    assert_attends(*found, replace(problem, precision="int8"))


def with_outliers(problem):
    """Two channels of every key far from zero, as in rotary models; the tail's means are those of the new keys."""
    k = problem.k.clone()
    k[..., 3] += 30
    k[..., 17] -= 50
    means = problem.tail and replace(problem.tail, k_mean=pool(k, problem.tiling))
    return replace(problem, k=k, tail=means)


# Each case with the tail or without it, in turn.
@pytest.mark.parametrize(("case", "tail"), [(case, i % 2 == 1) for i, case in enumerate(KERNEL_CASES)], ids=str)
def test_it_is_attention_up_to_8_bits(run, case, tail):
    problem = make(replace(case, batch=1 if not case.padded else case.batch), 64, torch.float16, tail)
    check(run(problem), problem)


SIZES = [(96, 64, torch.bfloat16), (128, 128, torch.bfloat16), (16, 64, torch.float32)]


@pytest.mark.parametrize(("head_dim", "block", "dtype"), SIZES)
def test_head_sizes_tile_sizes_and_types(run, head_dim, block, dtype):
    tile = (1, 8, 16) if block == 128 else (2, 4, 8)
    case = KernelCase("few boxes", (2, 9, 17), tile, block, text=20, batch=1, heads=1, singles=20)
    problem = make(case, head_dim, dtype, True)
    check(run(problem), problem)


OUTLIERS = KernelCase("all parts", (2, 9, 10), (1, 8, 8), 64, text=7, lead=3, batch=1, heads=1, singles=20, density=0.4)


def test_channels_far_from_zero_cost_nothing_since_the_mean_key_is_taken_off(run, monkeypatch):
    problem = with_outliers(make(OUTLIERS, 64, torch.float16, True))
    check(run(problem), problem)
    from draftdiff.kernels import triton_int8

    mean_key = triton_int8.mean_key
    monkeypatch.setattr(triton_int8, "mean_key", lambda *args: torch.zeros_like(mean_key(*args)))
    with pytest.raises(AssertionError, match="times what rounding allows"):
        check(run(problem), problem)


def test_the_bound_is_a_part_of_the_output():
    expected = attention_of(replace(make(OUTLIERS, 64, torch.float16, True), precision="int8"))
    assert float(expected.out_bound.mean() / expected.out.abs().mean()) < 0.25


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.0])
def test_any_scale_is_honoured(run, scale):
    problem = replace(make(SMALL, 64, torch.float16, True), scale=scale)
    check(run(problem), problem)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size_keep_their_precision(run, size):
    problem = make(SMALL, 64, torch.bfloat16, False)
    plain = run(problem)[0].float()
    scaled = run(replace(problem, v=problem.v * size))[0].float() / size
    assert float((scaled - plain).abs().max()) <= 0.02 * float(plain.abs().max())


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("token", [89, 166])  # of the video, of the text
def test_a_nan_comes_through_where_it_is_read_and_nowhere_else(run, where, token):
    problem = make(SMALL, 64, torch.float16, False)
    poisoned = getattr(problem, where).clone()
    poisoned[0, token, 1, 3] = math.nan
    problem = replace(problem, **{where: poisoned})
    problem = replace(problem, tail=Tail(pool(problem.k, problem.tiling), pool(problem.v, problem.tiling)))
    out, lse = run(problem)
    expected = torch.zeros_like(out, dtype=torch.bool)
    if where == "q":
        expected[0, token, 1] = True
    elif where == "k":
        expected[0, :, 1] = reads(problem)[0, 1, :, token, None]
    else:
        expected[0, :, 1, 3] = reads(problem)[0, 1, :, token]
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(lse.isnan(), expected.all(-1))


def test_what_stands_in_padding_is_never_read(run):
    problem = make(SMALL, 64, torch.float16, True)
    expected = run(problem)
    absent = ~torch.nn.functional.pad(problem.text_mask, (problem.tiling.grid.tokens, 0), value=True)
    poisoned = {name: getattr(problem, name).masked_fill(absent[:, :, None, None], math.nan) for name in "kv"}
    for found, clean in zip(run(replace(problem, **poisoned)), expected):
        assert torch.equal(found, clean)


def test_without_a_log_sum_exp_the_output_is_the_same(run):
    problem = make(SMALL, 64, torch.float16, True)
    again = block_sparse_attention(replace(problem, precision="int8"), backend="triton")
    assert torch.equal(run(problem)[0], again)


def test_every_number_of_keys_per_step_fits_the_range_of_fp16():
    """A step's sum of weights up to 2^8 and values up to 1."""
    from draftdiff.kernels import triton_int8

    most = max(config.keys for table in CONFIGS["int8"].values() for config in table)
    assert most * 2**triton_int8.UP.value < torch.finfo(torch.float16).max
    assert all(isinstance(config, Config) for t in CONFIGS["int8"].values() for config in t)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_a_backend_without_it_refuses_in_one_line(backend):
    problem = replace(make(SMALL, 64, torch.float32, False), precision="int8")
    with pytest.raises(ValueError, match="takes precision full, not 'int8'") as error:
        block_sparse_attention(problem, backend=backend)
    assert "\n" not in str(error.value) and repr(backend) in str(error.value)


def test_auto_finds_who_can_or_says_why_none_does():
    with pytest.raises(ValueError, match=r"no backend serves cpu, .* takes precision full, not 'int8'") as error:
        resolve("auto", CPU, torch.float32, 64, "int8")
    assert "\n" not in str(error.value)


def test_gradients_are_those_of_full_precision():
    """The backward pass is the `torch` backend's, which has no other."""
    from draftdiff.attention.attend import attend_backward, packed_places
    from draftdiff.core.grid import LatentGrid

    grid = LatentGrid(2, 8, 16)
    q, k, v, of_out = torch.randn(4, 1, grid.tokens, 1, 32)
    density = torch.full((1,), 0.5, dtype=torch.float64)
    given = (of_out, q, k, v, density, None, packed_places(grid.shape), None)
    rules = [Rule(backend="triton", precision=precision) for precision in ("full", "int8")]
    assert unpack(rules[1].packed) == rules[1]
    full, int8 = (attend_backward(*given, rule.packed) for rule in rules)
    assert all(torch.equal(a, b) for a, b in zip(full, int8))
