"""What each attention layer does in one forward of its transformer, handed to it for that forward and thread alone."""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftdiff.attention.key_groups import KeyGroups
from draftdiff.core.grid import LatentGrid
from draftdiff.hosts.dispatcher import Attend
from draftdiff.video.report import Forward, Log

if TYPE_CHECKING:
    from draftdiff.video.hook import Hook


class PerThread(threading.local):
    """Something that each thread has of its own; a copy of the owner begins with nothing."""

    value: Any = None

    def __reduce__(self) -> tuple:
        return PerThread, ()


@dataclass(eq=False)
class Call:
    """One forward of a transformer in one thread. wrapped: it came in through a wrapper of `torch.compile`.
    stats: fp32 [sparse layers, STATS], negative until a layer has run.  leaves: what ends with it.
    """

    wrapped: bool
    log: Log
    forward: Forward
    grid: LatentGrid | None
    start: Any = None
    finite: Tensor | None = None
    stats: Tensor = field(default_factory=lambda: torch.empty(0))
    leaves: ExitStack = field(default_factory=ExitStack)


@dataclass(eq=False)
class Task:
    """What one layer does in one call.

    density: kept share, [heads]; None to be dense.  stats: its row of the call's.
    shape: [frames, height, width, lead, frames of a causal block, frames that are read by one frame each, the first
    four for each further grid, 0], a tensor without values: the shapes of tensors are the only sizes that may change
    without a new graph.
    keys: which tokens may be read, [batch, tokens].  groups: of all tokens, by what the mask adds.  block_size: a
    further grid with fewer tokens is attended exactly, like text.
    """

    call: Call
    density: Tensor | None = None
    stats: Tensor | None = None
    shape: Tensor | None = None
    keys: Tensor | None = None
    groups: KeyGroups | None = None
    block_size: int = 0


@dataclass(eq=False)
class Layer:
    """One video self-attention. stock: the processor that ours stands for."""

    index: int
    name: str
    module: nn.Module
    hook: Hook
    attend: Attend
    stock: Any = None
    here: PerThread = field(default_factory=PerThread)

    @property
    def backend(self) -> Any:
        return self.hook.backend

    @property
    def stock_backend(self) -> Any:
        """Of the dispatcher; None for the one that is active when it is called."""
        return self.stock._attention_backend

    @property
    def is_sparse(self) -> bool:
        task = self.here.value
        return task is not None and task.density is not None


def attentions_of(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """(name, module) of the attentions of a model whose whole name matches, in the order that layers are counted in."""
    return [(name, module) for name, module in model.named_modules() if re.fullmatch(pattern, name)]
