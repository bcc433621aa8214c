"""VAR and Infinity at their released sizes, with random weights: plain, with CoDe, with ScaleKV, with both.

Nothing is downloaded. All settings run in turn within a round, in one process. Beside each measured speed-up stands the
one that the counted operations predict. Times are those of the scales; the autoencoder's decoder, the same in all
settings, is left out as in the papers. Results go to samples/results/<device>-var.json and .png.

On a CPU the models are small: a fraction of the width and depth, all scales of VAR, 512 pixels for Infinity.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_common import RESULTS, device_slug, draw_beside, median_and_spread, timed, versions, write_result
from bench_var_models import MODELS, BenchModel, build, subjects

from draftdiff.compare.measure import count_flops, peak_memory
from draftdiff.compare.table import Column, megabytes, text_table, with_spread
from draftdiff.files import check_writable
from draftdiff.models.devices import DTYPES, device_name
from draftdiff.models.image import PLAIN, ImageModel, Setting, settings_of
from draftdiff.var.scale_kv import check_cache_budget

EXAMPLES = """examples:
  python samples/bench_var.py                                  all models, at a size that this device has time for
  python samples/bench_var.py --device cuda                    real sizes, batches of 1 and 64
  python samples/bench_var.py --models var-d30 --batch 64 --draft-scales 6 8 --budgets 0.1
  OMP_NUM_THREADS=1 python samples/bench_var.py --device cpu   steadier where others use the machine too
