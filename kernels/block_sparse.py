"""Block-sparse attention over tiles: one function, and the table of the backends behind it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from draftdiff.core.devices import without_autocast
from draftdiff.errors import UserError
from draftdiff.kernels import single_tokens
from draftdiff.kernels.problem import PRECISIONS, Problem


class Backend(Protocol):
    """A module of this folder.  differentiable: whether gradients reach q, k, v and the tail.  reads_tokens: whether it
    reads a problem's single tokens; else it counts the tail without them, and they are merged into what it gives."""

    differentiable: bool
    reads_tokens: bool

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot serve such a call, or None if it can."""

    def run(self, problem: Problem, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp of `block_sparse_attention_lse`, the latter None unless it is wanted."""


@dataclass(frozen=True)
class Row:
    """module: in this folder, named after its backend where that would not hide a package of the same name.
    preferred_on: types of device, None for every one.  precisions: those of `PRECISIONS` that it has."""

    module: str
    preferred_on: tuple[str, ...] | None = ()
    precisions: tuple[str, ...] = ("full",)


# A later row is preferred to an earlier one.
TABLE = {
    "reference": Row("reference"),
    "torch": Row("torch_backend", None),
    "cpu": Row("cpu", ("cpu",)),
    "flex": Row("flex", ("cuda",)),
    "triton": Row("triton_backend", ("cuda",), PRECISIONS),
}
BACKENDS = tuple(TABLE)


def preferred_on(device: torch.device) -> list[str]:
    """The backends that are worth trying on a device, best first; never none."""
    return [
        name for name, row in reversed(TABLE.items()) if row.preferred_on is None or device.type in row.preferred_on
    ]


def backend_module(name: str) -> Backend:
    """The module of a backend. Raises ValueError for a name that is not in BACKENDS."""
    if name not in TABLE:
        raise UserError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return cast(Backend, import_module(f"draftdiff.kernels.{TABLE[name].module}"))


def unavailable(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: str = "full"
) -> str | None:
    """Why a backend cannot serve such a call, or None if it can."""
    module, able = backend_module(name), TABLE[name].precisions
    if precision not in able:
        return f"takes precision {', '.join(able)}, not {precision!r}"
    return module.unavailable(device, dtype, head_dim)


@lru_cache(maxsize=64)
def resolve(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: str = "full") -> str:
    """The backend that serves a call. `auto` takes the fastest that can, with one warning if that is not the first
    choice of the device; a named backend that cannot serve raises ValueError with its reason."""
    if name != "auto":
        reason = unavailable(name, device, dtype, head_dim, precision)
        if reason:
            raise UserError(f"backend {name!r} cannot run here: {reason}")
        return name
    refused: list[str] = []
    for candidate in preferred_on(device):
        reason = unavailable(candidate, device, dtype, head_dim, precision)
        if reason is None:
            if refused:
                warnings.warn(f"draftdiff uses the {candidate!r} backend: {'; '.join(refused)}", stacklevel=2)
            return candidate
        refused.append(f"{candidate} {reason}")
    raise UserError(f"no backend serves {device}, {dtype}, head_dim {head_dim}: {'; '.join(refused)}")


def block_sparse_attention(problem: Problem, *, backend: str = "auto") -> Tensor:
    """The output of a problem, like q and in the same order, contiguous.

    A row with no key at all gives 0; a NaN that a row reads makes its output NaN.
    Raises ValueError for a backend that is unknown or cannot serve.
    """
    return _run(problem, backend, want_lse=False)[0]


def block_sparse_attention_lse(problem: Problem, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """As `block_sparse_attention`, and the natural log-sum-exp of each row, fp32 [batch, tokens, heads], -inf where a
    row has no key."""
    out, lse = _run(problem, backend, want_lse=True)
    assert lse is not None
    return out, lse


def _run(problem: Problem, backend: str, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    q = problem.q
    name = resolve(backend, q.device, q.dtype, q.shape[-1], problem.precision)
    module = backend_module(name)
    with without_autocast(q.device):
        if problem.tokens is None or module.reads_tokens:
            return module.run(problem, want_lse)
        out, lse = module.run(problem, True)
        assert lse is not None
        return single_tokens.merge(problem, out, lse)
