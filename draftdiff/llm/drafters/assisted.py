"""N-grams as the assistant of transformers' own assisted decoding: `generate(ids, custom_generate=assisted, ...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import CandidateGenerator

from draftdiff.errors import UserError
from draftdiff.hosts.transformers import assisted_decoding, end_tokens
from draftdiff.llm.drafters.ngram import NGramDrafter
from draftdiff.llm.drafters.ngram_table import check_table


class NGramCandidates(CandidateGenerator):
    """The same drafts as a chain, a `CandidateGenerator` as transformers' own assisted decoding takes it.

    drafter: its `depth` is the length of the chain.  max_length: of prompt and new tokens.  ends: tokens that end the
    text. Some hosts take what is accepted whole, beyond either: so the chain stops before them.
    """

    def __init__(self, drafter: NGramDrafter, *, max_length: int | None = None, ends: Sequence[int] = ()) -> None:
        self.drafter, self.max_length, self.ends = drafter, max_length, frozenset(ends)
        self._seen = 0

    def get_candidates(self, input_ids: LongTensor, **kwargs: Any) -> tuple[LongTensor, FloatTensor | None]:
        """The tokens so far [1, tokens] with the drafted ones behind, and no logits: the host then compares tokens."""
        table, length = self.drafter.table, input_ids.shape[1]
        if length < self._seen or not self._seen:
            table.learn_prompt(input_ids[0].tolist())
        else:
            table.learn_step(input_ids[0, -table.window :].tolist())
        self._seen = length
        depth = self.drafter.depth
        if self.max_length is not None:
            depth = min(depth, self.max_length - length - 1)  # the host's own token comes behind
        chain: list[int] = []
        last = input_ids[0, -2:].tolist()
        while len(last) == 2 and len(chain) < depth:
            found = table.follow(*last)
            if not found or found[0][1] in self.ends:
                break
            chain.append(found[0][1])
            last = [last[1], chain[-1]]
        drafted = torch.tensor([chain], dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids, drafted], dim=1), None  # type: ignore[return-value]

    def update_candidate_strategy(self, input_ids: LongTensor, scores: FloatTensor, num_matches: int) -> None:
        """The chain's length does not adapt."""


def assisted(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: NGramDrafter | None = None,
    **model_kwargs: Any,
) -> Any:
    """transformers' own assisted decoding with n-grams as its assistant; called by `generate`, which takes `drafter=`.

    A chain and one row only, and no report: `speculative` does more. A streamer gets nothing but the prompt. Before
    transformers 5.24 models with sliding windows need `cache_implementation="dynamic_full"`, as caches are cropped.
    Raises ValueError without a drafter or for a table of another vocabulary, and whatever the host refuses.
    """
    if drafter is None:
        raise UserError("assisted needs drafter=..., for example draftdiff.llm.NGramDrafter()")
    check_table(drafter.table, model)
    candidates = NGramCandidates(drafter, max_length=generation_config.max_length, ends=end_tokens(generation_config))
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
    return assisted_decoding(model, candidates, *arguments, **model_kwargs)
