"""How far results of one model may differ that were computed in another order: measured, as it depends on the CPU."""

import copy

import torch


@torch.no_grad()
def rounding(model, ids):
    """Four times how far the model's fp32 logits are from fp64 ones, as a share of the largest.

    Each of two orders of summing is off by about as much; the rest is room for the largest of more numbers.
    """
    exact = copy.deepcopy(model).double()(ids).logits
    return 4 * float((model(ids).logits - exact).abs().max() / exact.abs().max())


@torch.no_grad()
def assert_rounded(got, expected, model, ids):
    """That the two differ by no more than rounding makes this model's logits differ."""
    assert got.shape == expected.shape
    far, most = float((got - expected).abs().max()), rounding(model, ids) * float(expected.abs().max())
    assert far <= most, f"{far:.2e} apart, rounding explains {most:.2e}"
