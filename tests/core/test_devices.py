"""Dtypes by the names that people use for them."""

import pytest
import torch

from draftdiff.core.devices import chosen_dtype, dtype_named
from draftdiff.errors import UserError


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        ("float32 fp32 float torch.float32", torch.float32),
        ("float16 fp16 half torch.float16", torch.float16),
        ("bfloat16 bf16 torch.bfloat16", torch.bfloat16),
    ],
)
def test_every_customary_name_is_its_dtype(names, dtype):
    assert {dtype_named(name) for name in names.split()} == {dtype} == {dtype_named(dtype)}
    assert dtype_named(torch.float64) is torch.float64


@pytest.mark.parametrize(
    "name", ["int8", "auto", "", "torch.torch.half", 16, True, torch.int64, torch.complex64, ["half"]]
)
def test_what_is_no_floating_point_dtype_is_named_with_what_is_allowed(name):
    with pytest.raises(UserError, match=r"^key_dtype must be one of float32, float16, bfloat16, got ") as error:
        dtype_named(name, "key_dtype")
    assert str(error.value).endswith(repr(name))


def test_the_new_and_the_old_name_of_the_argument_are_one():
    assert chosen_dtype(None, None) is None
    assert (
        chosen_dtype("half", None) == chosen_dtype(None, "fp16") == chosen_dtype("half", torch.float16) == torch.float16
    )
    with pytest.raises(UserError, match=r"^dtype and torch_dtype are one argument, got half and torch.float32$"):
        chosen_dtype("half", torch.float32)
    with pytest.raises(UserError, match=r"^torch_dtype must be one of .*, got 'int8'$"):
        chosen_dtype(None, "int8")
