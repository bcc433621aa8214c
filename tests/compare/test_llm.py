"""What is compared between decoding methods whose texts end at different lengths."""

import pytest
import torch

from draftdiff.compare.llm import LlmComparison, MethodResult
from draftdiff.models.llm_methods import Run


def comparison(*texts: list[int]) -> LlmComparison:
    """Plain decoding and chains that wrote these tokens, at a second each."""
    results = [
        MethodResult(name, [Run(torch.tensor(text), 0.0, 8)], [float(len(text))] * 2, [len(text)] * 2)
        for name, text in zip(["plain", *["chain"] * len(texts)], texts)
    ]
    return LlmComparison("tiny", [torch.zeros(1, 4, dtype=torch.long)], 4, {"do_sample": False}, results)


def test_a_method_that_stops_early_is_not_faster_for_it():
    _, shorter, longer = comparison([1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5, 6]).rows()
    assert shorter["speedup"]["median"] == longer["speedup"]["median"] == 1
    assert shorter["milliseconds"]["median"] == longer["milliseconds"]["median"] == 1000


def test_tokens_beyond_plains_are_another_text():
    rows = comparison([1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2], [1, 7, 3]).rows()
    assert [row["same_text"] for row in rows[1:]] == [1, 0.5, pytest.approx(2 / 3), pytest.approx(1 / 3)]
