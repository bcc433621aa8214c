"""What glancing adds to a Falcon layer (arXiv 2412.12639): the same layer trained with it and without, for equal steps.

All begin with the same weights and see the same rows in the same order; the one without leaves out the first guess and
what is replaced after it, so its steps are cheaper. Judged by tokens per forward of the target, text by text, after
heads of functions that none has seen. A killed run carries on where it stopped; on one core it takes about an hour:

    python samples/llm/glancing.py --json glancing.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from draft_heads import load_texts, train
from tqdm import tqdm

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, new_file, whole
from draftdiff.compare.paired import mean_interval
from draftdiff.llm import FalconDrafter, StaticTree, report, speculative
from draftdiff.llm.train.falcon import GLANCING
from draftdiff.llm.train.stdlib_corpus import PYTHON, def_prompts
from draftdiff.models.devices import device_name
from draftdiff.pipelines.mini.llm import load_mini_llm


def arguments() -> Parser:
    parser = Parser(prog="glancing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--arms", choices=GLANCING, nargs="+", default=["none", "code", "paper"], help="(default: all, none first)"
    )
    parser.add_argument("--k", type=whole(1), default=2, help="tokens of a pass (default 2)")
    parser.add_argument("--steps", type=whole(1), default=350, help="of each arm (default 350)")
    parser.add_argument("--batch", type=whole(1), default=16, help="rows of a step (default 16)")
    parser.add_argument("--prompts", type=whole(1), default=192, help="prompts the target continues (default 192)")
    parser.add_argument("--new-tokens", type=whole(1), default=160, help="tokens of a continuation (default 160)")
    parser.add_argument("--judged", type=whole(2), default=48, help="unseen prompts (default 48)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--work", type=Path, default=Path("heads-work"), help="folder to carry on from (heads-work)")
    parser.add_argument("--json", type=new_file(".json"), help="file for the figures")
    parser.set_defaults(kind="falcon")
    return parser


def gains(drafter: Any, target: Any, tokenizer: Any, options: argparse.Namespace) -> list[float]:
    """Tokens per forward after each unseen prompt, whose text must be the target's own."""
    found = []
    for prompt in tqdm(def_prompts(options.judged), desc="judge", unit="text"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        given = {**inputs, "max_new_tokens": options.new_tokens, "do_sample": False}
        drafted = target.generate(**given, custom_generate=speculative, drafter=drafter, pace=None)
        if not torch.equal(drafted, target.generate(**given)):
            raise SystemExit(f"with this layer the target said something else after {prompt!r}")
        found.append(report(drafter).tokens_per_forward)
    return found


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    torch.set_num_threads(options.threads)
    target, _, tokenizer = load_mini_llm()
    texts = load_texts(target, tokenizer, def_prompts(options.prompts, held_out=False), options)
    tree = StaticTree.from_widths((4, 2, 1, 1))
    found: dict[str, list[float]] = {}
    for arm in options.arms:
        torch.manual_seed(0)
        drafter = FalconDrafter.from_target(target, k=options.k, tree=tree)
        train(drafter, target, texts, options, arm)
        drafter.head.eval().half().float()  # as a stored one
        found[arm] = gains(drafter, target, tokenizer, options)
    first, *_ = options.arms
    rows = []
    for arm, values in found.items():
        over = mean_interval([a - b for a, b in zip(values, found[first])])
        own = mean_interval(values)
        rows.append({"glancing": arm, "tokens_per_forward": vars(own), f"over_{first}": vars(over), "texts": values})
        print(
            f"{arm:<6}{own.mean:6.3f} tokens per forward ({own.low:.3f} to {own.high:.3f}), "
            f"{over.mean:+.3f} ({over.low:+.3f} to {over.high:+.3f}) beside {first}"
        )
    if options.json:
        kept = ("k", "steps", "batch", "prompts", "new_tokens", "judged")
        settings = {name: getattr(options, name) for name in kept}
        where = {"device": device_name(target.device), "python": PYTHON}
        write_json(options.json, {"rows": rows, "settings": settings, **where})


if __name__ == "__main__":
    sys.exit(run(main, "glancing"))
