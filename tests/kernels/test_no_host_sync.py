"""A sparse call never waits for the GPU: it runs on meta tensors, which have shapes and no values to wait for."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from draftdiff.attention import attend
from draftdiff.attention import rule as rules
from draftdiff.attention.rule import Rule
from draftdiff.core.draft import Tail
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.kernels import drafting, triton_backend, triton_draft, triton_lists, triton_probe
from draftdiff.kernels.problem import Problem

GRID = LatentGrid(3, 20, 40)
META = torch.device("meta")
PROBE = ("_values", "_errors", "_worst", "_sample", "_threshold", "_mark", "_marked", "_pick")


class Recorded:
    """In place of a kernel: notes that it was launched."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched, by name; nothing runs."""
    names: list[str] = []
    for module, name in (
        (triton_backend.triton_attention, "forward"),
        (triton_backend.triton_int8, "forward"),
        (triton_backend.triton_int8, "quantise"),
        (triton_lists, "_compact"),
        (triton_draft, "_pool"),
        (triton_draft, "_cover"),
        (triton_draft, "_threshold"),
        *((triton_probe, name) for name in PROBE),
    ):
        monkeypatch.setattr(module, name, Recorded(name, names))
    monkeypatch.setattr(drafting, "_fused", lambda *args: True)
    monkeypatch.setattr(triton_backend, "TensorDescriptor", lambda *args: args)
    monkeypatch.setattr(
        triton_backend, "interleave", lambda x: triton_backend.Interleave(1, x.stride(0), 128, 1, 0, 64)
    )
    yield names
    triton_lists.tables_for.cache_clear()  # holds tensors without values now


def without_values(tiling):
    tensors = ("order", "restore", "counts", "slots")
    return dataclasses.replace(tiling, device=META, **{name: getattr(tiling, name).to(META) for name in tensors})


@pytest.mark.parametrize("text", [0, 77])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tail", [False, True], ids=["drop", "tail"])
def test_draft_selection_lists_and_kernel_read_no_value_on_the_host(monkeypatch, launched, text, masked, tail):
    tiling = without_values(tiling_for(GRID, (1, 8, 16), 128, text))
    monkeypatch.setattr(rules, "tiling_for", lambda *args: tiling)
    q, k, v = torch.empty(3, 1, GRID.tokens + text, 2, 64, dtype=torch.bfloat16, device=META)
    density = torch.empty(2, dtype=torch.float64, device=META)
    text_mask = torch.empty(1, text, dtype=torch.bool, device=META) if masked and text else None
    rule = Rule(backend="triton", tail=tail)
    out, stats = attend.attend(q, k, v, density, rule, grid=GRID, text_mask=text_mask)
    assert out.shape == q.shape and out.is_meta and stats.is_meta
    assert launched == ["_pool"] * (3 if tail else 2) + ["_cover", "_threshold", "_compact", "forward"]


def test_single_tokens_are_listed_without_a_value_read_on_the_host(launched):
    tiling = without_values(tiling_for(GRID, (1, 8, 16), 128, 77))
    q, k, v = torch.empty(3, 1, tiling.tokens, 2, 64, dtype=torch.bfloat16, device=META)
    keep = torch.empty(1, 2, tiling.tiles, tiling.tiles, dtype=torch.bool, device=META)
    tokens = torch.empty(1, 2, tiling.video_tiles, 200, dtype=torch.int32, device=META)
    triton_backend.run(Problem(q, k, v, keep, tiling, tokens=tokens), want_lse=False)
    assert launched == ["_compact", "forward"]


@pytest.mark.parametrize(
    ("most", "ranked"), [(8192, ["_pick"]), (512, ["_threshold", "_mark", "_marked"])], ids=["all", "sampled"]
)
def test_the_probe_and_its_single_tokens_read_no_value_on_the_host(monkeypatch, launched, most, ranked):
    monkeypatch.setattr(triton_probe, "MOST", most)
    tiling = without_values(tiling_for(GRID, (1, 8, 16), 128, 77))
    monkeypatch.setattr(rules, "tiling_for", lambda *args: tiling)
    q, k, v = torch.empty(3, 1, GRID.tokens + 77, 2, 64, dtype=torch.bfloat16, device=META)
    density = torch.empty(2, dtype=torch.float64, device=META)
    out, stats = attend.attend(q, k, v, density, Rule(selection="error", single=64, backend="triton"), grid=GRID)
    assert out.is_meta and stats.is_meta
    found = ["_values", "_errors", "_worst", "_values", "_sample", *ranked]
    assert launched[3 : 3 + len(found)] == found


def test_8_bits_take_one_launch_more_and_read_no_value_on_the_host(launched):
    tiling = without_values(tiling_for(GRID, (1, 8, 16), 128, 77))
    q, k, v = torch.empty(3, 1, tiling.tokens, 2, 64, dtype=torch.bfloat16, device=META)
    keep = torch.empty(1, 2, tiling.tiles, tiling.tiles, dtype=torch.bool, device=META)
    tail = Tail(*torch.empty(2, 1, 2, tiling.video_tiles, 64, device=META))
    triton_backend.run(Problem(q, k, v, keep, tiling, tail=tail, precision="int8"), want_lse=False)
    assert launched == ["quantise", "_compact", "forward"]


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero()])
def test_a_value_read_on_the_host_would_be_noticed(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty(3, device=META))
