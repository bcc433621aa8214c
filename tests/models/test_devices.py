"""Devices and dtypes are found by one rule each."""

from types import SimpleNamespace

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.models.devices import about, device_name, devices, dtype_named, find_device, find_dtype, versions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "device", "embedded", "expected"),
    [
        (None, CPU, False, torch.float32),
        (None, GPU, False, torch.bfloat16),
        (None, GPU, True, torch.float32),
        ("float16", CPU, False, torch.float16),
        ("bfloat16", GPU, True, torch.bfloat16),
        ("bf16", CPU, False, torch.bfloat16),
    ],
)
def test_the_dtype_is_that_asked_for_or_suits_the_device(name, device, embedded, expected):
    assert find_dtype(name, device, embedded=embedded) is expected


def test_what_is_not_there_is_named_with_what_is_allowed():
    with pytest.raises(UserError, match=r"^dtype must be one of float32, float16, bfloat16, got 'int8'$"):
        dtype_named("int8")
    for name in ("abacus", "meta"):
        with pytest.raises(UserError, match=f"^device '{name}' cannot be used: "):
            find_device(name)
    assert find_device("cpu") == CPU


def test_accelerators_of_every_kind_are_found(monkeypatch):
    for kind, count in (("cuda", 2), ("xpu", 1), ("mps", 0)):
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda count=count: count)
    found = devices()
    assert [device for device in found if device.type != "npu"] == [
        CPU,
        torch.device("cuda", 0),
        torch.device("cuda", 1),
        torch.device("xpu", 0),
    ]
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _device: "an Arc")
    assert device_name(torch.device("xpu", 0)) == "an Arc"
    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace())
    assert device_name(torch.device("mps")) == "mps"


def test_a_report_says_where_and_with_what_it_ran():
    told = about(CPU, torch.bfloat16, "draftdiff compare")
    assert told["dtype"] == "bfloat16" and told["command"] == "draftdiff compare"
    assert told["device"] == device_name(CPU) and told["versions"] == versions()
    assert told["versions"]["torch"] == torch.__version__
