"""Hydra heads (arXiv 2402.05109): head i guesses the token after the next i + 1, which it reads beside the state.

Hydra has one block a head; Hydra++ four of them and a decoder layer over the states, the prefix. As in the original the
blocks after the first share their weights, and the prefix layer's positions turn with base 10,000 whatever the target's
do. Unlike it, grouped queries are fine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftdiff.llm.checks import require
from draftdiff.llm.heads import files
from draftdiff.llm.heads.blocks import ResidualBlock
from draftdiff.llm.heads.layers import Stack, layer_fields
from draftdiff.llm.heads.target import TargetParts


@dataclass(frozen=True)
class HydraConfig:
    """heads: tokens that are guessed.  layers: blocks of a head.  prefix: fields of the prefix layer's LlamaConfig,
    None without one.  rank: of what the first block learns, None for full maps.  own_output: whether each head has an
    output layer of its own; else all use the target's."""

    hidden_size: int
    vocab_size: int
    heads: int = 4
    layers: int = 1
    prefix: dict[str, Any] | None = None
    rank: int | None = None
    own_output: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, f"{name} must be a whole number from 1 on, got {value!r}")
        require(self.rank is None or self.rank >= 1, f"rank must be at least 1 or None, got {self.rank}")


class HydraHeads(nn.Module):
    """The heads, for one target, whose embedding (and output layer, if they have none of their own) they use."""

    def __init__(self, config: HydraConfig, target: PreTrainedModel) -> None:
        super().__init__()
        self.settings, width = config, config.hidden_size
        self.target = TargetParts(target)
        self.target.check("heads", width, config.vocab_size)
        self.prefix = None if config.prefix is None else Prefix(LlamaConfig(**config.prefix))
        self.first = nn.ModuleList(
            ResidualBlock((head + 2) * width, width, config.rank) for head in range(config.heads)
        )
        more = config.heads if config.layers > 1 else 0
        self.further = nn.ModuleList(ResidualBlock(width, width) for _ in range(more))
        own = config.heads if config.own_output else 0
        self.outputs = nn.ModuleList(nn.Linear(width, config.vocab_size) for _ in range(own))

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        heads: int = 4,
        layers: int = 1,
        prefix: bool = False,
        rank: int | None = None,
        own_output: bool = True,
    ) -> HydraHeads:
        """New heads, fp32 on the target's device, whose output layers begin as the target's own."""
        text = target.config.get_text_config()
        fields = prefix_fields(target) if prefix else None
        config = HydraConfig(text.hidden_size, text.vocab_size, heads, layers, fields, rank, own_output)
        made = cls(config, target)
        made.target.copy_output(made.outputs)
        return made.to(target.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: PreTrainedModel) -> HydraHeads:
        """The heads of a folder of ours or of the original's, on the target's device in its dtype.

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        stored, weights = files.open_folder(folder, "hydra_lm_head.pt", files.WEIGHTS[0])
        own = files.own_config(stored, "hydra", Path(folder))
        if own is None:
            weights = files.renamed(
                weights, original_names(prefix="prefix" in str(stored.get("hydra_head_arch"))), NOT_OURS
            )

        def make() -> HydraHeads:
            return cls(_published(stored, weights, target) if own is None else HydraConfig(**own), target)

        heads = files.built(make, folder)
        files.fill(heads, weights, folder)
        return heads.to(device=target.device, dtype=target.dtype).eval()

    def states(self, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What the heads read of the target's last hidden states [rows, tokens, width]: themselves, or what the prefix
        layer makes of them. mask: of padding, [rows, tokens].  positions: if not those that follow from it."""
        if self.prefix is None:
            return hidden
        if positions is None:
            count = torch.arange(hidden.shape[1], device=hidden.device)[None]
            positions = count if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        return self.prefix(None, mask, positions, states=hidden).last_hidden_state

    def body(self, head: int, read: Tensor) -> Tensor:
        """Hidden states [..., width] of a head that reads a state and head + 1 embedded tokens [..., (head + 2) *
        width], before its output layer."""
        x = self.first[head](read)
        for _ in range(self.settings.layers - 1):
            x = self.further[head](x)
        return x

    def guess(self, head: int, read: Tensor) -> Tensor:
        """Logits [..., vocabulary] of a head."""
        x = self.body(head, read)
        return self.outputs[head](x) if self.settings.own_output else self.target.output(x)

    def forward(
        self, hidden: Tensor, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> list[Tensor]:
        """Logits of each head at the positions for which all tokens that it reads are known: of head i, [rows, tokens -
        i - 1, vocabulary], a guess of the token i + 2 further on.

        hidden: the target's last hidden states of a text, [rows, tokens, width].  ids: its tokens int64 [rows, tokens].
        """
        states = self.states(hidden, mask, positions)
        embedded = self.target.embed(ids).to(states.dtype)
        found = []
        for head in range(self.settings.heads):
            length = max(ids.shape[1] - head - 1, 0)
            read = [embedded[:, 1 + step : 1 + step + length] for step in range(head + 1)]
            found.append(self.guess(head, torch.cat([states[:, :length], *read], dim=-1)))
        return found


class Prefix(nn.Module):
    """A one-layer Llama over hidden states, with its norm: the prefix attention of Hydra++."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = Stack(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def project(self, states: Tensor) -> Tensor:
        """The target's states [..., width] as they are, in this layer's dtype."""
        return states.to(self.norm.weight.dtype)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any = None,
        *,
        states: Tensor,
        **_: Any,
    ) -> BaseModelOutput:
        """As a `TreeDecoder` calls a model; of tokens it reads the states [rows, tokens, width] alone."""
        found = self.layers(states, None, attention_mask, position_ids, past_key_values)
        return BaseModelOutput(last_hidden_state=self.norm(found))


def prefix_fields(target: PreTrainedModel) -> dict[str, Any]:
    """Fields of a LlamaConfig for a prefix layer of the target's sizes."""
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return layer_fields(target) | base | {"attn_implementation": "sdpa"}


# The target's embedding, which must stay the target's, and what is not used.
NOT_OURS = r"input_embed_fn\.weight|prefix_embeding_layer\.embed_tokens\.weight|.*inv_freq"


def original_names(prefix: bool) -> dict[str, str]:
    """How the original's names become ours: its first block is number 1 where dropout stands between blocks, else 0."""
    return {
        rf"^hydra_mlp\.(\d+)\.{int(prefix)}\.linear\.": r"first.\1.linear.",
        r"^hydra_mlp\.(\d+)\.\d+\.res_connection\.": r"first.\1.residual.",
        r"^hydra_mlp\.(\d+)\.\d+\.linear\.": r"further.\1.linear.",
        r"^hydra_lm_head\.(\d+)\.(1\.)?": r"outputs.\1.",
        r"^prefix_embeding_layer\.": "prefix.",
    }


def _published(stored: dict[str, Any], weights: dict[str, Tensor], target: PreTrainedModel) -> HydraConfig:
    """The config of the original's heads, whose file leaves sizes to the target's."""
    arch, allowed = stored.get("hydra_head_arch"), ("mlp", "prefix-mlp")
    require(arch in allowed, f"hydra_head_arch must be {' or '.join(allowed)}, got {arch!r}")
    for name, only in (("grounded_heads", True), ("hidden_state_offset", 0)):
        got = stored.get(name, only)
        require(got == only, f"{name} must be {only}, got {got!r}")
    fields = None
    if arch == "prefix-mlp":
        fields = prefix_fields(target)
        fields["intermediate_size"] = len(weights["prefix.layers.0.mlp.gate_proj.weight"])
        fields["num_key_value_heads"] = len(weights["prefix.layers.0.self_attn.k_proj.weight"]) // fields["head_dim"]
    vocabulary, width = weights["outputs.0.weight"].shape
    return HydraConfig(width, vocabulary, stored["hydra_num_heads"], stored["hydra_num_layers"], fields)
