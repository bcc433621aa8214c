"""The workloads by name."""

from __future__ import annotations

from draftdiff.errors import UserError
from draftdiff.llm.workloads.base import Workload
from draftdiff.llm.workloads.drawing.workload import DrawingWorkload
from draftdiff.llm.workloads.travel.workload import TravelWorkload

WORKLOADS = (DrawingWorkload.name, TravelWorkload.name)


def named_workload(name: str, *, compact: bool = False, noise: float | None = None) -> Workload:
    """compact: short prompts, which the embedded pairs read.  noise: of the tables of travel's whole prompts. Raises
    UserError for another name, and for noise where there is none."""
    if noise is not None and (name != TravelWorkload.name or compact):
        raise UserError(f"noise goes with the travel workload and a model of your own, got {noise} for {name}")
    if name == DrawingWorkload.name:
        return DrawingWorkload(compact)
    if name == TravelWorkload.name:
        return TravelWorkload(0.3 if noise is None else noise, compact)
    raise UserError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
