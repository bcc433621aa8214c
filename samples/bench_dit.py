"""Whole denoising steps of real video transformers, dense against sparse: what draftdiff gains, and what it costs.

The models have their released configurations and random weights, so nothing is downloaded. All settings run in turn
within a round, in one process: stock dense attention, dense attention under draftdiff's hook and clocks, and each
sparsity; eager and compiled, without and with a cache. Each timed call is also checked. Results go to
samples/results/<device>-dit.json and .png.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_common import (
    RESULTS,
    device_slug,
    draw_beside,
    peak_memory,
    reset_peak_memory,
    timed,
    versions,
    write_result,
)
from bench_dit_rows import DENSE, HOOKED, RUN_STEPS, Sample, Samples, row, table
from bench_models import MODELS, BenchModel, Size, build, make_inputs, twin

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.compare.metrics import relative_l2
from draftdiff.files import check_writable
from draftdiff.models.devices import device_name

EXAMPLES = """examples:
  python samples/bench_dit.py                                  all that this device has the memory for
  python samples/bench_dit.py --models wan-14b --layers 8      a fifth of the depth, in a fifth of the time
  python samples/bench_dit.py --models wan-1.3b --sparsity 0.8 --no-cache --json
  python samples/bench_dit.py --device cpu --compile           small versions of the models
  OMP_NUM_THREADS=1 python samples/bench_dit.py --device cpu   steadier where others use the machine too
