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
            target.eval()
        elif self.loss is not ce:
            raise UserError(f"loss {getattr(loss, '__name__', loss)!r} compares with a target: give one, or use 'ce'")
        pad = self.check(model)
        if next(model.parameters()).dtype == torch.float16:  # which is what drafts are often stored in
            raise UserError("draft must be in float32 or bfloat16 to train, got float16: call draft.float() first")
        for name, value in {"label_smoothing_factor": args.label_smoothing_factor, **kwargs}.items():
            if name in ("label_smoothing_factor", "compute_loss_func") and value:
                raise UserError(f"a DraftTrainer computes the loss that loss= names alone: leave {name} out")
        args = copy.copy(args)
        args.remove_unused_columns = False  # the columns are this class's own, not the model's
        super().__init__(model, args, **{"data_collator": partial(collate, pad=pad), **kwargs})
        self.model_accepts_loss_kwargs = True  # the loss is divided by what `get_batch_samples` counted, by no more
        # Sums of losses and counted positions of an evaluation so far, of each guess of a position.
        self.evaluated = torch.zeros(2, 1, device=self.args.device)

    def check(self, model: Any) -> int:
        """The token to pad rows with. Raises ValueError for a draft of another vocabulary than the target's."""
        if self.target is not None:
            check_vocabulary_sizes(self.target, model)
        return max(0, model.config.get_text_config().pad_token_id or 0)  # older configs say -1 for none

    def run(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[tuple[int, Tensor]], Any]:
        """What the model makes of a batch: its outputs; (steps ahead, logits) of each of its guesses of a position; and
        a function that gives the target's logits [some rows, tokens, vocabulary] of the rows of a bool mask."""
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        return outputs, [(1, outputs.logits)], partial(self._target_logits, ids, attention_mask)

    def ahead(self, model: Any) -> list[int]:
        """How many steps ahead the guesses of a position are."""
        return [1]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The batches of one step, and how many positions count in them: the mean of all processes, because their
        gradients are averaged."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = [sum(int(_counted(batch, n).sum()) for batch in batches) for n in self.ahead(self.model)]
        return batches, self.accelerator.reduce(torch.tensor(counted, dtype=torch.float32, device=device), "mean")

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of the counted positions of a batch from `collate` over num_items_in_batch; None: over their number. Of
        several guesses of a position each has its own mean, and they are added."""
        sums, counts, outputs = self._sums(model, inputs)
        items = counts if num_items_in_batch is None else num_items_in_batch
        loss = (sums / items.clamp_min(1)).sum()
        return (loss, outputs) if return_outputs else loss

    def _sums(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        """Sum of losses and number of counted positions of each guess, [guesses] both, and the model's outputs."""
        ids = inputs["input_ids"]
        outputs, guesses, target_logits_of = self.run(model, inputs)
        compared = inputs["distil"] if self.loss is not ce else torch.zeros_like(inputs["distil"])
        target_logits = target_logits_of(compared) if compared.any() else None
        sums, counts = [], []
        for ahead, logits in guesses:
            counted, draft_logits = _counted(inputs, ahead), logits[:, : max(ids.shape[1] - ahead, 0)]
            total = ce(draft_logits[~compared], ids[~compared, ahead:], counted[~compared]).sum()
            if target_logits is not None:
                width = min(draft_logits.shape[-1], target_logits.shape[-1])  # they may be padded differently
                pair = (draft_logits[compared], target_logits[:, ahead - 1 : -1])
                total = total + self.loss(*(part[..., :width] for part in pair), counted[compared]).sum()
            sums.append(total)
            counts.append(counted.sum())
        return torch.stack(sums), torch.stack(counts), outputs

    @torch.no_grad()
    def _target_logits(self, ids: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
        there = self.target.device
        given = {"input_ids": ids[rows].to(there), "attention_mask": attention_mask[rows].to(there)}
        return self.target(**given, use_cache=False).logits.to(ids.device)

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same loss for evaluation; a Trainer would look for labels in the batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, counts, outputs = self._sums(model, inputs)
        self.evaluated = self.evaluated + torch.stack([sums, counts])
        loss = (sums / counts.clamp_min(1)).sum()
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs.logits, inputs["input_ids"].masked_fill(~inputs["written"], -100)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's own, but with a loss that is the mean over positions; its own is over batches."""
        self.evaluated = torch.zeros_like(self.evaluated[:, :1])
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, counted = self.accelerator.reduce(self.evaluated)
        output.metrics[f"{metric_key_prefix}_loss"] = float((total / counted.clamp_min(1)).sum())
        return output


def _counted(batch: dict[str, Tensor], ahead: int = 1) -> Tensor:
    return batch["written"][:, ahead:]  # the first tokens of a row are not guessed
