"""The head of EAGLE-3 (arXiv 2503.01840): one decoder layer that reads three of the target's hidden states.

Position i gets the states of token i, projected to one, and the embedding of token i + 1; where drafts are read, the
head's own output stands for the states of the tokens before them. It may emit a part of the vocabulary only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftdiff.llm.checks import require
from draftdiff.llm.heads import files
from draftdiff.llm.heads.layers import LAYER_FIELDS, Stack
from draftdiff.llm.heads.target import TargetParts


@dataclass(frozen=True)
class EagleConfig:
    """layer: fields of the LlamaConfig of the decoder layers.  draft_vocab_size: tokens that it can emit.
    target_layers: which of the target's layers' inputs it reads.  target_hidden_size: their width.  norm_first: the
    first layer adds to the state after its norm.  norm_states: the three states are normed before they are projected.
    own_embedding: whether it has one, else it is the target's."""

    layer: dict[str, Any]
    draft_vocab_size: int
    target_layers: tuple[int, ...]
    target_hidden_size: int
    norm_first: bool = False
    norm_states: bool = False
    own_embedding: bool = False


def default_layers(count: int) -> tuple[int, ...]:
    """The layers of a target of `count` that heads read where their file does not say: 2, the middle, the third last;
    as in the original numbers that coincide count once."""
    return tuple(sorted({2, count // 2, count - 3}))


class EagleHead(nn.Module):
    """The head, for one target. As a `TreeDecoder` calls a model; logits are of the target's vocabulary, -inf for what
    the head cannot emit."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: EagleConfig, target: PreTrainedModel) -> None:
        super().__init__()
        self.settings = config
        self.config = LlamaConfig(**{**config.layer, "attn_implementation": "sdpa"})
        self.target = TargetParts(target)
        vocabulary, width = self.target.vocabulary, self.config.hidden_size
        read, count = config.target_layers, self.target.config.num_hidden_layers
        require(
            bool(read) and min(read) >= 0 and max(read) < count,
            f"target_layers must be from 0 to {count - 1}, the layers of {self.target.name}, got {list(read)}",
        )
        self.target.check("head", config.target_hidden_size, vocabulary)
        if not config.own_embedding:
            self.target.check("head without an embedding", width, vocabulary)
        require(
            1 <= config.draft_vocab_size <= vocabulary,
            f"draft_vocab_size must be from 1 to {vocabulary}, the target's vocabulary, got {config.draft_vocab_size}",
        )
        states, eps = len(read) * config.target_hidden_size, self.config.rms_norm_eps
        self.embed_tokens = nn.Embedding(vocabulary, width) if config.own_embedding else None
        self.input_norm = LlamaRMSNorm(states, eps) if config.norm_states else None
        self.fc = nn.Linear(states, width, bias=False)
        self.layers = Stack(self.config, reads_tokens=True, norm_first=config.norm_first)
        self.norm = LlamaRMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(vocabulary) < config.draft_vocab_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PreTrainedModel) -> EagleHead:
        """The head of a folder of SafeAILab's layout or of speculators', on the target's device in its dtype.

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        config, weights = files.open_folder(folder, *files.WEIGHTS)
        weights = files.renamed(weights, {r"^midlayer\.": "layers.0."}, r"verifier_.*|.*inv_freq")
        head = files.built(lambda: cls(_config(config, weights, target), target), folder)
        if "d2t" not in weights and head.settings.draft_vocab_size == head.target.vocabulary:
            weights |= {"d2t": head.d2t, "t2d": head.t2d}
        files.fill(head, weights, folder)
        emitted = head.emitted()
        may = torch.zeros_like(head.t2d)
        inside = bool((emitted >= 0).all() and (emitted < len(may)).all())
        if inside:
            may[emitted] = True
        require(
            inside and int(may.sum()) == len(emitted) and torch.equal(may, head.t2d),
            f"{folder}: d2t and t2d do not name the same {len(emitted)} tokens of a vocabulary of {len(may)}",
        )
        return head.to(device=target.device, dtype=target.dtype).eval()

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def emitted(self) -> Tensor:
        """The token of each place of the draft vocabulary, int64 [draft_vocab_size]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def project(self, states: Tensor) -> Tensor:
        """One state [..., width] of the target's [..., layers * target width]."""
        states = states.to(self.fc.weight.dtype)
        return self.fc(states if self.input_norm is None else self.input_norm(states))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any = None,
        *,
        states: Tensor,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after each token, and as the only hidden states the layers' output [rows, tokens, width].

        input_ids: int64 [rows, tokens].  states: projected, or the head's own, of the token before each, [rows, tokens,
        width].  logits_to_keep: of the last tokens; 0 for all.
        """
        embedded = self.target.embed(input_ids) if self.embed_tokens is None else self.embed_tokens(input_ids)
        x = self.layers(states, embedded.to(states.dtype), attention_mask, position_ids, past_key_values)
        drafted = self.lm_head(self.norm(x[:, -logits_to_keep:]))
        logits = drafted
        if drafted.shape[-1] < self.target.vocabulary:
            logits = drafted.new_full((*drafted.shape[:-1], self.target.vocabulary), -torch.inf)
            logits.index_copy_(-1, self.emitted(), drafted)
        return CausalLMOutputWithPast(logits=logits, hidden_states=(x,))  # type: ignore[arg-type]


def _config(stored: dict[str, Any], weights: dict[str, Tensor], target: PreTrainedModel) -> EagleConfig:
    """What a stored config, SafeAILab's or of speculators, says of a head."""
    kind = stored.get("speculators_model_type")
    require(kind in (None, "eagle3"), f"speculators_model_type must be 'eagle3', got {kind!r}")
    layer = stored if kind is None else stored["transformer_layer_config"]
    require(layer.get("model_type", "llama") == "llama", f"layers must be of a llama, got {layer.get('model_type')!r}")
    text = target.config.get_text_config()
    read = stored.get("eagle_aux_hidden_state_layer_ids") or default_layers(text.num_hidden_layers)
    fields = {name: layer[name] for name in LAYER_FIELDS if layer.get(name) is not None}
    return EagleConfig(
        layer=fields | {"attention_bias": "layers.0.self_attn.q_proj.bias" in weights},
        draft_vocab_size=stored.get("draft_vocab_size") or text.vocab_size,
        target_layers=tuple(sorted(set(read))),
        target_hidden_size=stored.get("target_hidden_size") or layer["hidden_size"],
        norm_first=bool(stored.get("norm_before_residual")),
        norm_states=bool(stored.get("norm_before_fc")),
        own_embedding="embed_tokens.weight" in weights,
    )