"""
# Relative L2 distance between two outputs that should be equal, per square root of the number of layers: each layer
# rounds by itself. Measured in bf16: 4e-3; skipping a twentieth of the attention gives 14e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
NO_MEMORY = "memory on this device"
CHECK_FRAMES = 9  # video frames of the short call that compares full selection with dense
KERNELS = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Mode:
    """compiled: the repeated blocks, by torch.compile.  cached: with diffusers' First Block Cache.

    Random weights tell nothing about how often a cache hits, so a cached step stands for two calls with one input: one
    that computes all blocks, and one that hits.
    """

    compiled: bool
    cached: bool

    @property
    def calls(self) -> int:
        return 2 if self.cached else 1

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'}{', first block cache' if self.cached else ''}"


@dataclass
class Bench:
    """What stays the same through a run. failures: checks that failed and settings that broke."""

    device: torch.device
    dtype: torch.dtype
    sparsities: list[float]
    rounds: int
    bar: tqdm
    failures: list[str] = field(default_factory=list)

    def tolerance(self, layers: int) -> float:
        return TOLERANCE[self.dtype] * math.sqrt(layers)

    def settings(self, dense_layers: int) -> dict[str, DraftAttentionConfig | None]:
        """By name; None is the stock transformer. Sparse ones leave out the dense first steps: each call is sparse."""
        return {
            DENSE: None,
            HOOKED: DraftAttentionConfig(dense_steps=1.0),
            **{
                f"sparsity {value:g}": DraftAttentionConfig(value, dense_steps=0, dense_layers=dense_layers)
                for value in self.sparsities
            },
        }


def measure(bench: Bench, name: str, model: BenchModel, size: Size, modes: list[Mode]) -> dict[str, Any]:
    """One model in all modes and settings, or the reason why it could not be run."""
    full = model.full if bench.device.type == "cuda" else model.small
    # The default keeps the first layer dense: of the full depth, so none of a few layers.
    dense_layers = round(size.layers / model.full.layers)
    settings = bench.settings(dense_layers)
    found: dict[str, Any] = {
        "name": name,
        **model.about(size),
        "size": "full" if full is model.full else "small",
        "dtype": str(bench.dtype).removeprefix("torch."),
        "full_layers": full.layers,
        "dense_layers": dense_layers,
        "rows": [],
    }
    try:
        transformer = build(model, size, bench.device, bench.dtype)
        inputs = make_inputs(model, size, bench.device, bench.dtype)
        found["parameters"] = sum(p.numel() for p in transformer.parameters())
        found["check"] = check_full_selection(bench, model, size, transformer)
        if not found["check"]["passed"]:
            bench.failures.append(f"{name}: full selection differs from dense")
        bench.bar.update()
        plain = _call(transformer, inputs, 1).cpu()
    except torch.OutOfMemoryError as error:
        found["skipped"] = _reason(error)
        return found
    samples, skipped = run_rounds(bench, transformer, inputs, settings, modes, plain, model.calls_per_step)
    for mode in modes:
        eager = samples[Mode(False, mode.cached)]
        for setting, config in settings.items():
            about = {"mode": str(mode), "compiled": mode.compiled, "cached": mode.cached, "setting": setting}
            about["sparsity"] = None if setting in (DENSE, HOOKED) or config is None else config.sparsity
            reason = skipped.get((mode, setting))
            if reason is None and DENSE not in samples[mode]:
                reason = f"nothing to compare with: {skipped[mode, DENSE]}"
            if reason is not None:
                found["rows"].append(about | {"skipped": reason})
                if NO_MEMORY not in reason:
                    bench.failures.append(f"{name}, {mode}, {setting}: {reason}")
                continue
            figures = row(setting, samples[mode], eager, samples[modes[0]], full.layers / size.layers)
            # Dense attention under our hook is the same; compiled blocks may round otherwise, with us or without.
            allowed = max(s.error for s in samples[mode][DENSE]) + bench.tolerance(size.layers)
            if not figures["finite"] or (setting == HOOKED and figures["relative_l2"] > allowed):
                bench.failures.append(f"{name}, {mode}, {setting}: relative L2 to dense is {figures['relative_l2']}")
            found["rows"].append(about | figures)
    return found


def run_rounds(
    bench: Bench,
    transformer: nn.Module,
    inputs: dict[str, Any],
    settings: dict[str, DraftAttentionConfig | None],
    modes: list[Mode],
    plain: Tensor,
    calls_per_step: int,
) -> tuple[dict[Mode, Samples], dict[tuple[Mode, str], str]]:
    """Timed rounds of all modes and settings in turn, and why some could not be run. plain: the eager dense output."""
    samples: dict[Mode, Samples] = {mode: {} for mode in modes}
    skipped: dict[tuple[Mode, str], str] = {}
    twins: dict[tuple[Mode, str], nn.Module] = {}
    torch.compiler.reset()
    # Each setting has a copy of the model, hence graphs of its own, of code that is all the same.
    with torch._dynamo.config.patch(recompile_limit=64):
        for number, mode, name in itertools.product(range(1 + bench.rounds), modes, settings):
            key, config = (mode, name), settings[name]
            bench.bar.set_postfix_str(f"{mode}, {name}, {f'round {number}' if number else 'warm-up'}")
            try:
                if number == 0:
                    twins[key] = prepared(transformer, config, mode)
                if key in twins:
                    sample = time_step(bench, twins[key], inputs, config, mode, plain, calls_per_step)
                    samples[mode].setdefault(name, []).extend([sample] * (number > 0))
            except Exception as error:  # a setting that does not run is a finding, and shall not end the others
                skipped[key] = _reason(error)
            if key in skipped and twins.pop(key, None) is not None:
                samples[mode].pop(name, None)
                _release(bench.device)
            bench.bar.update()
    return samples, skipped


def prepared(transformer: nn.Module, config: DraftAttentionConfig | None, mode: Mode) -> nn.Module:
    """A copy of the transformer that shares its weights, set up for one setting."""
    model: Any = twin(transformer)
    if mode.cached:
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    if mode.compiled:
        # The cache decides in Python whether to go on: a break that no full graph can have.
        full = not mode.cached
        if model._repeated_blocks:
            model.compile_repeated_blocks(fullgraph=full)
        else:
            for block in model.transformer_blocks:
                block.compile(fullgraph=full)
    return model if config is None else draftdiff.enable(model, config, num_steps=RUN_STEPS)


def time_step(
    bench: Bench,
    model: Any,
    inputs: dict[str, Any],
    config: DraftAttentionConfig | None,
    mode: Mode,
    plain: Tensor,
    calls_per_step: int,
) -> Sample:
    """One denoising step: time, memory, and the output's distance to the plain one."""
    model._reset_stateful_cache()  # a new generation: nothing cached, and the report starts anew
    reset_peak_memory(bench.device)
    output, seconds = timed(lambda: _call(model, inputs, mode.calls), bench.device)
    peak = peak_memory(bench.device)
    scale = calls_per_step / mode.calls
    parts: dict[str, float] = {}
    density = None
    if config is not None:
        (report,) = draftdiff.report(model).transformers
        parts = {part: value * scale for part, value in report.seconds.items()}
        density = report.mean_density
        if config.dense_steps == 0 and density is None:
            raise RuntimeError(f"draftdiff left all calls dense: {report}")
        last = report.forwards[-1].stats
        if mode.cached and last is not None and bool((last[1:] >= 0).any()):
            raise RuntimeError("the cache did not hit on an input that it had just seen")
    model._reset_stateful_cache()  # what a cache holds is not in the next setting's peak
    output = output.cpu()
    finite = bool(output.isfinite().all())
    return Sample(seconds * scale, parts, peak, relative_l2(output, plain), finite, density)


