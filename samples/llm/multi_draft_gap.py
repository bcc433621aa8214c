"""How far each verifier of several drafts is from the best possible (arXiv 2502.18779): over temperature and drafts.

Target and draft read program text that neither has seen; at each place the acceptance of every sampler and verifier is
computed exactly from the two distributions, beside the optimum of its sampler. A few minutes on one core:

    python samples/llm/multi_draft_gap.py --json gap.json --plot gap.png
    python samples/llm/multi_draft_gap.py --model Qwen/Qwen2.5-7B --draft Qwen/Qwen2.5-0.5B
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, new_file, whole
from draftdiff.errors import UserError
from draftdiff.files import replacing
from draftdiff.llm import acceptance_upper_bound, expected_acceptance
from draftdiff.llm.train.stdlib_corpus import PYTHON
from draftdiff.llm.verify import VERIFIERS
from draftdiff.models.devices import device_name
from draftdiff.models.llm import UNSEEN, LanguageModel, example_prompts, load

TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.3)
DRAFTS = (1, 2, 3, 4, 6)
LABELS = {"optimum": "optimum", "rrs": "RRS", "k_seq": "K-SEQ", "greedy": "greedy rule", "match": "match"}


@torch.no_grad()
def logits_at(model: LanguageModel, places: int, tokens: int = 256) -> list[tuple[Tensor, Tensor]]:
    """(target, draft) logits at places spread evenly over the example texts."""
    found = []
    for prompt in example_prompts(model, len(UNSEEN), tokens):
        target, draft = (one(prompt).logits[0].float().cpu() for one in (model.target, model.draft))
        found += [(target[i], draft[i, : target.shape[1]]) for i in range(tokens // 2, tokens)]
    return found[:: max(len(found) // places, 1)][:places]


def row(places: list[tuple[Tensor, Tensor]], temperature: float, n: int, sampler: str) -> dict[str, Any]:
    """Means over all places: the optimum, and what each verifier reaches."""
    pairs = [((p / temperature).softmax(-1), (q / temperature).softmax(-1)) for p, q in places]
    return {
        "temperature": temperature,
        "drafts": n,
        "sampler": sampler,
        "optimum": fmean(acceptance_upper_bound(p, q, n, sampler) for p, q in pairs),
        **{
            verifier: fmean(expected_acceptance(p, q, n, sampler, verifier) for p, q in pairs)
            for verifier in VERIFIERS[sampler]
        },
    }


def draw(rows: list[dict[str, Any]], file: Path, temperature: float, drafts: int) -> None:
    """Acceptance over temperature, and over the number of drafts: a row of panels each, a panel per sampler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from draftdiff.compare.charts import PALETTE

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, len(VERIFIERS), sharey="row")
    colours = dict(zip(LABELS, PALETTE))
    for line, (key, fixed, value) in enumerate(
        (("temperature", "drafts", drafts), ("drafts", "temperature", temperature))
    ):
        for axes, (sampler, verifiers) in zip(panels[line], VERIFIERS.items()):
            own = [r for r in rows if r["sampler"] == sampler and r[fixed] == value]
            for name in (*verifiers, "optimum"):
                style = "k--" if name == "optimum" else "o-"
                colour = {} if name == "optimum" else {"color": colours[name]}
                axes.plot([r[key] for r in own], [r[name] for r in own], style, ms=4, label=LABELS[name], **colour)
            rest = f"{value:g} drafts" if fixed == "drafts" else f"temperature {value:g}"
            axes.set_title(f"{sampler.replace('_', ' ')}, {rest}", fontsize=10)
            axes.set_xlabel(key)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
        panels[line][0].set_ylabel("acceptance of one of the drafts")
    with replacing(file) as partial:
        FigureCanvasAgg(figure).print_figure(partial, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="multi_draft_gap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="folder or Hub id of the target (default: the embedded pair)")
    parser.add_argument("--draft", help="folder or Hub id of a smaller model with the same tokenizer")
    parser.add_argument("--places", type=whole(1), default=200, help="places in the text (default 200)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--drafts", type=whole(1), nargs="+", default=DRAFTS)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the lines over drafts (default 1)")
    parser.add_argument("--n", type=whole(1), default=4, help="drafts of the lines over temperature (default 4)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=new_file(), help="file for the rows")
    parser.add_argument("--plot", type=new_file(".png"), help="file for the curves (.png)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if (options.model is None) != (options.draft is None):
        raise UserError(f"--model and --draft come together, got {options.model or options.draft!r} alone")
    model = load(options.model, options.draft)
    if model.draft is None:
        raise UserError(
            f"draft {options.draft!r} has another tokenizer than model {options.model!r}: they must share one"
        )
    places = logits_at(model, options.places)
    wanted = [(t, options.n, s) for t in options.temperatures for s in VERIFIERS]
    wanted += [(options.temperature, n, s) for n in options.drafts for s in VERIFIERS]
    rows = [row(places, *one) for one in tqdm(list(dict.fromkeys(wanted)), unit="setting")]
    rows.sort(key=lambda r: (r["sampler"], r["temperature"], r["drafts"]))
    print(f"{'sampler':<22}{'temperature':>12}{'drafts':>8}" + "".join(f"{name:>10}" for name in LABELS))
    for one in rows:
        figures = "".join(f"{one[name]:>10.3f}" if name in one else f"{'':>10}" for name in LABELS)
        print(f"{one['sampler']:<22}{one['temperature']:>12g}{one['drafts']:>8}{figures}")
    if options.json:
        settings = {"model": model.name, "places": len(places), "device": device_name(model.device), "python": PYTHON}
        write_json(options.json, {"rows": rows, "settings": settings})
    if options.plot:
        draw(rows, options.plot, options.temperature, options.n)


if __name__ == "__main__":
    sys.exit(run(main, "multi_draft_gap"))
