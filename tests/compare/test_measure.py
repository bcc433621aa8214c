"""Peak memory and operations of a call are those that it really had."""

import pytest
import torch
import torch.nn.functional as F

from draftdiff.compare.measure import count_flops, peak_memory

CPU = torch.device("cpu")


def test_operations_of_products_convolutions_and_attention_are_counted():
    x = torch.randn(2, 4, 8, 16)
    keys = torch.randn(2, 4, 24, 16)
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(x, keys, keys))[1] == 2 * 2 * (2 * 4) * 8 * 24 * 16
        assert count_flops(lambda: F.linear(x, torch.randn(5, 16)))[1] == 2 * x.numel() * 5
        image, kernel = torch.randn(1, 3, 8, 8), torch.randn(6, 3, 3, 3)
        assert count_flops(lambda: F.conv2d(image, kernel, padding=1))[1] == 2 * 6 * 64 * 27


def test_the_peak_is_what_a_call_takes_though_it_gives_it_back():
    size = 40_000_000
    result, peak = peak_memory(lambda: float(torch.ones(size // 4).sum()), CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert result == size // 4
    assert 0.9 * size < peak < 1.6 * size
    again = peak_memory(lambda: float(torch.ones(size // 4).sum()), CPU)[1]
    assert 0.9 * size < again < 1.6 * size