@torch.no_grad()
def _call(model: Any, inputs: dict[str, Any], calls: int) -> Tensor:
    with model.cache_context("cond"):
        for _ in range(calls):
            output = model(**inputs)[0]
    return output


def check_full_selection(bench: Bench, model: BenchModel, size: Size, transformer: nn.Module) -> dict[str, Any]:
    """Whether draft attention that skips nothing equals the stock attention, on a short video."""
    short = Size(size.config, min(CHECK_FRAMES, size.frames), size.height, size.width, size.text)
    inputs = make_inputs(model, short, bench.device, bench.dtype)
    stock = _call(transformer, inputs, 1)
    config = DraftAttentionConfig(sparsity=0, selection="full", dense_steps=0, dense_layers=0, min_tokens=0)
    full = draftdiff.enable(twin(transformer), config)
    error = relative_l2(_call(full, inputs, 1), stock)
    (report,) = draftdiff.report(full).transformers
    tolerance = bench.tolerance(size.layers)
    passed = error <= tolerance and round(report.mean_density or 0, 4) == 1
    return {"tokens": short.tokens, "relative_l2": error, "tolerance": tolerance, "passed": passed}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        return f"not enough {NO_MEMORY}: {text}"
    return f"{type(error).__name__}: {text}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="bench_dit.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="default: 0.5 0.75 0.9")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--layers", type=int, help="so many layers of each model, at least 2 (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after an untimed one (default: 3)")
    on_or_off = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=on_or_off, help="also with compiled blocks (default: on a GPU)")
    parser.add_argument("--cache", action=on_or_off, default=True, help="also with First Block Cache (default: yes)")
    parser.add_argument(
        "--dense-attention",
        choices=KERNELS,
        default="default",
        help="GPU kernel of the dense attention to compare with (default: PyTorch's own choice)",
    )
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
    if options.layers is not None and options.layers < 2:
        raise ValueError(f"--layers must be at least 2, got {options.layers}")
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if options.dense_attention != "default" and device.type != "cuda":
        raise ValueError("--dense-attention chooses between GPU kernels; there is one for the CPU")
    for value in options.sparsity:
        DraftAttentionConfig(value)
    check_writable(options.output)
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code: 1 if a check failed or a setting broke, 2 for a wrong argument."""
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
    compiling = (False, True) if (on_gpu if options.compile is None else options.compile) else (False,)
    modes = [
        Mode(compiled, cached) for compiled in compiling for cached in ((False, True) if options.cache else (False,))
    ]
    sparsities = list(dict.fromkeys(options.sparsity))
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    payload: dict[str, Any] = {
        "made_by": "samples/bench_dit.py",
        "device": device_name(device),
        "measured_on": "a GPU" if on_gpu else "a CPU, with small versions of the models in fp32",
        "versions": versions(),
        "command": threads + shlex.join(["python", "samples/bench_dit.py", *arguments]),
        "dense_attention": f"PyTorch's scaled_dot_product_attention, kernel: {options.dense_attention}",
        "run_steps": RUN_STEPS,
        "complete": False,
        "models": [],
    }
    path = options.output / f"{device_slug(device)}-dit.json"
    kernel = KERNELS[options.dense_attention]
    calls = 1 + len(modes) * (2 + len(sparsities)) * (1 + options.rounds)
    total = calls * len(options.models)
    try:
        with tqdm(total=total, desc="bench_dit", unit="step") as bar, sdpa_kernel(kernel) if kernel else nullcontext():
            bench = Bench(device, torch.bfloat16 if on_gpu else torch.float32, sparsities, options.rounds, bar)
            for name in options.models:
                model = MODELS[name]
                bar.set_description(name)
                size = model.full if on_gpu else model.small
                if options.layers is not None and options.layers < size.layers:
                    size = size.with_layers(options.layers)
                payload["models"].append(measure(bench, name, model, size, modes))
                # Of the last minutes: other work on the machine shows here.
                payload["models"][-1]["load_average"] = [round(load, 2) for load in os.getloadavg()]
                _release(device)
                bar.update(calls * len(payload["models"]) - bar.n)  # also what could not be run
                payload["complete"] = len(payload["models"]) == len(options.models)
                write_result(path, payload)  # after each: the next one may take an hour
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; {len(payload['models'])} models are in {path}", file=sys.stderr)
        return 130
    print(json.dumps(payload, indent=1) if options.json else table(payload))
    draw_beside(path, payload, "bench_dit_plot")
    for failure in bench.failures:
        print(f"{parser.prog}: failed: {failure}", file=sys.stderr)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
