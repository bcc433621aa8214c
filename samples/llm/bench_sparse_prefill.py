"""Does reading a prompt by vertical-slash attention pay? A layer's attention, dense (causal SDPA) and sparse, in turns.

Each sparse output is checked, on rows spread over the prompt, against dense fp32 attention under the same mask. Columns
are random: the time does not depend on which they are, unlike the quality, which this does not measure. "Products" is
how many fewer there are; a speed-up beyond it is the kernel's, faster than SDPA's. The whole prefill of a small
random Llama by SpecKV follows, with the layers outside attention in it. Results go to
samples/results/llm-sparse-prefill.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_common import RESULTS, median_and_spread, timed, versions, write_result
from command_line import Parser, device, run, whole

from draftdiff.compare.table import Column, text_table, with_spread
from draftdiff.doctor import device_name
from draftdiff.files import check_writable
from draftdiff.llm import SparsePrefill, SpecKVConfig, speckv
from draftdiff.llm.sparse_prefill import TILE, vertical_slash_attention

EXAMPLES = """examples:
  python samples/llm/bench_sparse_prefill.py
  python samples/llm/bench_sparse_prefill.py --tokens 16384 --pattern 1024 1024 --rounds 9
"""
COLUMNS: tuple[Column, ...] = (
    ("what", "what", str, ""),
    ("tokens", "tokens", str, ""),
    ("columns", "columns", str, ""),
    ("local", "local", str, ""),
    ("dense", "dense_seconds", with_spread(" s", 2), ""),
    ("sparse", "sparse_seconds", with_spread(" s", 2), ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("products", "limit", lambda limit: "" if limit is None else f"{limit:.2f}x", ""),
)
CHECKED_ROWS = 256


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each call in each round."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, kept in zip(calls, seconds):
            kept.append(timed(call, device)[1])
    return seconds


def row_of(seconds: Sequence[Sequence[float]], **given: Any) -> dict[str, Any]:
    dense, sparse = seconds
    return given | {
        "dense_seconds": median_and_spread(dense),
        "sparse_seconds": median_and_spread(sparse),
        "speedup": median_and_spread([a / b for a, b in zip(dense, sparse)]),
    }


def attention_row(tokens: int, columns: int, local: int, options: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, options.head_dim) for heads in (options.heads, options.key_heads, options.key_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(options.device) for shape in shapes)
    chosen = torch.stack(
        [torch.randperm(tokens, generator=generator)[:columns].sort().values for _ in range(options.key_heads)]
    )[None].to(options.device)
    scale = 1 / math.sqrt(options.head_dim)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def sparse() -> Tensor:
        return vertical_slash_attention(q, k, v, chosen, local=local, scale=scale)

    dense()
    out = sparse().transpose(1, 2)
    rows = torch.linspace(0, tokens - 1, CHECKED_ROWS).long().to(options.device)
    reads = readable(rows, chosen, tokens, local).repeat_interleave(options.heads // options.key_heads, dim=1)
    truth = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=reads, scale=scale, enable_gqa=True)
    error = float((out[:, :, rows] - truth).norm() / truth.norm())
    # Of all rows: what each reads of its columns and band, each key once, over all that a causal row reads.
    everything = torch.arange(tokens, device=options.device)
    read = sum(int(readable(part, chosen[:, :1], tokens, local).sum()) for part in everything.split(1024))
    return row_of(
        in_turns((dense, sparse), options.rounds, options.device),
        what="attention",
        tokens=tokens,
        columns=columns,
        local=local,
        limit=tokens * (tokens + 1) / 2 / read,
        relative_l2=error,
    )


def readable(rows: Tensor, columns: Tensor, tokens: int, local: int) -> Tensor:
    """Which keys the given rows read, bool [1, key heads, rows, tokens]."""
    key = torch.arange(tokens, device=rows.device)
    is_column = torch.zeros(*columns.shape[:2], 1, tokens, dtype=torch.bool, device=rows.device)
    is_column.scatter_(3, columns[:, :, None], True)
    band = key >= (rows // TILE * TILE - (local - TILE))[:, None]
    return (is_column | band) & (key <= rows[:, None])


def prefill_row(tokens: int, columns: int, local: int, options: argparse.Namespace) -> dict[str, Any]:
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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(options.device).eval()
    ids = torch.randint(1, 1024, (1, tokens)).to(options.device)
    pattern = SparsePrefill(columns=columns, local=local)
    settings = [SpecKVConfig(capacity=256, lookahead=0, sparse_prefill=chosen) for chosen in (None, pattern)]
    calls = [lambda chosen=chosen: speckv(model, None, ids, chosen) for chosen in settings]
    for call in calls:
        call()
    return row_of(
        in_turns(calls, options.rounds, options.device),
        what="SpecKV prefill, 2 layers",
        tokens=tokens,
        columns=columns,
        local=local,
        limit=None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns the exit code: 1 if sparse attention differs from its mask's, 2 for a wrong argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="bench_sparse_prefill.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=whole(1), nargs="+", default=[4096, 8192, 16384])
    parser.add_argument(
        "--pattern",
        type=int,
        nargs=2,
        action="append",
        metavar=("COLUMNS", "LOCAL"),
        help="may be repeated (default: 2048 2048, the paper's, and 1024 1024, 512 512)",
    )
    parser.add_argument("--heads", type=whole(1), default=4)
    parser.add_argument("--key-heads", type=whole(1), default=1)
    parser.add_argument("--head-dim", type=whole(1), default=128)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: samples/results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    options = parser.parse_args(arguments)
    patterns = options.pattern or [(2048, 2048), (1024, 1024), (512, 512)]
    try:
        for columns, local in patterns:
            SparsePrefill(columns=columns, local=local)
        if options.heads % options.key_heads:
            raise ValueError(f"--heads must be a multiple of --key-heads {options.key_heads}, got {options.heads}")
        check_writable(options.output)
        plan = [
            (measure, tokens, columns, local)
            for measure, tokens, (columns, local) in itertools.product(
                (attention_row, prefill_row), options.tokens, patterns
            )
            if tokens > columns + local  # else the prompt is read densely
        ]
        if not plan:
            least = min(map(sum, patterns))
            raise ValueError(f"--tokens must have one above {least}, or all is read densely, got {max(options.tokens)}")
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    rows = [
        measure(tokens, columns, local, options)
        for measure, tokens, columns, local in tqdm(plan, desc="bench_sparse_prefill", unit="row")
    ]
    payload = {
        "made_by": "samples/llm/bench_sparse_prefill.py",
        "device": device_name(options.device),
        "versions": versions(),
        "command": shlex.join(["python", "samples/llm/bench_sparse_prefill.py", *arguments]),
        "threads": torch.get_num_threads(),
        "heads": options.heads,
        "key_heads": options.key_heads,
        "head_dim": options.head_dim,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "rows": rows,
    }
    write_result(options.output / "llm-sparse-prefill.json", payload)
    print(json.dumps(payload, indent=1) if options.json else "\n".join(text_table(rows, COLUMNS)))
    wrong = [row for row in rows if not row.get("relative_l2", 0.0) <= 1e-4]
    for row in wrong:
        print(f"{parser.prog}: failed: {row['tokens']} tokens differ from attention under the mask", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
