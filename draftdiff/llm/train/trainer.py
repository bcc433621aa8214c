"""Training a draft towards its target with transformers' own Trainer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from draftdiff.llm.drafters.base import check_vocabulary_sizes
from draftdiff.llm.train.data import collate
from draftdiff.llm.train.losses import Loss, ce, named_loss


class DraftTrainer(Trainer):
    """A Trainer whose model is a draft that learns from a frozen target.

    Rows are those of `DistillationSet`. Only positions whose next token is `written` count. On rows with `distil` the
    loss compares the draft's logits with the target's on the same text, which the target computes without gradients;
    on the others (`packed_text`, `mixed`) it is the cross-entropy of the text. The loss is the mean over all counted
    positions of a batch.

        FastDraft (arXiv 2411.11055):        loss="ce" on a `generate_distillation_set`; needs no target
        Direct Alignment (arXiv 2403.00858): loss="tvd_pp" on `mixed(generate_distillation_set(...), packed_text(...))`

    With loss="ce" the tokens of the text are the labels, on all rows, and the target is never run. Everything else is
    the Trainer's own: evaluation, checkpoints, `train(resume_from_checkpoint=True)`, accumulation, mixed precision.
    """

    def __init__(
        self, model: Any, args: TrainingArguments, *, target: Any = None, loss: str | Loss = "tvd", **kwargs: Any
    ) -> None:
        """target: a causal language model of the draft's vocabulary, left on its device.  loss: a name in LOSSES or a
        callable of that signature.  args, kwargs: as for Trainer.

        Raises ValueError for an unknown loss, a missing target, different vocabularies, and a draft in float16, whose
        weights would overflow.
        """
        self.loss = named_loss(loss)
        self.target = target
        if target is not None:
            check_vocabulary_sizes(target, model)
            target.eval()
        elif self.loss is not ce:
            raise ValueError(f"loss {getattr(loss, '__name__', loss)!r} compares with a target: give one, or use 'ce'")
        if model.dtype == torch.float16:  # which is what drafts are often stored in
            raise ValueError("draft must be in float32 or bfloat16 to train, got float16: call draft.float() first")
        args = copy.copy(args)
        args.remove_unused_columns = False  # the columns are this class's own, not the model's
        pad = model.config.get_text_config().pad_token_id or 0
        super().__init__(model, args, **{"data_collator": partial(collate, pad=pad), **kwargs})
        self.model_accepts_loss_kwargs = False  # means over a batch: the Trainer divides by the accumulation steps

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the counted positions of a batch from `collate`."""
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        counted = inputs["written"][:, 1:]
        draft_logits = outputs.logits[:, :-1]
        compared = inputs["distil"] if self.loss is not ce else torch.zeros_like(inputs["distil"])
        total = ce(draft_logits[~compared], ids[~compared, 1:], counted[~compared]).sum()
        if compared.any():
            target_logits = self._target_logits(ids[compared], attention_mask[compared])
            width = min(draft_logits.shape[-1], target_logits.shape[-1])  # they may be padded differently
            compare = (logits[..., :width] for logits in (draft_logits[compared], target_logits))
            total = total + self.loss(*compare, counted[compared]).sum()
        loss = total / counted.sum().clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _target_logits(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        there = self.target.device
        logits = self.target(input_ids=ids.to(there), attention_mask=attention_mask.to(there), use_cache=False).logits
        return logits[:, :-1].to(ids.device)

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The same loss for evaluation; a Trainer would look for labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None