"""
NO_MEMORY = "not enough memory on this device"


COLUMNS: tuple[Column, ...] = (
    ("setting", "setting", str, ""),
    ("per image", "seconds_per_image", with_spread(" s", 3), ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
    ("predicted", "predicted_speedup", "{:.2f}x".format, ""),
    ("memory", "memory_total", megabytes, ""),
    ("cache", "cache", megabytes, ""),
    ("of plain", "cache_share", "{:.1%}".format, ""),
    ("", "skipped", str, ""),
)


@dataclass
class Bench:
    """What stays the same through a run. failures: checks that failed."""

    device: torch.device
    dtype: torch.dtype
    draft_scales: list[int]
    budgets: list[float]
    rounds: int
    bar: tqdm
    failures: list[str] = field(default_factory=list)


@dataclass
class Found:
    """Of one setting. latents: what it made, the same in every round.  cache: bytes held after each scale."""

    latents: Tensor
    flops: int
    memory: int | None
    cache: list[int]
    seconds: list[float] = field(default_factory=list)


def generate(model: ImageModel, call: dict[str, Any], setting: Setting, **extra: Any) -> Tensor:
    """Latents of one batch, always from the same seed."""
    model.apply(setting)
    generator = torch.Generator(model.device).manual_seed(0)
    return model.pipeline(**call, generator=generator, output_type="latent", **extra).images


def examine(model: ImageModel, call: dict[str, Any], setting: Setting) -> Found:
    """What needs no clock: operations, cache, memory. It also warms up."""
    held: list[int] = []

    def look(_pipeline: Any, _scale: int, _step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        held.append(tensors["cache"].nbytes)
        return {}

    looking = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["cache"]}
    latents, flops = count_flops(lambda: generate(model, call, setting, **looking))
    latents = latents.cpu()
    _, memory = peak_memory(lambda: generate(model, call, setting), model.device)
    return Found(latents, flops, memory, held)


def measure(bench: Bench, name: str, spec: BenchModel, batch: int) -> dict[str, Any]:
    """All settings of a model at one batch size; a setting that does not fit in memory has the reason instead."""
    full = bench.device.type == "cuda"
    size = spec.full if full else spec.small
    result: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "size": "full" if full else "small",
        "dtype": str(bench.dtype).removeprefix("torch."),
        "config": dict(size),
        "rows": [],
    }
    settings = [PLAIN]
    try:
        model = build(spec, size, bench.device, bench.dtype)
        call = subjects(model, size, batch)
    except RuntimeError as error:
        result["skipped"] = _reason(error)
        return result
    scales = model.scales(call)
    result["tokens"] = model.tokens(call)
    weights = _bytes(model.pipeline.transformer)
    drafted = [n for n in bench.draft_scales if n < scales] if model.refiner is not None else []
    settings += settings_of(drafted, bench.budgets, scales)

    found: dict[Setting, Found] = {}
    skipped: dict[Setting, str] = {}
    for number, setting in itertools.product(range(1 + bench.rounds), settings):
        bench.bar.set_postfix_str(f"batch {batch}, {setting.name}, {f'round {number}' if number else 'warm-up'}")
        if setting in skipped:
            continue
        try:
            if number == 0:
                found[setting] = examine(model, call, setting)
            else:
                latents, seconds = timed(lambda s=setting: generate(model, call, s), bench.device)  # type: ignore[misc]
                found[setting].seconds.append(seconds)
                if not torch.equal(latents.cpu(), found[setting].latents):
                    bench.failures.append(f"{name}, batch {batch}, {setting.name}: a round made other latents")
        except RuntimeError as error:
            skipped[setting] = _reason(error)
            found.pop(setting, None)
            _release(bench.device)
        bench.bar.update()
    for setting in settings:
        about = {
            "setting": setting.name,
            "draft_scales": setting.draft_scales,
            "budget": setting.budget,
            "skipped": skipped.get(setting),
        }
        own = weights + (_bytes(model.refiner) if setting.draft_scales is not None else 0)
        figures = dict.fromkeys(FIGURES)
        if setting in found:
            figures = row(found[setting], found.get(PLAIN), batch, own)
            if not bool(found[setting].latents.isfinite().all()):
                bench.failures.append(f"{name}, batch {batch}, {setting.name}: NaN or inf")
            share = figures["cache_share"]
            if setting.budget is not None and share is not None and share > 1.02 * setting.budget:
                bench.failures.append(f"{name}, {setting.name}: the cache is {share:.1%} of the plain one")
        result["rows"].append(about | figures)
    return result


FIGURES = (
    "seconds_per_image", "seconds", "speedup", "predicted_speedup", "flops", "memory", "weights", "memory_total",
    "cache", "cache_share", "cache_after_each_scale",
)  # fmt: skip


def row(own: Found, plain: Found | None, batch: int, weights: int) -> dict[str, Any]:
    """The figures of a setting. memory: most bytes above the weights; memory_total: with the weights in use."""
    others = plain is not None and own is not plain
    values = (
        median_and_spread([seconds / batch for seconds in own.seconds]),
        own.seconds,
        median_and_spread([p / s for p, s in zip(plain.seconds, own.seconds)]) if plain and others else None,
        plain.flops / own.flops if plain and others else None,
        own.flops,
        own.memory,
        weights,
        None if own.memory is None else own.memory + weights,
        max(own.cache),
        max(own.cache) / max(plain.cache) if plain and others else None,
        own.cache,
    )
    return dict(zip(FIGURES, values))


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _reason(error: RuntimeError) -> str:
    """Why a setting could not run, if that is memory; anything else is a bug."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return NO_MEMORY
    raise error


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(payload: dict[str, Any]) -> str:
    """All rows for a terminal."""
    lines = [f"{payload['device']}: {payload['measured_on']}"]
    for result in payload["results"]:
        lines += ["", f"{result['model']}, batch {result['batch']} ({result['size']}, {result['dtype']})"]
        lines += [result["skipped"]] if "skipped" in result else text_table(result["rows"], COLUMNS)
    return "\n".join(line.rstrip() for line in lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="bench_var.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", help="pictures at once (default: 1 and 64; 1 and 4 on a CPU)")
    parser.add_argument("--draft-scales", type=int, nargs="*", default=[6, 7, 8, 9], help="CoDe (default: 6 7 8 9)")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.2, 0.1, 0.04], help="ScaleKV: 0.2 0.1 0.04")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after an untimed one (default: 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: samples/results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    return parser


def _check(options: argparse.Namespace) -> torch.device:
    """The device, if all options make sense. Raises ValueError naming one that does not."""
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: {torch.cuda.device_count()} CUDA devices are here")
    for name, values in (("batch", options.batch or []), ("rounds", [options.rounds])):
        for value in values:
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
    for value in options.draft_scales:
        if not 1 <= value <= 9:
            raise ValueError(f"--draft-scales must be from 1 to 9, got {value}")
    for value in options.budgets:
        check_cache_budget(value)
    check_writable(options.output)
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code: 1 if a check failed, 2 for a wrong argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        device = _check(options)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as done:
        return int(done.code or 0)
    on_gpu = device.type == "cuda"
    cases = [
        (name, batch)
        for name in options.models
        for batch in dict.fromkeys(options.batch or ((1, 64) if on_gpu else MODELS[name].small_batches))
    ]
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    payload: dict[str, Any] = {
        "made_by": "samples/bench_var.py",
        "device": device_name(device),
        "measured_on": "a GPU, real sizes" if on_gpu else "a CPU, with small versions of the models",
        "versions": versions(),
        "command": threads + shlex.join(["python", "samples/bench_var.py", *arguments]),
        "rounds": options.rounds,
        "complete": False,
        "results": [],
    }
    path = options.output / f"{device_slug(device)}-var.json"
    dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    drafting, budgets = list(dict.fromkeys(options.draft_scales)), list(dict.fromkeys(options.budgets))
    most = (1 + len(drafting) + len(budgets) * (2 if drafting else 1)) * (1 + options.rounds)
    try:
        with tqdm(total=most * len(cases), desc="bench_var", unit="run") as bar:
            bench = Bench(device, dtype, drafting, budgets, options.rounds, bar)
            for number, (name, batch) in enumerate(cases, start=1):
                bar.set_description(name)
                with torch.cuda.device(device) if on_gpu else nullcontext():
                    payload["results"].append(measure(bench, name, MODELS[name], batch))
                # Of the last minutes: other work on the machine shows here.
                payload["results"][-1]["load_average"] = [round(load, 2) for load in os.getloadavg()]
                _release(device)
                bar.update(most * number - bar.n)  # also what could not be run
                payload["complete"] = number == len(cases)
                write_result(path, payload)  # after each: the next one may take long
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; {len(payload['results'])} results are in {path}", file=sys.stderr)
        return 130
    print(json.dumps(payload, indent=1) if options.json else table(payload))
    draw_beside(path, payload, "bench_var_plot")
    for failure in bench.failures:
        print(f"{parser.prog}: failed: {failure}", file=sys.stderr)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
