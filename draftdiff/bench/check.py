"""Whether every backend and every draft kernel that can run on a device is right there: before anything is timed.

Attention by each backend, with all that a call may hold, against the `reference` in fp32; pooling, errors and single
tokens against `core` in PyTorch.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from draftdiff.bench.kernels import TOLERANCE
from draftdiff.bench.runner import Routine
from draftdiff.compare.table import Column, text_table
from draftdiff.core import draft, probe
from draftdiff.core.draft import Tail
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import with_text
from draftdiff.errors import UserError
from draftdiff.kernels import drafting
from draftdiff.kernels.autotune import DoesNotCompile
from draftdiff.kernels.block_sparse import BACKENDS, block_sparse_attention_lse, unavailable
from draftdiff.kernels.problem import Problem
from draftdiff.kernels.sampled import attention_of, some_rows


@dataclass(frozen=True)
class Case:
    """singles: tokens that a query tile reads besides.  padded: half of the text is padding.  large: too much for the
    `reference`, so that sampled rows are checked, and on a GPU alone."""

    about: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    block_size: int
    head_dim: int
    text: int = 0
    lead: int = 0
    padded: bool = False
    tail: bool = True
    singles: int = 0
    large: bool = False


CASES = (
    Case("whole tiles, head_dim 128", (4, 16, 32), (2, 8, 8), 128, 128),
    Case("whole tiles, head_dim 64", (4, 16, 32), (2, 8, 8), 128, 64),
    Case("blocks of 64", (4, 16, 24), (4, 4, 4), 64, 128),
    Case("no tail", (4, 16, 24), (4, 4, 4), 64, 64, tail=False),
    Case("a grid that no axis divides", (5, 13, 21), (2, 8, 8), 128, 128),
    Case("text around, padded", (3, 9, 22), (2, 4, 8), 64, 64, text=150, lead=70, padded=True),
    Case("single tokens", (5, 13, 21), (2, 8, 8), 128, 128, singles=100),
    Case("single tokens, text, no tail", (3, 9, 22), (2, 4, 8), 64, 64, text=77, tail=False, singles=33),
    Case("all at once, head_dim 96", (5, 13, 21), (2, 8, 8), 128, 96, text=77, lead=77, padded=True, singles=64),
    Case("many tiles", (21, 30, 52), (2, 8, 8), 128, 128, large=True),
    Case("single tokens among many", (21, 30, 52), (2, 8, 8), 128, 64, text=77, singles=400, large=True),
    Case("many tiles, no tail, head_dim 64", (21, 30, 52), (2, 8, 8), 128, 64, tail=False, large=True),
)
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32)}
COLUMNS: tuple[Column, ...] = (
    ("case", "case", str, ""),
    ("dtype", "dtype", str, ""),
    ("what", "what", str, ""),
    ("error", "error", "{:.1e}".format, ""),
    ("bound", "bound", "{:.1e}".format, ""),
    ("", "right", lambda right: "" if right else "WRONG", ""),
)


class Check(Routine):
    name = "check"
    file = "{device}-check"

    def cases(self) -> list[tuple[Case, torch.dtype]]:
        cases = [case for case in CASES if self.on_gpu or not case.large]
        everything = [(case, dtype) for dtype in DTYPES.get(self.device.type, (torch.float32,)) for case in cases]
        share, shares = self.options.share
        return everything[share - 1 :: shares]

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        share, shares = options.share
        if share > shares:
            raise UserError(f"--share must be at most the number of shares, {shares}, got {share}")
        if not self.cases():
            raise UserError(f"--share {share} of {shares} holds no case: there are fewer")

    @torch.inference_mode()
    def measure(self, case: tuple[Case, torch.dtype]) -> list[dict[str, Any]]:
        shape, dtype = case
        rows = []
        for what, error, bound in (*self.backends(shape, dtype), *self.drafts(shape, dtype)):
            right = error <= bound  # not so for NaN
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {"case": shape.about, "dtype": name, "what": what, "error": error, "bound": bound} | {"right": right}
            )
            if not right:
                self.failures.append(f"{what} is wrong: {shape.about}, {name}, error {error:.2g}")
        return rows

    def backends(self, shape: Case, dtype: torch.dtype) -> Iterable[tuple[str, float, float]]:
        problem = made(shape, self.device, dtype)
        if shape.large:
            expected = attention_of(problem, *(at := some_rows(problem, 200)))
            for config, out, _ in every_configuration(problem):
                yield f"triton, {config}", difference(out[0, at[0]][:, at[1]], expected), TOLERANCE[dtype]
            return
        wide = replace(problem, **{name: getattr(problem, name).float() for name in "qkv"})
        expected, expected_lse = block_sparse_attention_lse(wide, backend="reference")
        for name in BACKENDS:
            if name == "reference" or unavailable(name, self.device, dtype, shape.head_dim) is not None:
                continue
            if name == "triton" and self.on_gpu:
                found = every_configuration(problem)
            else:
                found = iter([(None, *block_sparse_attention_lse(problem, backend=name))])
            for config, out, lse in found:
                what = f"{name}, {config}" if config else name
                yield what, difference(out, expected), TOLERANCE[dtype]
                yield f"{what}, log-sum-exp", difference(lse, expected_lse), TOLERANCE[dtype]

    def drafts(self, shape: Case, dtype: torch.dtype) -> Iterable[tuple[str, float, float]]:
        """The kernels before attention, where they are others than those of `core`."""
        problem = made(shape, self.device, dtype)
        q, k, v, tiling = problem.q, problem.k, problem.v, problem.tiling
        q_mean, k_mean, v_mean = (draft.pool(x, tiling) for x in (q, k, v))
        means = Tail(k_mean, v_mean)
        yield "pooling", difference(drafting.pool(q, tiling), q_mean), TOLERANCE[dtype]
        error = probe.errors(q_mean, k, v, means, tiling, scale=problem.factor)
        found = drafting.errors(q_mean, k, v, means, tiling, scale=problem.factor)
        yield "errors of tiles", difference(found, error), 1e-2  # logarithms
        if shape.singles:
            video = tiling.video_tiles
            given: tuple[Any, ...] = (q_mean, k, v, means, tiling, problem.keep[:, :, :video, :video])
            wanted: dict[str, Any] = {"scale": problem.factor, "tokens": shape.singles}
            own, taken = drafting.singles(*given, **wanted)
            yield "single tokens", missed(own, probe.singles(*given, **wanted)), 0.2
            if taken is not None:
                counted = replace(problem, tokens=own, taken=None).log_counts
                yield "counts of them", difference(replace(problem, tokens=own, taken=taken).log_counts, counted), 0.0

    def conclude(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"wrong": sum(not row["right"] for row in results)}

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["rows"], COLUMNS)


def made(shape: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """The problem of a case, two items of two heads."""
    generator = torch.Generator(device).manual_seed(0)

    def random(draw: Callable[..., Tensor], *size: int) -> Tensor:
        return draw(*size, generator=generator, device=device)

    tiling = tiling_for(LatentGrid(*shape.grid), shape.tile, shape.block_size, shape.text, shape.lead, device)
    q, k, v = (random(torch.randn, 2, tiling.tokens, 2, shape.head_dim).to(dtype) for _ in range(3))
    video = tiling.video_tiles
    keep = random(torch.rand, 2, 2, video, video) < 0.4
    keep |= torch.eye(video, dtype=torch.bool, device=device)
    means = Tail(draft.pool(k, tiling), draft.pool(v, tiling))
    problem = Problem(q, k, v, with_text(keep, tiling), tiling, tail=means if shape.tail else None)
    if shape.padded:
        valid = torch.arange(shape.text, device=device) < shape.text // 2
        problem = replace(problem, text_mask=valid.expand(2, -1).contiguous())
    if shape.singles:
        q_mean = draft.pool(q, tiling)
        wanted: dict[str, Any] = {"scale": problem.factor, "tokens": shape.singles}
        problem = replace(problem, tokens=probe.singles(q_mean, k, v, means, tiling, keep, **wanted))
    return problem


def every_configuration(problem: Problem) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What each configuration of the Triton kernel gives, all that this GPU and compiler take: output, log-sum-exp."""
    from draftdiff.kernels import triton_backend

    call = triton_backend.Call.prepare(problem, want_lse=True)
    for config in call.configs:
        with suppress(DoesNotCompile), triton_backend.on_device_of(problem.q):
            out, lse = call.launch(config)
            assert lse is not None
            yield str(config), out, lse


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, NaN where what is infinite in one is not so in the other."""
    same = found.float() == expected.float()  # infinities too
    return float((found.float() - expected.float()).masked_fill(same, 0.0).abs().max())


def missed(found: Tensor, expected: Tensor) -> float:
    """Share of the expected tokens that were not found; 1 if any was found twice."""
    ordered = found.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    there = (expected[..., :, None] == found[..., None, :]).any(-1) & (expected >= 0)
    return 1.0 if twice.any() else 1 - float(there.sum() / (expected >= 0).sum().clamp(min=1))
