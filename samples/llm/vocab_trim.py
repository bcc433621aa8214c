"""VocabTrim (arXiv 2506.22694): how small may a draft's vocabulary be? Tokens per forward and memory-bound speed-up.

Trims the embedded draft to a row of sizes, by what its target writes and, to compare, by the corpus itself; decodes
greedily with each on function heads that none of them has seen, checks that the text is the target's own, and prints
and draws the curve. About three minutes on one core:

    python samples/llm/vocab_trim.py --json trim.json --plot trim.png
    python samples/llm/vocab_trim.py --save 256 -o trimmed-draft
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from recipe import check_new_folder
from tqdm import tqdm

from draftdiff.bench.runner import NO_MATPLOTLIB, write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, new_file, whole
from draftdiff.errors import UserError
from draftdiff.files import replacing
from draftdiff.llm import (
    Chain,
    ModelDrafter,
    export_token_map,
    generate_distillation_set,
    report,
    save_trimmed,
    speculative,
    trim,
)
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.train.data import left_padded
from draftdiff.llm.train.stdlib_corpus import PYTHON, corpus_texts, def_prompts
from draftdiff.llm.train.trim import count_tokens
from draftdiff.models.devices import device_name
from draftdiff.pipelines.mini.llm import load_mini_llm, mini_llm_defaults

SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def measured(target: Any, draft: Any, ids: torch.Tensor, mask: torch.Tensor, plain: torch.Tensor, length: int) -> dict:
    """One row of the table: what greedy chains of this draft reach."""
    drafter = ModelDrafter(draft, Chain(length))
    # Every draft at its whole length, or the acceptance would depend on what the clock says.
    options = {
        "attention_mask": mask,
        "max_new_tokens": plain.shape[1] - ids.shape[1],
        "do_sample": False,
        "pace": None,
    }
    out = target.generate(ids, custom_generate=speculative, drafter=drafter, **options)
    if not torch.equal(out, plain):
        raise SystemExit("the target said something else with a trimmed draft")
    result = report(drafter)
    return {
        "bytes": bytes_per_forward(draft),
        "cost": round(result.cost, 4),
        "tokens_per_forward": round(result.tokens_per_forward, 4),
        "mbsu": round(result.mbsu, 4),
    }


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Tokens per forward and memory-bound speed-up over the vocabulary, one line per calibration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from draftdiff.compare.charts import PALETTE

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    names = {"tokens_per_forward": "tokens per target forward", "mbsu": "memory-bound speed-up"}
    for axes, (key, label) in zip(panels, names.items()):
        for colour, calibration in zip(PALETTE, dict.fromkeys(row["calibration"] for row in rows)):
            own = [row for row in rows if row["calibration"] == calibration]
            axes.plot([r["size"] for r in own], [r[key] for r in own], "o-", color=colour, label=calibration, ms=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens that the draft can emit")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, title="trimmed by", loc="lower right")
    with replacing(file) as partial:
        FigureCanvasAgg(figure).print_figure(partial, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="vocab_trim", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", type=whole(1), nargs="+", default=SIZES, help="vocabularies of the draft")
    parser.add_argument("--prompts", type=whole(1), default=48, help="function heads to continue (default 48)")
    parser.add_argument("--new-tokens", type=whole(1), default=128, help="tokens of a continuation (default 128)")
    parser.add_argument("--calibration", type=whole(1), default=96, help="prompts of the calibration (default 96)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=new_file(), help="file for the rows")
    parser.add_argument("--plot", type=new_file(".png"), help="file for the curve (.png)")
    parser.add_argument("--save", type=whole(1), help="only trim to this size and save the draft and its token map")
    parser.add_argument("-o", "--output", type=Path, default=Path("trimmed-draft"), help="new folder for --save")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    target, draft, tokenizer = load_mini_llm()
    vocabulary = target.config.vocab_size
    if options.plot and find_spec("matplotlib") is None:
        raise UserError(NO_MATPLOTLIB)
    for size in (min(options.sizes), max(options.sizes)) if options.save is None else (options.save,):
        trim(draft, torch.zeros(vocabulary), size)
    if options.save is not None:
        check_new_folder(options.output)
    seen, unseen = def_prompts(options.calibration, held_out=False), def_prompts(options.prompts)
    written = generate_distillation_set(
        target, seen, max_new_tokens=options.new_tokens, batch_size=64, tokenizer=tokenizer
    )
    counts = {"what the target writes": count_tokens(written, vocabulary)}
    if options.save is not None:
        trimmed = trim(draft, counts["what the target writes"], options.save)
        save_trimmed(trimmed, options.output)
        export_token_map(trimmed, options.output / "token_map.pt")
        print(f"{options.output}: a draft of {options.save} tokens with d2t, t2d and token maps")
        return
    corpus = torch.tensor([i for text in corpus_texts() for i in tokenizer(text, verbose=False).input_ids])
    counts["the corpus"] = torch.bincount(corpus, minlength=vocabulary)
    length = mini_llm_defaults()["length"]
    prompts = [torch.tensor(tokenizer(prompt).input_ids) for prompt in unseen]
    ids, mask = left_padded(prompts, tokenizer.pad_token_id)
    plain = target.generate(ids, attention_mask=mask, max_new_tokens=options.new_tokens, do_sample=False)
    rows = []
    with tqdm(total=len(counts) * len(options.sizes), unit="draft") as bar:
        for calibration, count in counts.items():
            for size in options.sizes:
                row = measured(target, trim(draft, count, size), ids, mask, plain, length)
                rows.append({"calibration": calibration, "size": size, **row})
                bar.update()
    print(f"{'trimmed by':<24}{'tokens':>8}{'cost':>8}{'tokens per forward':>20}{'memory-bound speed-up':>23}")
    for row in rows:
        numbers = f"{row['size']:>8}{row['cost']:>8.3f}{row['tokens_per_forward']:>20.2f}{row['mbsu']:>23.2f}"
        print(f"{row['calibration']:<24}{numbers}")
    best = max(rows, key=lambda row: row["mbsu"])
    print(f"best: {best['size']} tokens, by {best['calibration']}: {best['mbsu']:.2f}")
    if options.json:
        settings = {"chain": length, "prompts": options.prompts, "new_tokens": options.new_tokens}
        device = device_name(target.device)
        write_json(options.json, {"rows": rows, "settings": settings, "device": device, "python": PYTHON})
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    sys.exit(run(main, "vocab_trim"))
