"""The class-conditional next-scale transformer (VAR, arXiv 2404.02905)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from draftdiff.errors import UserError
from draftdiff.var.cache import KVCache
from draftdiff.var.checkpoint import Tensors, count, heads, rename, shape
from draftdiff.var.layers import AdaLayerNormOut, CosineAttention, FeedForward, NextScaleModel, Step, modulate
from draftdiff.var.vq_model import PATCH_NUMS_256, PATCH_NUMS_512

ORIGINAL_NAMES = (
    (r"^class_embed\.", "class_emb."),
    (r"^start_embed$", "pos_start"),
    (r"^pos_embed$", "pos_1LC"),
    (r"^level_embed\.", "lvl_embed."),
    (r"^proj_in\.", "word_embed."),
    (r"^proj_out\.", "head."),
    (r"^norm_out\.linear\.", "head_nm.ada_lin.1."),
    (r"^adaln\.", "shared_ada_lin.1."),
    (r"\.adaln\.", ".ada_lin.1."),
    (r"\.adaln_offset$", ".ada_gss"),
    (r"\.to_qkv\.weight$", ".mat_qkv.weight"),
    (r"\.log_scale$", ".scale_mul_1H11"),
    (r"\.to_out\.", ".proj."),
    (r"\.ff\.linear_in\.", ".ffn.fc1."),
    (r"\.ff\.linear_out\.", ".ffn.fc2."),
)


class VARTransformerBlock(nn.Module):
    """Attention and feed-forward, modulated and gated by six vectors of the condition.

    Those come from a linear layer of the block or, with `shared_adaln`, from one of the model plus the block's offset.
    """

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, qk_norm: bool, shared_adaln: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn = CosineAttention(dim, heads, qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, hidden)
        self.adaln_offset: Any = nn.Parameter(torch.zeros(6, dim)) if shared_adaln else None
        self.adaln: Any = None if shared_adaln else nn.Linear(dim, 6 * dim)

    def modulation(self, condition: Tensor, shared: Any) -> tuple[Tensor, ...]:
        """Gates, scales and shifts of both branches, each [batch, 1, dim], from the condition [batch, dim]."""
        own = self.adaln is not None
        vectors = self.adaln(F.silu(condition)).unflatten(-1, (6, -1)) if own else shared + self.adaln_offset
        return vectors[:, :, None].unbind(1)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...], step: Step) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x = x + gate1 * self.attn(modulate(self.norm1(x), scale1, shift1), step)
        return x + gate2 * self.ff(modulate(self.norm2(x), scale2, shift2))


class VARTransformer2DModel(NextScaleModel, ModelMixin):  # diffusers loads a class whose module has ModelMixin
    """Predicts the code indices of a scale from its class and the picture so far.

    num_layers, num_attention_heads, attention_head_dim: width is heads times head_dim.  in_channels: size of a code.
    vocab_size: number of codes.  num_classes: classes 0 to num_classes - 1; the class num_classes means none of them.
    patch_nums: side of each scale in tokens.  shared_adaln: see VARTransformerBlock.  qk_norm: cosine attention.
    """

    _no_split_modules = ("VARTransformerBlock",)
    _repeated_blocks = ("VARTransformerBlock",)
    _skip_layerwise_casting_patterns = ("class_embed", "pos_embed", "level_embed", "norm")

    @register_to_config
    def __init__(
        self,
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        in_channels: int = 32,
        vocab_size: int = 4096,
        num_classes: int = 1000,
        patch_nums: tuple[int, ...] = PATCH_NUMS_256,
        mlp_ratio: float = 4.0,
        shared_adaln: bool = False,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        self.lengths = [side**2 for side in patch_nums]
        self.starts = [0, *accumulate(self.lengths)]
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.start_embed = nn.Parameter(torch.zeros(1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(self.starts[-1], dim))
        self.level_embed = nn.Embedding(len(self.lengths), dim)
        self.proj_in = nn.Linear(in_channels, dim)
        self.adaln = nn.Linear(dim, 6 * dim) if shared_adaln else None
        self.blocks = nn.ModuleList(
            VARTransformerBlock(dim, num_attention_heads, round(dim * mlp_ratio), norm_eps, qk_norm, shared_adaln)
            for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormOut(dim, norm_eps)
        self.proj_out = nn.Linear(dim, vocab_size)
        self._init_weights(self.start_embed, self.pos_embed)
        for block in self.blocks:  # residual branches start small, and open as the gates do
            nn.init.normal_(block.attn.to_out.weight, std=0.02 / math.sqrt(2 * num_layers))
            nn.init.normal_(block.ff.linear_out.weight, std=0.02 / math.sqrt(2 * num_layers))

    def forward(
        self,
        hidden_states: Tensor | None,
        class_labels: Tensor,
        *,
        first_scale: int = 0,
        logits_from: int | None = None,
        cache: KVCache | None = None,
        keep: bool = True,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Logits of one scale, or of several at once under the block-causal law of the scales.

        hidden_states: [batch, tokens, in_channels], the latents so far at the size of each scale, for `first_scale` and
        as many scales after it as there are tokens for. Scale 0 starts from the class alone: with first_scale=0 its
        token is added here, and hidden_states begins with scale 1 (None for scale 0 alone).
        class_labels: int64 [batch].
        logits_from: the first scale whose logits are wanted, first_scale if None.
        cache: holds the scales before first_scale, and with `keep` also these afterwards. Training needs none:
        `model(teacher_inputs, labels).sample` are the logits of all scales.

        Returns logits [batch, tokens of the wanted scales, vocab_size]. Raises ValueError for a number of tokens that
        is not that of whole scales.
        """
        tokens = (hidden_states.shape[1] if hidden_states is not None else 0) + (first_scale == 0)
        begin = self.starts[first_scale]
        if begin + tokens not in self.starts[first_scale + 1 :]:
            allowed = [end - begin - (first_scale == 0) for end in self.starts[first_scale + 1 :]]
            raise UserError(f"from scale {first_scale} the tokens must be one of {allowed}, got {tokens}")
        end = self.starts.index(begin + tokens)
        lengths = self.lengths[first_scale:end]

        condition = self.class_embed(class_labels)
        step = Step(lengths, cache, keep)
        modulations = step.once("modulation", lambda: self._modulations(condition))
        return self._logits(
            hidden_states,
            condition,
            ((modulation,) for modulation in modulations),
            step,
            positions=self.pos_embed[begin : begin + tokens],
            first_scale=first_scale,
            logits_from=logits_from,
            return_dict=return_dict,
        )

    def _modulations(self, condition: Tensor) -> list[tuple[Tensor, ...]]:
        """Of every block: a condition holds for a whole generation, so a cache keeps them."""
        shared = None
        if self.adaln is not None:
            shared = self.adaln(F.silu(condition)).unflatten(-1, (6, -1))
        return [block.modulation(condition, shared) for block in self.blocks]

    @classmethod
    def original_config(cls, tensors: Tensors) -> dict[str, Any]:
        """Constructor arguments that fit a checkpoint."""
        vocabulary, dim = shape(tensors, "head.weight", 2)
        scale = "blocks.0.attn.scale_mul_1H11"
        qk_norm = scale in tensors
        number = heads(tensors, scale) if qk_norm else max(dim // 64, 1)
        return {
            "num_layers": count(tensors, r"blocks\.(\d+)\."),
            "num_attention_heads": number,
            "attention_head_dim": dim // number,
            "in_channels": shape(tensors, "word_embed.weight", 2)[1],
            "vocab_size": vocabulary,
            "num_classes": shape(tensors, "class_emb.weight", 2)[0] - 1,
            "patch_nums": _patch_nums(tensors),
            "mlp_ratio": shape(tensors, "blocks.0.ffn.fc1.weight", 2)[0] / dim,
            "shared_adaln": "shared_ada_lin.1.weight" in tensors,
            "qk_norm": qk_norm,
        }

    def original_names(self, tensors: Tensors) -> Callable[[str], str]:
        """From our parameter names to those of a checkpoint."""
        return lambda key: rename(key, ORIGINAL_NAMES)


def _patch_nums(tensors: Tensors) -> tuple[int, ...]:
    """Sides of the scales: from the level of each token if that was saved, else a released schedule of that length."""
    if "lvl_1L" in tensors:
        # Their numbers may have been cast with the weights; up to 2048 half precision holds them.
        levels, lengths = tensors["lvl_1L"].flatten().double().unique_consecutive(return_counts=True)
        sides = tuple(math.isqrt(n) for n in lengths.tolist())
        if levels.tolist() != list(range(len(levels))) or [n * n for n in sides] != lengths.tolist():
            raise UserError("its lvl_1L does not number the tokens by scales that are squares, from 0 on")
        return sides
    tokens = shape(tensors, "pos_1LC", 3)[1]
    for known in (PATCH_NUMS_256, PATCH_NUMS_512):
        if sum(side**2 for side in known) == tokens:
            return known
    raise UserError(f"its {tokens} tokens are no released schedule's, and it lacks lvl_1L, which tells the scales")
