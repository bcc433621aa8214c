"""Does reading a prompt by vertical-slash attention pay? A layer's attention, dense (causal SDPA) and sparse, in turns.

Each sparse output is checked, on rows spread over the prompt, against dense fp32 attention under the same mask. Columns
are random: the time does not depend on which they are, unlike the quality, which this does not measure. "Products" is
how many fewer there are; a speed-up beyond it is the kernel's, faster than SDPA's. The whole prefill of a small
random Llama by SpecKV follows, with the layers outside attention in it.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from draftdiff.bench.runner import Routine, in_turns, ratios, warmed
from draftdiff.compare.metrics import relative_l2
from draftdiff.compare.table import Column, spread, text_table, with_spread
from draftdiff.errors import UserError, user_errors
from draftdiff.llm import SparsePrefill, SpecKVConfig, speckv
from draftdiff.llm.sparse_prefill import TILE, vertical_slash_attention

COLUMNS: tuple[Column, ...] = (
    ("what", "what", str, ""),
    ("tokens", "tokens", str, ""),
    ("columns", "columns", str, ""),
    ("local", "local", str, ""),
    ("dense", "dense_seconds", with_spread(" s", 2), ""),
    ("sparse", "sparse_seconds", with_spread(" s", 2), ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("products", "limit", "{:.2f}x".format, ""),
)
PATTERNS = ((2048, 2048), (1024, 1024), (512, 512))
CHECKED_ROWS = 256
TOLERANCE = 1e-4


@dataclass
class Row:
    """limit: how many fewer products there are.  relative_l2: to attention under the mask."""

    what: str
    tokens: int
    columns: int
    local: int
    limit: float | None = None
    relative_l2: float | None = None
    dense_seconds: dict[str, float] | None = None
    sparse_seconds: dict[str, float] | None = None
    speedup: dict[str, float] | None = None


class Prefill(Routine):
    name = "llm prefill"
    file = "llm-sparse-prefill"

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        self.patterns = options.pattern or PATTERNS
        with user_errors():
            for columns, local in self.patterns:
                SparsePrefill(columns=columns, local=local)
        if options.heads % options.key_heads:
            raise UserError(f"--heads must be a multiple of --key-heads {options.key_heads}, got {options.heads}")
        if not self.cases():
            least = min(map(sum, self.patterns))
            raise UserError(f"--tokens must have one above {least}, or all is read densely, got {max(options.tokens)}")

    def cases(self) -> list[tuple[Callable[..., Row], int, int, int]]:
        plan = product((self.attention, self.prefill), self.options.tokens, self.patterns)
        # Else the prompt is read densely.
        return [(kind, tokens, *pattern) for kind, tokens, pattern in plan if tokens > sum(pattern)]

    def about(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("heads", "key_heads", "head_dim")}

    def measure(self, case: tuple[Callable[..., Row], int, int, int]) -> list[dict[str, Any]]:
        kind, *sizes = case
        return [asdict(kind(*sizes))]

    def attention(self, tokens: int, columns: int, local: int) -> Row:
        """One layer's attention."""
        options, generator = self.options, torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, tokens, options.head_dim, generator=generator).to(self.device)
            for heads in (options.heads, options.key_heads, options.key_heads)
        )
        drawn = [torch.randperm(tokens, generator=generator)[:columns].sort().values for _ in range(options.key_heads)]
        chosen, scale = torch.stack(drawn)[None].to(self.device), 1 / math.sqrt(options.head_dim)
        dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        sparse = partial(vertical_slash_attention, q, k, v, chosen, local=local, scale=scale)
        rows = torch.linspace(0, tokens - 1, CHECKED_ROWS).long().to(self.device)
        reads = readable(rows, chosen, tokens, local).repeat_interleave(options.heads // options.key_heads, dim=1)
        truth = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=reads, scale=scale, enable_gqa=True)
        error = relative_l2(sparse().transpose(1, 2)[:, :, rows], truth)
        if not error <= TOLERANCE:
            self.failures.append(f"{tokens} tokens differ from attention under the mask")
        # Of all rows: what each reads of its columns and band, each key once, over all that a causal row reads.
        everything = torch.arange(tokens, device=self.device)
        read = sum(int(readable(part, chosen[:, :1], tokens, local).sum()) for part in everything.split(1024))
        row = Row("attention", tokens, columns, local, tokens * (tokens + 1) / 2 / read, error)
        return self.timed(row, dense, sparse)

    def prefill(self, tokens: int, columns: int, local: int) -> Row:
        """The whole prompt through two layers."""
        options = self.options
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama",
            hidden_size=options.heads * options.head_dim,
            intermediate_size=4 * options.heads * options.head_dim,
            num_hidden_layers=2,
            num_attention_heads=options.heads,
            num_key_value_heads=options.key_heads,
            vocab_size=1024,
            max_position_embeddings=tokens,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
        model = model.to(self.device).eval()
        ids = torch.randint(1, 1024, (1, tokens)).to(self.device)
        dense, sparse = (
            partial(speckv, model, None, ids, SpecKVConfig(capacity=256, lookahead=0, sparse_prefill=pattern))
            for pattern in (None, SparsePrefill(columns=columns, local=local))
        )
        return self.timed(Row("SpecKV prefill, 2 layers", tokens, columns, local), dense, sparse)

    def timed(self, row: Row, dense: Callable[[], Any], sparse: Callable[[], Any]) -> Row:
        makers = {"dense": warmed(dense, self.device), "sparse": warmed(sparse, self.device)}
        seconds, _ = in_turns(makers, self.options.rounds)
        row.dense_seconds, row.sparse_seconds = spread(seconds["dense"]), spread(seconds["sparse"])
        row.speedup = spread(ratios(seconds["dense"], seconds["sparse"]))
        return row

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["rows"], COLUMNS)


def readable(rows: Tensor, columns: Tensor, tokens: int, local: int) -> Tensor:
    """Which keys the given rows read, bool [1, key heads, rows, tokens]."""
    key = torch.arange(tokens, device=rows.device)
    is_column = torch.zeros(*columns.shape[:2], 1, tokens, dtype=torch.bool, device=rows.device)
    is_column.scatter_(3, columns[:, :, None], True)
    band = key >= (rows // TILE * TILE - (local - TILE))[:, None]
    return (is_column | band) & (key <= rows[:, None])
