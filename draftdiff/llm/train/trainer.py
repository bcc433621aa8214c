"""Training a draft towards its target with transformers' own Trainer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from draftdiff.errors import UserError
from draftdiff.llm.checks import check_vocabulary_sizes
from draftdiff.llm.train.data import collate
from draftdiff.llm.train.losses import Loss, ce, named_loss


class DraftTrainer(Trainer):
    """A Trainer whose model is a draft that learns from a frozen target.

    Rows are those of `DistillationSet`. Only positions whose next token is `written` count. On rows with `distil` the
    loss compares the draft's logits with the target's on the same text, which the target computes without gradients;
    on the others it is the cross-entropy of the text. The loss is the mean over all counted positions of a step,
    however they are spread over batches and processes, or of a whole evaluation. Predictions are the draft's logits;
    their labels are the written tokens, -100 elsewhere, and not shifted.

        FastDraft (arXiv 2411.11055):        loss="ce" on a `generate_distillation_set`; needs no target
        Direct Alignment (arXiv 2403.00858): loss="tvd_pp" on that, with `mix_in_text(..., packed_text(...))`

    With loss="ce" the tokens of the text are the labels, on all rows, and the target is never run. Everything else is
    the Trainer's own: evaluation, checkpoints, `train(resume_from_checkpoint=True)`, accumulation, mixed precision.
    """

    def __init__(
        self, model: Any, args: TrainingArguments, *, target: Any = None, loss: str | Loss = "tvd", **kwargs: Any
    ) -> None:
        """target: a causal language model of the draft's vocabulary, left on its device.  loss: a name in LOSSES or a
        callable of that signature.  args, kwargs: as for Trainer.

        Raises ValueError for an unknown loss, a missing target, different vocabularies, another loss of the Trainer's
        beside this one, and a draft in float16, whose weights would overflow.
        """
        self.loss = named_loss(loss)
        self.target = target
        if target is not None:
            check_vocabulary_sizes(target, model)
            target.eval()
        elif self.loss is not ce:
            raise UserError(f"loss {getattr(loss, '__name__', loss)!r} compares with a target: give one, or use 'ce'")
        if model.dtype == torch.float16:  # which is what drafts are often stored in
            raise UserError("draft must be in float32 or bfloat16 to train, got float16: call draft.float() first")
        for name, value in {"label_smoothing_factor": args.label_smoothing_factor, **kwargs}.items():
            if name in ("label_smoothing_factor", "compute_loss_func") and value:
                raise UserError(f"a DraftTrainer computes the loss that loss= names alone: leave {name} out")
        args = copy.copy(args)
        args.remove_unused_columns = False  # the columns are this class's own, not the model's
        pad = max(0, model.config.get_text_config().pad_token_id or 0)  # older configs say -1 for none
        super().__init__(model, args, **{"data_collator": partial(collate, pad=pad), **kwargs})
        self.model_accepts_loss_kwargs = True  # the loss is divided by what `get_batch_samples` counted, by no more
        self.evaluated = torch.zeros(2, device=self.args.device)  # loss and counted positions of an evaluation so far

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The batches of one step, and how many positions count in them: the mean of all processes, because their
        gradients are averaged."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = sum(int(_counted(batch).sum()) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(float(counted), device=device), "mean")

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of the counted positions of a batch from `collate` over num_items_in_batch; None: over their number."""
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        counted = _counted(inputs)
        draft_logits = outputs.logits[:, :-1]
        compared = inputs["distil"] if self.loss is not ce else torch.zeros_like(inputs["distil"])
        total = ce(draft_logits[~compared], ids[~compared, 1:], counted[~compared]).sum()
        if compared.any():
            target_logits = self._target_logits(ids[compared], attention_mask[compared])
            width = min(draft_logits.shape[-1], target_logits.shape[-1])  # they may be padded differently
            compare = (logits[..., :width] for logits in (draft_logits[compared], target_logits))
            total = total + self.loss(*compare, counted[compared]).sum()
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / items.clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _target_logits(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        there = self.target.device
        logits = self.target(input_ids=ids.to(there), attention_mask=attention_mask.to(there), use_cache=False).logits
        return logits[:, :-1].to(ids.device)

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same loss for evaluation; a Trainer would look for labels in the batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        counted = _counted(inputs).sum()
        self.evaluated += torch.stack([loss * counted, counted])
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs.logits, inputs["input_ids"].masked_fill(~inputs["written"], -100)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's own, but with a loss that is the mean over positions; its own is over batches."""
        self.evaluated.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, counted = self.accelerator.reduce(self.evaluated).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(counted, 1)
        return output


def _counted(batch: dict[str, Tensor]) -> Tensor:
    return batch["written"][:, 1:]  # the first token of a row is not predicted
