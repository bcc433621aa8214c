"""The text-conditional next-scale transformer that predicts bits (Infinity, arXiv 2412.04431)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from draftdiff.errors import UserError
from draftdiff.var.cache import KVCache
from draftdiff.var.checkpoint import Tensors, count, heads, rename, shape
from draftdiff.var.layers import AdaLayerNormOut, CosineAttention, FeedForward, NextScaleModel, Step, modulate

TEXT_HEAD_DIM = 128  # of the pooling over text: its heads are text channels / 128

ORIGINAL_NAMES = (
    (r"^uncond_embed$", "cfg_uncond"),
    (r"^start_embed$", "pos_start"),
    (r"^level_embed\.", "lvl_embed."),
    (r"^proj_in\.", "word_embed."),
    (r"^proj_out\.", "head."),
    (r"^norm_out\.linear\.", "head_nm.ada_lin.1."),
    (r"^adaln\.", "shared_ada_lin.1."),
    (r"^norm_text\.", "text_norm."),
    (r"^text_pool\.query$", "text_proj_for_sos.ca.mat_q"),
    (r"^text_pool\.", "text_proj_for_sos.ca."),
    (r"^text_in\.", "text_proj_for_ca.0."),
    (r"^text_out\.", "text_proj_for_ca.2."),
    (r"\.adaln_offset$", ".ada_gss"),
    (r"\.attn1\.", ".sa."),
    (r"\.attn2\.", ".ca."),
    (r"\.norm2\.", ".ca_norm."),
    (r"\.to_qkv\.weight$", ".mat_qkv.weight"),
    (r"\.to_kv\.weight$", ".mat_kv.weight"),
    (r"\.to_q\.", ".mat_q."),
    (r"\.log_scale$", ".scale_mul_1H11"),
    (r"\.to_out\.", ".proj."),
    (r"\.ff\.linear_in\.", ".ffn.fc1."),
    (r"\.ff\.linear_out\.", ".ffn.fc2."),
)


@lru_cache(maxsize=64)
def rotations(
    scale: tuple[int, int], reference: tuple[int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2-D rotary positions, fp32 [tokens, head_dim / 2], of a scale's cells in raster order.

    A cell stands where it would be in the reference grid. Half of the channel pairs turn with the row, half with the
    column.
    """
    half = head_dim // 2
    frequencies = 1 / 10000 ** (torch.arange(0, half, 2, device=device).float() / half)
    rows, columns = ((torch.arange(n, device=device) * (whole / n)).round() for n, whole in zip(scale, reference))
    angles = torch.cat(
        [
            (rows[:, None] * frequencies)[:, None].expand(-1, scale[1], -1),
            (columns[:, None] * frequencies)[None].expand(scale[0], -1, -1),
        ],
        dim=-1,
    ).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn neighbouring channels of x [batch, heads, tokens, head_dim] as pairs."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


