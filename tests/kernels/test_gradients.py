"""Gradients of the backends that have them, against attention written out densely in fp64."""

from dataclasses import replace

import pytest
import torch

from draftdiff.core.draft import Tail
from draftdiff.kernels.block_sparse import BACKENDS, backend_module, block_sparse_attention_lse
from tests.kernels.cases import EMPTY_ROW, SMALL, make
from tests.oracle import attention_of

GRADED = ["reference", "torch"]  # and flex, to which PyTorch gives a backward pass on a GPU only


def test_the_backends_with_gradients_are_those_of_plain_torch():
    assert [name for name in BACKENDS if backend_module(name).differentiable] == [*GRADED, "flex"]


def gradients(attend, problem, dtype):
    """Gradients to q, k, v and the tail's means of one sum over output and log-sum-exp."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    means = [x.detach().requires_grad_() for x in (problem.tail.k_mean, problem.tail.v_mean)]
    out, lse = attend(replace(problem, **dict(zip("qkv", leaves)), tail=Tail(*means)))
    generator = torch.Generator().manual_seed(1)
    weight, lse_weight = (torch.randn(x.shape, generator=generator) for x in (out, lse))
    return torch.autograd.grad((out * weight).sum() + (lse * lse_weight).sum(), leaves + means)


def dense(problem):
    expected = attention_of(problem)
    return expected.out.transpose(1, 2), expected.lse.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", GRADED)
def test_gradients_reach_q_k_v_and_the_tail(backend, dtype):
    problem = make(SMALL, 16, dtype, True)
    expected = gradients(dense, problem, torch.float64)
    found = gradients(lambda p: block_sparse_attention_lse(p, backend=backend), problem, dtype)
    for got, want in zip(found, expected):
        # Summed over hundreds of terms of the gradient's own size.
        bound = 16 * torch.finfo(dtype).eps * want.abs().amax()
        assert float(want.abs().max()) > 0 and float((got.double() - want).abs().max()) <= bound


@pytest.mark.parametrize("backend", GRADED)
def test_rows_that_read_nothing_have_no_gradient_and_spoil_none(backend):
    problem = make(EMPTY_ROW, 16, torch.float32, False)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, _ = block_sparse_attention_lse(problem, backend=backend)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not gradients[0][:, problem.tiling.slots[1]].any()
