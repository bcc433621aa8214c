"""Hybrid distillation of a draft whose tokenizer is another (OmniDraft, arXiv 2507.02659), while decoding or before.

Where a token of the target is one of the draft's, the draft's law over the tokens that both have is brought to the
target's (reverse divergence); where it is several, they are made likelier (their negative log-likelihood, times
lambda).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.length_head import AcceptanceHead, acceptance_loss
from draftdiff.llm.retokenize import Aligned, GrowingText, Vocabularies
from draftdiff.llm.train.losses import rkl


@dataclass
class Example:
    """A text in the draft's tokens, and what the target says of it.

    ids: of the draft.  direct: (place, the target's logits [vocabulary] there) of tokens that both have.  merged:
    places [start, stop) of tokens that are one of the target's together.  judged: (state before a token [width], its
    chance to be accepted), for an AcceptanceHead.
    """

    ids: list[int]
    direct: list[tuple[int, Tensor]] = field(default_factory=list)
    merged: list[tuple[int, int]] = field(default_factory=list)
    judged: list[tuple[Tensor, float]] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Sequence[int], aligned: Iterable[Aligned], logits: dict[int, Tensor], window: int) -> Example:
        """The last `window` tokens with what is aligned. logits: the target's by the place of the token they are
        for."""
        cut = max(len(ids) - window, 0)
        example = cls(list(ids[cut:]))
        for one in aligned:
            if one.start - cut < 1 or one.place not in logits:  # the first token is not predicted
                continue
            if one.stop - one.start == 1:
                example.direct.append((one.start - cut, logits[one.place]))
            else:
                example.merged.append((one.start - cut, one.stop - cut))
        return example


def hybrid_loss(
    draft_logits: Tensor, example: Example, draft_ids: Tensor, target_ids: Tensor, weight: float = 0.2
) -> Tensor:
    """The mean over the target's tokens of an example.

    draft_logits: [tokens, vocabulary] of the example's ids.  draft_ids, target_ids: the tokens that both have, int64
    [tokens] each.  weight: lambda.
    """
    total = draft_logits.new_zeros((), dtype=torch.float32)
    if example.direct:
        places = torch.tensor([place - 1 for place, _ in example.direct], device=draft_logits.device)
        theirs = torch.stack([logits for _, logits in example.direct]).to(draft_logits.device)[:, target_ids]
        total = total + rkl(draft_logits[places][:, draft_ids], theirs).sum()
    if example.merged:
        inside = [place for start, stop in example.merged for place in range(start, stop)]
        log_q = draft_logits[[place - 1 for place in inside]].float().log_softmax(-1)
        written = torch.tensor([example.ids[place] for place in inside], device=log_q.device)
        total = total - weight * log_q.gather(-1, written[:, None]).sum()
    return total / max(len(example.direct) + len(example.merged), 1)


class CrossVocabDistiller:
    """Trains a draft, and its AcceptanceHead if it has one, on examples as they come.

    draft: changed in place.  every: examples of a step.  window: the draft's tokens that are read for one.  weight:
    lambda of merged tokens.  lora: the rank of LoRA adapters (needs peft) that are trained in place of all weights.
    Not for drafters that several threads share.
    """

    def __init__(
        self,
        draft: Any,
        *,
        head: AcceptanceHead | None = None,
        lr: float = 1e-4,
        every: int = 8,
        window: int = 256,
        weight: float = 0.2,
        lora: int | None = None,
    ) -> None:
        for name, value in (("every", every), ("window", window)):
            require(value >= 1, f"{name} must be at least 1, got {value}")
        require(lr > 0 and weight >= 0, f"lr must be above 0 and weight at least 0, got {lr} and {weight}")
        self.draft, self.head, self.every, self.window, self.weight = draft, head, every, window, weight
        trained = list(draft.parameters()) if lora is None else _adapters(draft, lora)
        trained = [p.requires_grad_() for p in trained]
        groups = [{"params": trained, "lr": lr}]
        if head is not None:
            groups.append({"params": list(head.parameters()), "lr": max(lr, 1e-3)})  # it begins with nothing
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._trained = trained
        self._waiting: list[Example] = []
        self.losses: list[float] = []  # of the steps so far

    def add(self, example: Example, vocabularies: Vocabularies) -> None:
        """Take an example, and a step when there are enough."""
        if example.direct or example.merged or example.judged:
            self._waiting.append(example)
        if len(self._waiting) >= self.every:
            waiting, self._waiting = self._waiting, []
            self.losses.append(self._step(waiting, vocabularies))

    @torch.enable_grad()
    def _step(self, examples: list[Example], vocabularies: Vocabularies) -> float:
        device = self.draft.device
        both = [(d, t) for d, t in enumerate(vocabularies.direct) if t >= 0]
        draft_ids, target_ids = torch.tensor(both, device=device).reshape(-1, 2).T
        self._optimizer.zero_grad()
        total = 0.0
        for example in examples:
            if example.direct or example.merged:
                logits = self.draft(torch.tensor([example.ids], device=device), use_cache=False).logits[0]
                loss = hybrid_loss(logits, example, draft_ids, target_ids, self.weight) / len(examples)
                loss.backward()
                total += float(loss.detach())
            if self.head is not None and example.judged:
                there = next(self.head.parameters()).device
                states = torch.stack([state for state, _ in example.judged]).to(there).clone()
                chances = torch.tensor([chance for _, chance in example.judged], device=there)
                (acceptance_loss(self.head(states), chances) / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        return total


def _adapters(draft: Any, rank: int) -> list[torch.nn.Parameter]:
    """LoRA adapters on all linear layers but the last, put into the draft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        require(False, "lora needs peft: pip install peft, or leave lora out to train all weights")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return [p for p in get_peft_model(draft, config).parameters() if p.requires_grad]


def distil_cross_vocab(
    distiller: CrossVocabDistiller, target: Any, rows: Iterable[Sequence[int] | Tensor], vocabularies: Vocabularies
) -> list[float]:
    """Train on texts that exist already, in the target's tokens; the losses of the steps.

    target: a causal language model.  rows: ids of one text each, for example a DistillationSet's `ids`; best is what
    the target wrote. Rows that the draft has no tokens for are left out.
    """
    before = len(distiller.losses)
    for row in rows:
        tokens = torch.as_tensor(row).tolist()
        ids, aligned = GrowingText(vocabularies).update(tokens)
        if ids is None or len(ids) < 2:
            continue
        with torch.no_grad():
            logits = target(torch.tensor([tokens], device=target.device), use_cache=False).logits[0]
        said = {place + 1: logits[place] for place in range(len(tokens) - 1)}
        distiller.add(Example.of(ids, aligned, said, distiller.window), vocabularies)
    return distiller.losses[before:]
