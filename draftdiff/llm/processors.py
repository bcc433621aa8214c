"""Logits processors as speculation can use them: on drafted tokens too, several at once, one row at a time."""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

# What keeps the state of one token after the other, and the argument of generate that brings it in.
_STATEFUL = {
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    logits_process.SynthIDTextWatermarkLogitsProcessor: "watermarking_config=SynthIDTextWatermarkingConfig",
}
# What treats the rows of a batch by their number.
_BY_ROW = {
    logits_process.EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    logits_process.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
}


def usable(processors: LogitsProcessorList, rows: int) -> list[LogitsProcessorList]:
    """The processors of each row, of which none takes several drafts of one row for several rows.

    Raises ValueError for those that keep state, and in a batch for those that tell its rows apart.
    """
    for processor in processors:
        if type(processor) in _STATEFUL:
            raise ValueError(f"speculative takes processors without state, got {_STATEFUL[type(processor)]}")
        if type(processor) in _BY_ROW and rows > 1:
            raise ValueError(f"speculative takes {_BY_ROW[type(processor)]} for one row only, got a batch of {rows}")
    return [LogitsProcessorList(_of_row(processor, row) for processor in processors) for row in range(rows)]


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return logits_process.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = int(processor.prompt_ignore_length[row])  # type: ignore[attr-defined]
    return processor
