"""What SpecKV, SpecPC and their cascade keep, on the mini pair and unseen program text, against the window alone.

For each prompt the target continues greedily on its full cache; that continuation and the attention it pays are the
truth. Kept mass and recall: see draftdiff.llm.future_attention. Agreement: tokens of the continuation on the cut cache
that are the truth's, place by place, which one different token early on can spoil. "Perfect" takes the target as its
own draft: the lookahead is then the truth, and what is left is the rule's own loss. Results go to
samples/results/llm-spec-kv.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, whole
from draftdiff.compare.table import Column, text_table
from draftdiff.errors import UserError
from draftdiff.files import prepare_folder
from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import SpecKVConfig, SpecPCConfig, speckv, speckv_pc, specpc
from draftdiff.llm.future_attention import future_attention, kept_mass, kept_recall
from draftdiff.llm.train.stdlib_corpus import PYTHON, corpus_texts
from draftdiff.models.devices import versions
from draftdiff.pipelines.mini.llm import load_mini_llm

RESULTS = Path(__file__).resolve().parents[1] / "results"
EXAMPLES = """examples:
  python samples/llm/score_spec_kv.py
  python samples/llm/score_spec_kv.py --capacity 64 --prompts 8
"""


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


COLUMNS: tuple[Column, ...] = (
    ("method", "method", str, ""),
    ("capacity", "capacity", str, ""),
    ("kept mass", "kept_mass", share, ""),
    ("better than window", "wins", lambda wins: "" if wins is None else str(wins), ""),
    ("recall", "kept_recall", share, ""),
    ("agreement", "agreement", share, ""),
    ("cache", "cache_share", share, ""),
)


def prompts(tokenizer: Any, count: int, tokens: int) -> list[Tensor]:
    """The middle of that many held-out files that are long enough, int64 [1, tokens] each."""
    found = []
    for text in corpus_texts(held_out=True):
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        start = (ids.shape[1] - tokens) // 2
        if start > 0:
            found.append(ids[:, start : start + tokens])
        if len(found) == count:
            return found
    raise UserError(f"--prompts must be at most {len(found)}, the held-out files of {tokens} tokens, got {count}")


class Scores:
    """The pair, its prompts, and the truth about each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.target, self.draft, tokenizer = load_mini_llm()
        self.ids = prompts(tokenizer, options.prompts, options.tokens)
        steps = tqdm(self.ids, desc="truth", unit="prompt")
        self.truth = [future_attention(self.target, ids, options.new_tokens) for ids in steps]

    def agreement(self, number: int, ids: Tensor, cache: Any) -> float:
        given = {cache_argument(self.target): cache} if cache is not None else {}
        count = self.options.new_tokens
        said = self.target.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=[], **given)
        return float((said[:, ids.shape[1] :] == self.truth[number][0]).float().mean())

    def speckv_row(self, method: str, draft: PreTrainedModel, config: SpecKVConfig) -> dict[str, Any]:
        masses, recalls, agreements, shares = [], [], [], []
        for number, ids in enumerate(self.ids):
            cache, info = speckv(self.target, draft, ids, config, return_indices=True)
            masses.append(kept_mass(self.truth[number][1], info.indices))
            recalls.append(kept_recall(self.truth[number][1], info.indices))
            shares.append(info.kept_bytes / info.full_bytes)
            agreements.append(self.agreement(number, ids, cache))
        return {
            "method": method,
            "capacity": config.capacity,
            "kept_mass": mean(masses),
            "kept_recall": mean(recalls),
            "agreement": mean(agreements),
            "cache_share": mean(shares),
            "masses": masses,
        }

    def prompt_row(self, capacity: int, cascade: bool) -> dict[str, Any]:
        window = self.options.window
        compress = SpecPCConfig(capacity=capacity, window=2 * window, kernel=8, lookahead=8)
        evict = SpecKVConfig(capacity=capacity // 2, window=window)
        agreements = []
        for number, ids in enumerate(self.ids):
            if cascade:
                short, cache, _ = speckv_pc(self.target, self.draft, ids, evict, compress)
            else:
                short, cache = ids[:, specpc(self.draft, ids, compress)], None
            agreements.append(self.agreement(number, short, cache))
        kept = capacity // 2 if cascade else capacity
        return {
            "method": f"SpecKV-PC, {kept} of {capacity}" if cascade else "SpecPC",
            "capacity": capacity,
            "kept_mass": None,
            "kept_recall": None,
            "agreement": mean(agreements),
            "cache_share": kept / (self.options.tokens - 1),
            "wins": None,
        }

    def rows(self) -> list[dict[str, Any]]:
        made = []
        new, window = self.options.new_tokens, self.options.window
        for capacity in tqdm(self.options.capacity, desc="capacities", unit="row"):
            group = [
                self.speckv_row(
                    f"{name}, {reduce}",
                    draft,
                    SpecKVConfig(capacity=capacity, window=window, lookahead=count, reduce=reduce),
                )
                for reduce in ("max", "mean")
                for name, draft, count in (
                    ("window alone (SnapKV)", self.draft, 0),
                    ("SpecKV", self.draft, new),
                    ("SpecKV, perfect draft", self.target, new),
                )
            ]
            for first in (0, 3):
                for row in group[first : first + 3]:
                    better = sum(a > b for a, b in zip(row["masses"], group[first]["masses"]))
                    row["wins"] = None if row is group[first] else f"{better} of {len(self.ids)}"
            made += group + [self.prompt_row(capacity, cascade) for cascade in (False, True)]
        return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="score_spec_kv",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--capacity", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--window", type=whole(1), default=8)
    parser.add_argument("--tokens", type=int, default=400, help="of each prompt (default: 400)")
    parser.add_argument("--new-tokens", type=whole(1), default=32, help="of each continuation (default: 32)")
    parser.add_argument("--prompts", type=whole(1), default=24)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: samples/results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    for capacity in options.capacity:
        if capacity < 2 * options.window:
            raise UserError(f"--capacity must be at least twice the window of {options.window}, got {capacity}")
        if capacity >= options.tokens:
            raise UserError(f"--capacity must be less than the {options.tokens} tokens of a prompt, got {capacity}")
    prepare_folder(options.output)
    rows = Scores(options).rows()
    payload = {
        "made_by": "samples/llm/score_spec_kv.py",
        "versions": versions(),
        "python": PYTHON,
        "command": shlex.join(["python", "samples/llm/score_spec_kv.py", *arguments]),
        "tokens": options.tokens,
        "new_tokens": options.new_tokens,
        "window": options.window,
        "prompts": options.prompts,
        "seconds": round(time.perf_counter() - started),
        "rows": [{name: value for name, value in row.items() if name != "masses"} for row in rows],
    }
    write_json(options.output / "llm-spec-kv.json", payload)
    print(json.dumps(payload, indent=1) if options.json else "\n".join(text_table(rows, COLUMNS)))


if __name__ == "__main__":
    sys.exit(run(main, "score_spec_kv"))
