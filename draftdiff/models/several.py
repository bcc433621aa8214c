"""Several processes, as torchrun or accelerate start them: each its clips, or all of them one clip together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from draftdiff.errors import UserError
from draftdiff.models.setup import transformers_of


@dataclass(frozen=True)
class Processes:
    """This process among them. ulysses, ring: degrees by which they share a clip.  device: of this one, None for the
    usual one."""

    rank: int
    count: int
    ulysses: int
    ring: int
    device: str | None

    @property
    def together(self) -> bool:
        """Whether all make the same clip."""
        return self.ulysses * self.ring > 1

    @property
    def writes(self) -> bool:
        return not self.together or self.rank == 0

    def share(self, pipeline: Any) -> None:
        """Let a pipeline's transformers share their sequences. Raises UserError for those that cannot."""
        if not self.together:
            return
        from diffusers import ContextParallelConfig

        for model in transformers_of(pipeline):
            if getattr(model, "_cp_plan", None) is None:
                raise UserError(f"{type(model).__name__} has no plan for --ulysses and --ring in this diffusers")
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.ulysses, ring_degree=self.ring))
        pipeline.set_progress_bar_config(disable=self.rank > 0)


@contextmanager
def processes(ulysses: int = 1, ring: int = 1) -> Iterator[Processes]:
    """Those that the environment tells of (RANK, WORLD_SIZE, LOCAL_RANK). Raises UserError for degrees that they are
    not as many as."""
    count, rank, local = (int(os.environ.get(name, fallback)) for name, fallback in _VARIABLES)
    for name, degree in (("ulysses", ulysses), ("ring", ring)):
        if degree < 1:
            raise UserError(f"--{name} must be at least 1, got {degree}")
    if ulysses * ring not in (1, count):
        raise UserError(
            f"--ulysses {ulysses} --ring {ring} needs {ulysses * ring} processes, got {count}: "
            f"torchrun --nproc-per-node {ulysses * ring} -m draftdiff generate ..."
        )
    device = f"cuda:{local}" if count > 1 and torch.cuda.is_available() else None
    mine = Processes(rank, count, ulysses, ring, device)
    if not mine.together:
        yield mine
        return
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo")
    try:
        yield mine
    finally:
        dist.destroy_process_group()


_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
