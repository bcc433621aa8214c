"""What heads use of their target: its token embedding and output layer, which stay the target's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from draftdiff.llm.checks import require, vocabulary_size


class TargetParts:
    """No module, so that heads that hold it neither save nor train what is the target's."""

    def __init__(self, target: PreTrainedModel) -> None:
        self.name, self.config = type(target).__name__, target.config.get_text_config()
        self.vocabulary = vocabulary_size(target)
        self._embedding, self._output = target.get_input_embeddings(), target.get_output_embeddings()

    def check(self, what: str, width: int, vocabulary: int) -> None:
        """Raise ValueError unless these are the target's hidden size and vocabulary."""
        for name, got, own in (
            ("hidden size", width, self.config.hidden_size),
            ("vocabulary", vocabulary, self.vocabulary),
        ):
            require(got == own, f"the {what} are for a target with a {name} of {got}, {self.name} has {own}")

    def check_target(self, target: PreTrainedModel) -> None:
        """Raise ValueError unless a target has the sizes of the one that heads were loaded or made for."""
        text = target.config.get_text_config()
        got, own = ((c.hidden_size, c.num_hidden_layers, c.vocab_size) for c in (text, self.config))
        require(
            got == own,
            f"the heads are for hidden size, layers and vocabulary {own}, {type(target).__name__} has {got}",
        )

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Embedded tokens [..., width]."""
        return self._embedding(ids)

    def output(self, x: Tensor) -> Tensor:
        """The target's output layer [..., width] -> [..., vocabulary]."""
        require(self._output is not None, f"{self.name} has no output layer that heads could use")
        weight: Tensor = self._output.weight
        return self._output(x.to(weight.dtype))

    def output_bytes(self) -> int:
        """Of the output layer's weights."""
        return sum(p.numel() * p.element_size() for p in self._output.parameters())

    @torch.no_grad()
    def copy_output(self, layers: Iterable[nn.Module]) -> None:
        """Let output layers of a head's own begin as the target's."""
        for layer in layers:
            require(self._output is not None, f"{self.name} has no output layer that heads could begin with")
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(self._output.weight)
            if layer.bias is not None:
                bias = getattr(self._output, "bias", None)
                layer.bias.zero_() if bias is None else layer.bias.copy_(bias)