class TextPool(nn.Module):
    """A learned query reads the prompt: text [batch, tokens, text_dim] to [batch, dim]."""

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.heads = max(text_dim // TEXT_HEAD_DIM, 1)
        self.query = nn.Parameter(torch.zeros(self.heads, dim // self.heads))
        self.to_kv = nn.Linear(text_dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """mask: bool [batch, 1, 1, tokens], False for padding."""
        key, value = rearrange(self.to_kv(text), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        query = self.query[None, :, None].expand(len(text), -1, -1, -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(out.flatten(1))


class TextAttention(nn.Module):
    """Every token reads the prompt; keys and values of the prompt are computed once per generation."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, step: Step) -> Tensor:
        """x [batch, tokens, dim], text [batch, text tokens, dim], mask bool [batch, 1, 1, text tokens]."""

        def project() -> Tensor:
            return rearrange(self.to_kv(text), "b t (two h d) -> two b h t d", two=2, h=self.heads)

        key, value = step.once(("text", step.layer), project)
        query = rearrange(self.to_q(x), "b l (h d) -> b h l d", h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))


class InfinityTransformerBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; the first and the last modulated and gated."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = CosineAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.attn2 = TextAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, hidden)
        self.adaln_offset = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor, mask: Tensor | None, step: Step) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = (modulation + self.adaln_offset)[:, :, None].unbind(1)
        x = x + gate1 * self.attn1(modulate(self.norm1(x), scale1, shift1), step)
        x = x + self.attn2(self.norm2(x), text, mask, step)
        return x + gate2 * self.ff(modulate(self.norm3(x), scale2, shift2))


class InfinityTransformer2DModel(NextScaleModel, ModelMixin):  # diffusers loads a class whose module has ModelMixin
    """Predicts the bits of every token of a scale from a prompt and the picture so far.

    num_layers, num_attention_heads, attention_head_dim: width is heads times head_dim.  bits: per token.
    text_dim: channels of the text encoder.  text_tokens: the longest prompt.  num_levels: most scales.
    """

    _no_split_modules = ("InfinityTransformerBlock",)
    _repeated_blocks = ("InfinityTransformerBlock",)
    _skip_layerwise_casting_patterns = ("level_embed", "norm")

    @register_to_config
    def __init__(
        self,
        num_layers: int = 32,
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        bits: int = 32,
        text_dim: int = 2048,
        text_tokens: int = 512,
        num_levels: int = 15,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        hidden = max(round(dim * mlp_ratio / 256) * 256, 256)
        self.gradient_checkpointing = False
        self.uncond_embed = nn.Parameter(torch.randn(text_tokens, text_dim) / math.sqrt(text_dim))
        self.start_embed = nn.Parameter(torch.zeros(1, dim))
        self.level_embed = nn.Embedding(num_levels, dim)
        self.norm_text = nn.RMSNorm(text_dim, 1e-6)
        self.text_pool = TextPool(dim, text_dim)
        self.text_in = nn.Linear(text_dim, dim)
        self.text_out = nn.Linear(dim, dim)
        self.proj_in = nn.Linear(bits, dim)
        self.adaln = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            InfinityTransformerBlock(dim, num_attention_heads, hidden, norm_eps) for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormOut(dim, norm_eps)
        self.proj_out = nn.Linear(dim, 2 * bits)
        self._init_weights(self.text_pool.query, self.start_embed)

    def forward(
        self,
        hidden_states: Tensor | None,
        encoder_hidden_states: Tensor,
        scales: Sequence[tuple[int, int]],
        reference: tuple[int, int],
        *,
        encoder_attention_mask: Tensor | None = None,
        first_scale: int = 0,
        logits_from: int | None = None,
        cache: KVCache | None = None,
        keep: bool = True,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Logits of one scale, or of several at once under the block-causal law of the scales.

        hidden_states: [batch, tokens, bits], the latents so far at the size of each scale; scale 0 starts from the
        prompt alone, so with first_scale=0 it begins with the scale after it (None for scale 0 alone).
        encoder_hidden_states: [batch, text tokens, text_dim] of the text encoder, with encoder_attention_mask bool
        [batch, text tokens], False for padding, None if there is none.
        scales: (height, width) in tokens of each scale of this call.  reference: the grid of rotary positions.
        first_scale: number of the first of them.  logits_from: number of the first whose logits are wanted.
        cache: holds the scales before, and with `keep` also these afterwards.

        Returns logits [batch, tokens of the wanted scales, 2 * bits], for each bit those of 0 and of 1.
        Raises ValueError for a number of tokens that is not that of the scales.
        """
        lengths = [h * w for h, w in scales]
        given = hidden_states.shape[1] if hidden_states is not None else 0
        if given + (first_scale == 0) != sum(lengths):
            raise UserError(f"the scales have {sum(lengths)} tokens, got {given + (first_scale == 0)}")

        head_dim, device = self.config.attention_head_dim, encoder_hidden_states.device
        angles = [rotations(tuple(scale), tuple(reference), head_dim, device) for scale in scales]
        cosine, sine = (torch.cat(parts) for parts in zip(*angles))
        step = Step(lengths, cache, keep, lambda tensor: rotate(tensor, cosine, sine))
        pooled, text, mask, modulation = step.once(
            "condition", lambda: self._condition(encoder_hidden_states, encoder_attention_mask)
        )
        return self._logits(
            hidden_states,
            pooled,
            repeat((modulation, text, mask)),
            step,
            first_scale=first_scale,
            logits_from=logits_from,
            return_dict=return_dict,
        )

    def _condition(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Pooled prompt [batch, dim], its tokens [batch, text tokens, dim], mask and modulation [batch, 6, dim]."""
        dtype = self.proj_in.weight.dtype
        text = F.rms_norm(text.float(), text.shape[-1:], self.norm_text.weight.float(), 1e-6).to(dtype)
        mask = None if mask is None or bool(mask.all()) else mask[:, None, None, :]
        pooled = self.text_pool(text, mask)
        memory = self.text_out(F.gelu(self.text_in(text), approximate="tanh"))
        return pooled, memory, mask, self.adaln(F.silu(pooled)).unflatten(-1, (6, -1))

    @classmethod
    def original_config(cls, tensors: Tensors) -> dict[str, Any]:
        """Constructor arguments that fit a checkpoint."""
        dim, bits = shape(tensors, "word_embed.weight", 2)
        block = "block_chunks.0.module.0" if "block_chunks.0.module.0.ada_gss" in tensors else "blocks.0"
        text_tokens, text_dim = shape(tensors, "cfg_uncond", 2)
        number = heads(tensors, f"{block}.sa.scale_mul_1H11")
        return {
            "num_layers": count(tensors, r"((?:block_chunks\.\d+\.module|blocks)\.\d+)\."),
            "num_attention_heads": number,
            "attention_head_dim": dim // number,
            "bits": bits,
            "text_dim": text_dim,
            "text_tokens": text_tokens,
            "num_levels": shape(tensors, "lvl_embed.weight", 2)[0],
            "mlp_ratio": shape(tensors, f"{block}.ffn.fc1.weight", 2)[0] / dim,
        }

    def original_names(self, tensors: Tensors) -> Callable[[str], str]:
        """From our parameter names to those of a checkpoint, whose blocks may stand in chunks."""
        chunks = count(tensors, r"block_chunks\.(\d+)\.module\.\d+\.")
        per_chunk = self.config.num_layers // chunks if chunks else 0

        def chunked(match: re.Match) -> str:
            chunk, block = divmod(int(match[1]), per_chunk)
            return f"block_chunks.{chunk}.module.{block}."

        def name(key: str) -> str:
            key = rename(key, ORIGINAL_NAMES)
            return re.sub(r"^blocks\.(\d+)\.", chunked, key) if chunks else key

        return name
