"""When does a draft pay? Measured speed-up beside the memory-bound prediction, while the target grows dearer.

The embedded target is made deeper by layers that pass everything through unchanged: it writes the same text, and drafts
are accepted as often, at the cost of a target 1, 2, 4 and 8 times as deep. Methods run in turn within a round beside
plain decoding of the same target, and must write its text. About six minutes on one core:

    python samples/llm/bench_speculation.py --json speculation.json --plot speculation.png
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from draftdiff.compare.llm import compare_methods
from draftdiff.files import replacing
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.models.devices import device_name
from draftdiff.models.llm import example_prompts, load
from draftdiff.models.llm_methods import generate_options
from samples.bench_common import write_result

METHODS = ("chain", "adaptive", "tree", "trimmed", "ngram")


def deepened(target: Any, times: int) -> Any:
    """The model with `times` as many layers, of which the new ones add nothing to what passes through them."""
    config = copy.deepcopy(target.config)
    layers = config.num_hidden_layers
    config.num_hidden_layers = times * layers
    model = LlamaForCausalLM(config).to(target.device, target.dtype).eval()
    model.load_state_dict(target.state_dict(), strict=False)
    model.tie_weights()
    for layer in model.model.layers[layers:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.generation_config = target.generation_config
    return model


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Prediction and measurement over the target's cost, a panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from draftdiff.compare.charts import PALETTE

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, ("predicted by bytes read (MBSU)", "measured, prompt included")):
        for colour, method in zip(PALETTE, dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == method]
            values = [row["mbsu"] if axes is panels[0] else row["speedup"]["median"] for row in own]
            axes.plot([row["layers"] for row in own], values, "o-", color=colour, label=method, ms=4)
        axes.axhline(1, color="gray", lw=0.8)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["layers"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("layers of the target (draft: 1)")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("speed-up over plain decoding")
    panels[1].legend(frameon=False, fontsize=8)
    with replacing(file) as partial:
        FigureCanvasAgg(figure).print_figure(partial, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8], help="depths, in those of the target")
    parser.add_argument("--prompts", type=int, default=4, help="prompts (default 4)")
    parser.add_argument("--prompt-tokens", type=int, default=160, help="length of each (default 160)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default 128)")
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="file for the curves (.png)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model = load(None, None, device="cpu")
    prompts = example_prompts(model, options.prompts, options.prompt_tokens)
    rows = []
    for times in tqdm(options.times, unit="depth"):
        deeper = replace(model, target=deepened(model.target, times))
        comparison = compare_methods(
            deeper,
            prompts,
            METHODS,
            capacity=options.prompt_tokens,
            options=generate_options(options.tokens, 0),
            repeat=options.repeat,
            progress=False,
        )
        cost = bytes_per_forward(model.draft) / bytes_per_forward(deeper.target)
        for row in comparison.rows()[1:]:
            if row["same_text"] != 1:
                raise SystemExit(f"{row['method']} wrote something else than plain decoding")
            kept = {name: row[name] for name in ("method", "tokens_per_forward", "mbsu", "speedup")}
            rows.append({"layers": deeper.target.config.num_hidden_layers, "cost": cost, **kept})
    print(f"{'layers':>6}{'cost':>7}  {'method':<22}{'tokens/forward':>15}{'MBSU':>7}{'speed-up (least-most)':>24}")
    for row in rows:
        speed = "{median:.2f}x ({min:.2f}-{max:.2f})".format(**row["speedup"])
        print(
            f"{row['layers']:>6}{row['cost']:>7.3f}  {row['method']:<22}{row['tokens_per_forward']:>15.2f}"
            f"{row['mbsu']:>6.2f}x{speed:>24}"
        )
    if options.json:
        settings = {
            name: getattr(options, name) for name in ("prompts", "prompt_tokens", "tokens", "repeat", "threads")
        }
        write_result(options.json, {"rows": rows, "settings": settings, "device": device_name(model.device)})
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
