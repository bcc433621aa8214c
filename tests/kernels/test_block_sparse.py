"""Every backend against the reference, and the reference against attention written out."""

import pytest
import torch

from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import BlockMask
from draftdiff.kernels.block_sparse import BACKENDS, block_sparse_attention, resolve, unavailable
from tests.kernels.cases import KERNEL_CASES, make
from tests.oracle import attention_row

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
cases = pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)


@cases
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
def test_reference_equals_attention_written_out(case, with_tail):
    q, k, v, mask, tiling, text_mask, tail = make(case, 16, torch.float32, with_tail)
    out, lse = block_sparse_attention(
        q, k, v, mask, tiling=tiling, text_mask=text_mask, tail=tail, backend="reference", return_lse=True
    )
    for row in torch.linspace(0, tiling.tokens - 1, 9).long().tolist():
        for b, h in ((0, 1), (1, 0)):
            valid = None if text_mask is None else text_mask[b]
            args = (q[b, :, h], k[b, :, h], v[b, :, h], mask.keep[b, h], tiling, row, with_tail, valid)
            expected, expected_lse = attention_row(*args)
            torch.testing.assert_close(out[b, row, h].double(), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[b, row, h].double(), expected_lse, atol=1e-5, rtol=1e-5)


# Every case in fp32 at head_dim 64; the hardest one in every type and size.
SIZES = [(case, 64, torch.float32) for case in KERNEL_CASES]
SIZES += [(KERNEL_CASES[3], d, t) for d in (64, 96, 128) for t in TOLERANCE if (d, t) != (64, torch.float32)]


@pytest.mark.parametrize(("case", "head_dim", "dtype"), SIZES, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("with_tail", [False, True], ids=["drop", "tail"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backend_equals_the_reference(backend, head_dim, dtype, with_tail, case, request):
    if backend == "triton":
        request.getfixturevalue("triton_interpreter")
    reason = unavailable(backend, torch.device("cpu"), dtype, head_dim)
    if reason:
        pytest.skip(f"{backend} {reason}")
    q, k, v, mask, tiling, text_mask, tail = make(case, head_dim, dtype, with_tail)
    call = {"tiling": tiling, "text_mask": text_mask, "tail": tail, "return_lse": True}
    expected, expected_lse = block_sparse_attention(q.float(), k.float(), v.float(), mask, backend="reference", **call)
    out, lse = block_sparse_attention(q, k, v, mask, backend=backend, **call)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_full_mask_is_dense_attention():
    q, k, v, mask, tiling, text_mask, _ = make(KERNEL_CASES[3], 64, torch.float32, False)
    full = BlockMask(torch.ones_like(mask.keep))
    keys = torch.cat([torch.ones(2, tiling.grid.tokens, dtype=torch.bool), text_mask], dim=1)[:, None, None]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=keys).transpose(1, 2)
    out = block_sparse_attention(q, k, v, full, tiling=tiling, text_mask=text_mask, backend="torch")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    tiling = tiling_for(LatentGrid(1, 8, 8), (1, 8, 8), 64)
    q = torch.zeros(1, 65, 2, 16)
    mask = BlockMask(torch.ones(1, 2, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="q has 65 tokens, the grid 1x8x8"):
        block_sparse_attention(q, q, q, mask, tiling=tiling)
    with pytest.raises(ValueError, match="mask must be"):
        block_sparse_attention(q[:, :64, :1], q[:, :64, :1], q[:, :64, :1], mask, tiling=tiling)


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference, torch.*got 'fast'"):
        resolve("fast", torch.device("cpu"), torch.float32, 64)
