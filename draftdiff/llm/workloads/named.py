"""The workloads by name."""

from __future__ import annotations

from draftdiff.errors import UserError
from draftdiff.llm.workloads.base import Workload
from draftdiff.llm.workloads.drawing.workload import DrawingWorkload
from draftdiff.llm.workloads.travel.workload import TravelWorkload

WORKLOADS = (DrawingWorkload.name, TravelWorkload.name)


def named_workload(name: str, *, compact: bool = False, noise: float = 0.3) -> Workload:
    """compact: short prompts of the drawing workload.  noise: of the travel workload's tables. Raises UserError for
    another name."""
    if name == DrawingWorkload.name:
        return DrawingWorkload(compact)
    if name == TravelWorkload.name:
        return TravelWorkload(noise)
    raise UserError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
