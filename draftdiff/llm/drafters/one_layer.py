"""What drafters of one layer have in common that is trained for its target and uses the target's output layer."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context
from draftdiff.llm.metrics import bytes_per_forward


class LayerDrafter:
    """head: the layer, on the target's device."""

    head: Any

    def _trainer(self) -> type[Trainer]:
        """The class that trains the layer; training is imported when it is asked for."""
        raise NotImplementedError

    def fit(self, target: PreTrainedModel, dataset: Dataset, args: TrainingArguments, **options: Any) -> Any:
        """Train the layer with a trainer of its kind, whose options these are, and return it."""
        trainer = self._trainer()(self.head, args, target=target, train_dataset=dataset, **options)
        trainer.train()
        self.head.eval()
        return trainer

    def cost(self, target: PreTrainedModel) -> float:
        """Bytes of weights that one pass of the layer reads over those of a target forward."""
        read = sum(p.numel() * p.element_size() for p in self.head.parameters()) + self.head.target.output_bytes()
        return read / bytes_per_forward(target)

    def check_target(self, context: Context) -> None:
        """Raises ValueError for a target of another size or on another device than the layer is for."""
        model, own = context.target.model, self.head.device
        require(model.device == own, f"the head is on {own}, the target on {model.device}: they need the same device")
        self.head.target.check_target(model)
