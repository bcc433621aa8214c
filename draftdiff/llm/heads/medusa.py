"""Medusa heads (arXiv 2401.10774): head i guesses the token after the next i + 1 from the last hidden state alone.

As in the original the blocks of a head share one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from draftdiff.llm.checks import require
from draftdiff.llm.heads import files
from draftdiff.llm.heads.blocks import ResidualBlock
from draftdiff.llm.heads.target import TargetParts


@dataclass(frozen=True)
class MedusaConfig:
    """heads: tokens that are guessed.  layers: blocks of a head.  own_output: whether each head has an output layer of
    its own; else all use the target's."""

    hidden_size: int
    vocab_size: int
    heads: int = 4
    layers: int = 1
    own_output: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, f"{name} must be a whole number from 1 on, got {value!r}")


class MedusaHeads(nn.Module):
    """The heads, for one target, whose output layer they use if they have none of their own."""

    def __init__(self, config: MedusaConfig, target: PreTrainedModel) -> None:
        super().__init__()
        self.settings, width = config, config.hidden_size
        self.target = TargetParts(target)
        self.target.check("heads", width, config.vocab_size)
        self.blocks = nn.ModuleList(ResidualBlock(width, width) for _ in range(config.heads))
        own = config.heads if config.own_output else 0
        self.outputs = nn.ModuleList(nn.Linear(width, config.vocab_size, bias=False) for _ in range(own))

    @classmethod
    def from_target(
        cls, target: PreTrainedModel, heads: int = 4, layers: int = 1, own_output: bool = True
    ) -> MedusaHeads:
        """New heads, fp32 on the target's device, whose output layers begin as the target's own."""
        text = target.config.get_text_config()
        made = cls(MedusaConfig(text.hidden_size, text.vocab_size, heads, layers, own_output), target)
        made.target.copy_output(made.outputs)
        return made.to(target.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PreTrainedModel) -> MedusaHeads:
        """The heads of a folder of ours or of the original's (Medusa-1), on the target's device in its
        dtype.

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        stored, weights = files.open_folder(folder, "medusa_lm_head.pt", files.WEIGHTS[0])
        own = files.own_config(stored, "medusa", Path(folder))
        if own is None:
            layers = stored.get("medusa_num_layers", 1)
            names = {
                r"^(\d+)\.\d+\.linear\.": r"blocks.\1.linear.",
                rf"^(\d+)\.{layers}\.weight$": r"outputs.\1.weight",
            }
            weights = files.renamed(weights, names, r"(?!)")

        def make() -> MedusaHeads:
            if own is not None:
                return cls(MedusaConfig(**own), target)
            vocabulary, width = weights["outputs.0.weight"].shape
            # Published configs have said a wrong number of heads: the file knows.
            heads = len({name for name in weights if name.startswith("outputs.")})
            return cls(MedusaConfig(width, vocabulary, heads, layers), target)

        heads = files.built(make, folder)
        files.fill(heads, weights, folder)
        return heads.to(device=target.device, dtype=target.dtype).eval()

    def guess(self, head: int, state: Tensor) -> Tensor:
        """Logits [..., vocabulary] of a head from a state [..., width]."""
        for _ in range(self.settings.layers):
            state = self.blocks[head](state)
        return self.outputs[head](state) if self.settings.own_output else self.target.output(state)

    def forward(
        self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> list[Tensor]:
        """As `HydraHeads.forward`, without a look at ids, mask or positions."""
        lengths = (max(ids.shape[1] - head - 1, 0) for head in range(self.settings.heads))
        return [self.guess(head, hidden[:, :length]) for head, length in enumerate(lengths)]
