"""Logits processors as speculation can use them: on drafted tokens too, several at once, one row at a time."""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.generation import logits_process

from draftdiff.hosts.transformers import allowed_tokens
from draftdiff.hosts.transformers_quirks import quirk
from draftdiff.llm.checks import require


def usable(processors: LogitsProcessorList, rows: int) -> list[LogitsProcessorList]:
    """The processors of each row, of which none takes several drafts of one row for several rows.

    Raises ValueError for those of the host that keep state, and in a batch for those that tell its rows apart.
    """
    for processor in processors:
        row = quirk("processor", type(processor).__name__)
        if row is not None:
            require(row.effect != "refused", f"speculative takes processors without state, got {row.why}")
            require(rows == 1, f"speculative takes {row.why} for one row only, got a batch of {rows}")
    return [LogitsProcessorList(_of_row(processor, row) for processor in processors) for row in range(rows)]


def for_drafts(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that may see drafted tokens, some of which are never accepted: the host's, as others may keep state.

    Drafts are then not bound by a user's own, which costs acceptance alone: what is emitted has passed all of them.
    """
    return LogitsProcessorList(one for one in processors if type(one).__module__ == logits_process.__name__)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = allowed_tokens(processor)
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = int(processor.prompt_ignore_length[row])  # type: ignore[attr-defined]
    return processor
