"""The sampled rows that kernels are held against, against attention written out key by key."""

import pytest
import torch

from draftdiff.kernels.sampled import attention_of, some_rows
from tests.kernels.cases import KERNEL_CASES, make
from tests.oracle import attention_row
from tests.rounding import rounded


@pytest.mark.parametrize("tail", [False, True], ids=["drop", "tail"])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_sampled_rows_are_attention_written_out(case, tail):
    problem = make(case, 32, torch.float32, tail)
    rows, heads = some_rows(problem, 6)
    assert {0, problem.q.shape[1] - 1} <= set(rows.tolist()) and heads.tolist()[-1] == problem.q.shape[2] - 1
    mask = None if problem.text_mask is None else problem.text_mask[0]
    expected = torch.empty(len(rows), len(heads), problem.q.shape[-1])
    for i, row in enumerate(rows.tolist()):
        for j, head in enumerate(heads.tolist()):
            one = (x[0, :, head] for x in (problem.q, problem.k, problem.v))
            singles = None if problem.tokens is None else problem.tokens[0, head]
            given = (problem.keep[0, head], problem.tiling, row, tail, mask, singles)
            expected[i, j] = attention_row(*one, *given)[0].nan_to_num()
    rounded(lambda: attention_of(problem, rows, heads)).check(expected)
