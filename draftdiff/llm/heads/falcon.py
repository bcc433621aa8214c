"""The draft layer of Falcon (arXiv 2412.12639), which guesses k tokens at once.

Row i reads the embedding of token i + 1 and the target's last state of token i, through two LSTM layers and one decoder
layer, and says the state of token i + k, which the target's output layer reads. Rows come in blocks of k that see each
other. As in the original the layer has no norm before its attention, nor one at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from draftdiff.llm.checks import require
from draftdiff.llm.heads import files
from draftdiff.llm.heads.layers import LAYER_FIELDS, Stack, layer_fields
from draftdiff.llm.heads.target import TargetParts

State = tuple[Tensor, ...]  # of the LSTM layers, two times [layers, rows, width]


@dataclass(frozen=True)
class FalconConfig:
    """layer: fields of the layer's LlamaConfig.  k: tokens that are guessed at once.  recurrent: the LSTM goes on from
    row to row. Else each row is a sequence of its own, as the original's code runs and its checkpoints are trained."""

    layer: dict[str, Any]
    k: int = 2
    recurrent: bool = False

    def __post_init__(self) -> None:
        require(isinstance(self.k, int) and self.k >= 1, f"k must be a whole number from 1 on, got {self.k!r}")


def relaxed_mask(new: int, past: int, k: int, real: Tensor | None = None) -> Tensor:
    """Which rows new ones see, bool [1 or rows, new, past + new]: all of the past, and of the new ones their own block
    of k and those before it, counted from the first. real: which are no padding, [rows, past + new]; padding in front
    is not counted, and seen by itself alone."""
    if real is None:
        real = torch.ones(1, past + new, dtype=torch.bool)
    real = real.bool()
    blocks = (real[:, past:].cumsum(-1) - 1).div(k, rounding_mode="floor")
    seen = torch.ones(len(real), new, past + new, dtype=torch.bool, device=real.device)
    seen[:, :, past:] = blocks[:, None, :] <= blocks[:, :, None]
    itself = torch.eye(new, past + new, dtype=torch.bool, device=real.device).roll(past, dims=1)
    return (seen & real[:, None, :]) | itself


class FalconHead(nn.Module):
    """The layer, for one target. As a `TreeDecoder` calls a model."""

    def __init__(self, config: FalconConfig, target: PreTrainedModel) -> None:
        super().__init__()
        self.settings = config
        self.config = LlamaConfig(**{**config.layer, "attn_implementation": "sdpa"})
        self.target = TargetParts(target)
        width = self.config.hidden_size
        self.target.check("head", width, self.config.vocab_size)
        self.lstm = nn.LSTM(2 * width, width, num_layers=2, batch_first=True)
        self.layers = Stack(self.config, input_norm=False)

    @classmethod
    def from_target(cls, target: PreTrainedModel, k: int = 2, recurrent: bool = False) -> FalconHead:
        """A new layer, fp32 on the target's device."""
        fields = layer_fields(target) | {"vocab_size": target.config.get_text_config().vocab_size}
        return cls(FalconConfig(fields, k, recurrent), target).to(target.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PreTrainedModel, recurrent: bool = False) -> FalconHead:
        """The layer of a folder of ours or of the original's, on the target's device in its dtype. recurrent: how the
        LSTM of an original is run; ours know.

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        stored, weights = files.open_folder(folder, *reversed(files.WEIGHTS))
        own = files.own_config(stored, "falcon", Path(folder))
        if own is None:
            weights = files.renamed(weights, {}, r"embed_tokens\.weight|.*inv_freq")

        def make() -> FalconHead:
            if own is not None:
                return cls(FalconConfig(**own), target)
            fields = {name: stored[name] for name in LAYER_FIELDS if stored.get(name) is not None}
            fields |= {"vocab_size": stored["vocab_size"]}
            return cls(FalconConfig(fields, stored["k_mask"], recurrent), target)

        head = files.built(make, folder)
        files.fill(head, weights, folder)
        return head.to(device=target.device, dtype=target.dtype).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def begin(self, rows: int) -> State:
        """The LSTM's state before the first row."""
        zeros = torch.zeros(2, rows, self.config.hidden_size, device=self.device, dtype=self.dtype)
        return zeros, zeros

    def read(
        self, ids: Tensor, states: Tensor, before: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What the LSTM makes of tokens int64 [rows, n] and the states before them [rows, n, width], and its own state
        after them. before: its state before them, as `begin` makes one.  lengths: of rows padded behind, int64 [rows].
        """
        x = torch.cat([self.target.embed(ids).to(self.dtype), states.to(self.dtype)], dim=-1)
        before = self.begin(len(ids)) if before is None else before
        if self.settings.recurrent:
            return self.lstm(x, before) if lengths is None else self._read_padded(x, before, lengths)
        if not torch.is_grad_enabled():
            return self._begun(x), before
        alone, _ = self.lstm(x.flatten(0, 1)[:, None])  # whose idle weights get gradients of zero, as the original's
        return alone[:, 0].unflatten(0, ids.shape), before

    def _begun(self, x: Tensor) -> Tensor:
        """What the LSTM makes of rows that each begin it: with no state before them its recurrent weights are idle."""
        for layer in range(self.lstm.num_layers):
            weight, *biases = (getattr(self.lstm, f"{name}_l{layer}") for name in ("weight_ih", "bias_ih", "bias_hh"))
            enter, _, new, leave = F.linear(x, weight, sum(biases)).chunk(4, dim=-1)
            x = leave.sigmoid() * (enter.sigmoid() * new.tanh()).tanh()
        return x

    def _read_padded(self, x: Tensor, before: State, lengths: Tensor) -> tuple[Tensor, State]:
        # An LSTM takes no empty sequences.
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        out, after = self.lstm(packed, before)
        some = (lengths > 0)[None, :, None]
        return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0], tuple(
            torch.where(some, new, old) for new, old in zip(after, before)
        )

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any = None,
        *,
        states: Tensor,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the tokens after the states that are guessed, and as the only hidden states those [rows, n, width].

        states: what `read` gave, [rows, n, width].  attention_mask: bool [rows, 1, n, all], or of padding in front
        [rows, all]; blocks are then counted from the first new row.  logits_to_keep: of the last rows; 0 for all.
        """
        mask = attention_mask
        if mask is None or mask.ndim == 2:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            mask = relaxed_mask(states.shape[1], past, self.settings.k, mask)[:, None].to(states.device)
        x = self.layers(states, None, mask, position_ids, past_key_values)
        logits = self.target.output(x[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, hidden_states=(x,))  # type: ignore[arg-type]
