"""Does the draft map pay at the last scales of VAR and Infinity? Their attention, dense and block-sparse, side by side.

A token of the current scale reads the cached history wholly and of its own scale what the draft map chooses
(`draftdiff.var.last_scales`). Draft, selection and the change of layout are in the times. A density of 1 shows what of
the gain is the kernel's: it keeps everything, and must give dense attention, which is checked. "At most" is what the
skipped products alone could gain. Results go to samples/results/<device>-var-attention.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_common import RESULTS, device_slug, median_and_spread, timed, versions, write_result

from draftdiff.compare.metrics import relative_l2
from draftdiff.compare.table import Column, text_table, with_spread
from draftdiff.files import check_writable
from draftdiff.models.devices import device_name
from draftdiff.var.last_scales import attend_scale

EXAMPLES = """examples:
  python samples/bench_var_attention.py
  python samples/bench_var_attention.py --device cuda --heads 16 --batch 16
"""
COLUMNS: tuple[Column, ...] = (
    ("scale", "scale", str, ""),
    ("history", "history", str, ""),
    ("kept", "density", "{:.0%}".format, ""),
    ("dense", "dense_seconds", with_spread(" s", 4), ""),
    ("sparse", "sparse_seconds", with_spread(" s", 4), ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("at most", "limit", "{:.2f}x".format, ""),
    ("scale's speed-up", "scale_speedup", "{:.2f}x".format, ""),
)


@dataclass(frozen=True)
class Case:
    """side: of the current scale.  history: tokens of all earlier ones.  linear: operations per token and layer outside
    self-attention, over the width."""

    model: str
    side: int
    history: int
    head_dim: int
    width: int
    linear: int

    def attention_share(self, history: int) -> float:
        """Of a scale's operations."""
        attention = 4 * (history + self.side**2)
        return attention / (attention + self.linear * self.width)


# Projections are 8, the feed-forward 16 times width squared; Infinity's attention to the prompt has another 4.
CASES = (
    Case("VAR-d36 512px", 24, 640, 64, 2304, 24),
    Case("VAR-d36 512px", 32, 1216, 64, 2304, 24),
    Case("Infinity-2B 1M", 48, 4121, 128, 2048, 28),
    Case("Infinity-2B 1M", 64, 6425, 128, 2048, 28),
)


def measure(
    case: Case, history: int, density: float, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One row; `history` tokens are left of the case's."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.heads, history + case.side**2, case.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    q, scale = q[:, :, history:].contiguous(), 1 / math.sqrt(case.head_dim)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def sparse(kept: float = density) -> Tensor:
        return attend_scale(q, k, v, (case.side, case.side), kept, scale)

    error = relative_l2(sparse(1.0), dense())
    times: dict[Any, list[float]] = {dense: [], sparse: []}
    for call in times:
        call()
    for call in [call for _ in range(options.rounds) for call in times]:
        times[call].append(timed(call, device)[1])
    ratios = [a / b for a, b in zip(times[dense], times[sparse])]
    share, speedup = case.attention_share(history), median_and_spread(ratios)
    current = case.side**2 / (history + case.side**2)
    return {
        "model": case.model,
        "scale": f"{case.model}, {case.side}x{case.side}",
        "history": history,
        "density": density,
        "dense_seconds": median_and_spread(times[dense]),
        "sparse_seconds": median_and_spread(times[sparse]),
        "speedup": speedup,
        "limit": 1 / (1 - (1 - density) * current),
        "attention_share": share,
        "scale_speedup": 1 / (1 - share + share / speedup["median"]),
        "full_selection_relative_l2": error,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run it. Returns the exit code: 1 if full selection differs from dense attention, 2 for a wrong argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="bench_var_attention.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--density", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="kept share (default: 1 0.5 0.25)"
    )
    parser.add_argument("--budget", type=float, default=0.1, help="ScaleKV's, for the shorter history (default: 0.1)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--last-only", action="store_true", help="only the last scale of each model")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: samples/results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    options = parser.parse_args(arguments)
    try:
        for name, values in (("density", options.density), ("budget", [options.budget])):
            for value in values:
                if not 0 < value <= 1:
                    raise ValueError(f"--{name} must be above 0 and at most 1, got {value}")
        check_writable(options.output)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    cases = CASES[1::2] if options.last_only else CASES
    rows = []
    plan = list(itertools.product(cases, (1.0, options.budget), options.density))
    for case, share, density in tqdm(plan, desc="bench_var_attention", unit="row"):
        rows.append(measure(case, round(case.history * share), density, options, device, dtype))
    payload = {
        "made_by": "samples/bench_var_attention.py",
        "device": device_name(device),
        "versions": versions(),
        "command": shlex.join(["python", "samples/bench_var_attention.py", *arguments]),
        "heads": options.heads,
        "batch": options.batch,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "rows": rows,
    }
    write_result(options.output / f"{device_slug(device)}-var-attention.json", payload)
    print(json.dumps(payload, indent=1) if options.json else "\n".join(text_table(rows, COLUMNS)))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    wrong = [row for row in rows if not row["full_selection_relative_l2"] <= tolerance]
    for row in wrong:
        print(f"{parser.prog}: failed: {row['scale']} differs from dense attention", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
