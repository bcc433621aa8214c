"""Whole denoising steps of real video transformers, dense against sparse: what draftdiff gains, and what it costs.

The models have their released configurations and random weights, so nothing is downloaded. All settings run in turn
within a round, in one process: stock dense attention, dense attention under draftdiff's hook and clocks, and each
sparsity; eager and compiled, without and with a cache.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.bench.dit_rows import DENSE, HOOKED, RUN_STEPS, Cell, Mode, Row, Step, Steps, table
from draftdiff.bench.models import MODELS, BenchModel, Size, build, make_inputs, twin
from draftdiff.bench.runner import NO_MEMORY, Routine, check_names, in_turns, reason_of, timed
from draftdiff.compare.measure import peak_memory
from draftdiff.compare.metrics import relative_l2
from draftdiff.errors import UserError, user_errors

# Relative L2 distance between two outputs that should be equal, per square root of the number of layers: each layer
# rounds by itself. Measured in bf16: 4e-3; skipping a twentieth of the attention gives 14e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
CHECK_FRAMES = 9  # video frames of the short call that compares full selection with dense
KERNELS = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Dit(Routine):
    name = "dit"
    file = "{device}-dit"
    key = "models"
    picture = "dit"

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        check_names("--models", options.models or [], MODELS)
        if options.dense_attention != "default" and not self.on_gpu:
            raise UserError("--dense-attention chooses between GPU kernels; there is one for the CPU")
        self.sparsities = {f"sparsity {value:g}": value for value in options.sparsity}
        with user_errors():
            for value in self.sparsities.values():
                DraftAttentionConfig(value)
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        compiling = (False, True) if (self.on_gpu if options.compile is None else options.compile) else (False,)
        self.modes = [Mode(*both) for both in product(compiling, (False, True) if options.cache else (False,))]

    def cases(self) -> list[str]:
        return self.options.models or list(MODELS)

    def about(self) -> dict[str, Any]:
        return {
            "measured_on": "a GPU" if self.on_gpu else "a CPU, with small versions of the models in fp32",
            "dense_attention": f"PyTorch's scaled_dot_product_attention, kernel: {self.options.dense_attention}",
            "run_steps": RUN_STEPS,
        }

    def tolerance(self, layers: int) -> float:
        return TOLERANCE[self.dtype] * math.sqrt(layers)

    def settings(self, dense_layers: int) -> dict[str, DraftAttentionConfig | None]:
        """By name; None is the stock transformer. Sparse ones leave out the dense first steps: each call is sparse."""
        sparse = {
            name: DraftAttentionConfig(value, dense_steps=0, dense_layers=dense_layers)
            for name, value in self.sparsities.items()
        }
        return {DENSE: None, HOOKED: DraftAttentionConfig(dense_steps=1.0), **sparse}

    def measure(self, case: str) -> list[dict[str, Any]]:
        """One model in all modes and settings, or the reason why it could not be run."""
        model = MODELS[case]
        size = full = model.full if self.on_gpu else model.small
        if self.options.layers is not None and self.options.layers < size.layers:
            size = size.with_layers(self.options.layers)
        # The default keeps the first layer dense: of the full depth, so none of a few layers.
        dense_layers = round(size.layers / model.full.layers)
        found: dict[str, Any] = {
            "name": case,
            **model.about(size),
            "size": "full" if full is model.full else "small",
            "dtype": str(self.dtype).removeprefix("torch."),
            "full_layers": full.layers,
            "dense_layers": dense_layers,
            "rows": [],
        }
        kernel = KERNELS[self.options.dense_attention]
        with sdpa_kernel(kernel) if kernel else nullcontext():
            try:
                transformer = build(model, size, self.device, self.dtype)
                inputs = make_inputs(model, size, self.device, self.dtype)
                found["parameters"] = sum(p.numel() for p in transformer.parameters())
                found["check"] = self.check_full_selection(model, size, transformer)
                plain = _call(transformer, inputs, 1).cpu()
            except torch.OutOfMemoryError as error:
                return [found | {"skipped": reason_of(error)}]
            if not found["check"]["passed"]:
                self.failures.append(f"{case}: full selection differs from dense")
            settings = self.settings(dense_layers)
            modes = [mode for mode in self.modes if model.cached or not mode.cached]
            cells = {Cell(mode, name): config for mode in modes for name, config in settings.items()}
            take = partial(time_step, inputs=inputs, plain=plain, calls_per_step=model.calls_per_step)
            steps, skipped = self.rounds(transformer, cells, take)
        rows = [self.row(case, steps, cell, skipped.get(cell), size, full) for cell in cells]
        found["rows"] = [asdict(row) for row in rows]
        return [found]

    def rounds(
        self, transformer: nn.Module, cells: Mapping[Cell, DraftAttentionConfig | None], take: Callable[..., Step]
    ) -> tuple[Steps, dict[Cell, str]]:
        """Timed rounds of all cells in turn, and why some could not be run."""

        def make(cell: Cell) -> Callable[[], Step]:
            ready = partial(take, prepared(transformer, cells[cell], cell.mode), cells[cell], cell.mode, self.device)
            ready()
            return ready

        torch.compiler.reset()
        # Each setting has a copy of the model, hence graphs of its own, of code that is all the same.
        with torch._dynamo.config.patch(recompile_limit=64):
            return in_turns({cell: partial(make, cell) for cell in cells}, self.options.rounds, why_not)

    def row(self, name: str, steps: Steps, cell: Cell, skipped: str | None, size: Size, full: Size) -> Row:
        """The figures of a cell; what is wrong with them becomes a failure."""
        dense = Cell(cell.mode, DENSE)
        if skipped is not None and not skipped.startswith(NO_MEMORY):
            self.failures.append(f"{name}, {cell}: {skipped}")
        if skipped is None and dense not in steps:
            skipped = "nothing to compare with: dense attention could not be run"
        row = Row.of(cell, self.sparsities.get(cell.setting), skipped)
        if skipped is None:
            row.fill(steps, cell, full.layers / size.layers)
            # Dense attention under our hook is the same; compiled blocks may round otherwise, with us or without.
            allowed = max(step.error for step in steps[dense]) + self.tolerance(size.layers)
            if row.relative_l2 is None or (cell.setting == HOOKED and row.relative_l2 > allowed):
                self.failures.append(f"{name}, {cell}: relative L2 to dense is {row.relative_l2}")
        return row

    def check_full_selection(self, model: BenchModel, size: Size, transformer: nn.Module) -> dict[str, Any]:
        """Whether draft attention that skips nothing equals the stock attention, on a short video."""
        short = replace(size, frames=min(CHECK_FRAMES, size.frames))
        inputs = make_inputs(model, short, self.device, self.dtype)
        stock = _call(transformer, inputs, 1)
        config = DraftAttentionConfig(sparsity=0, selection="full", dense_steps=0, dense_layers=0, min_tokens=0)
        full = draftdiff.enable(twin(transformer), config)
        error = relative_l2(_call(full, inputs, 1), stock)
        density = draftdiff.report(full).transformers[0].mean_density
        tolerance = self.tolerance(size.layers)
        passed = error <= tolerance and round(density or 0, 4) == 1
        return {"tokens": short.tokens, "relative_l2": error, "tolerance": tolerance, "passed": passed}

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return table(payload)


def why_not(error: Exception) -> str:
    """A setting that does not run is a finding, and shall not end the others."""
    return reason_of(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
    model: Any,
    config: DraftAttentionConfig | None,
    mode: Mode,
    device: torch.device,
    *,
    inputs: dict[str, Any],
    plain: Tensor,
    calls_per_step: int,
) -> Step:
    """One denoising step: time, memory, and the output's distance to the plain one."""
    model._reset_stateful_cache()  # a new generation: nothing cached
    before = {} if config is None else draftdiff.report(model).transformers[0].seconds
    (output, seconds), memory = peak_memory(
        lambda: timed(lambda: _call(model, inputs, mode.calls), device),  # of which the clock is the inner one
        device,
    )
    scale = calls_per_step / mode.calls
    step = Step(seconds * scale, memory=memory)
    if config is not None:
        # The noise stands still, so that all calls are one run: what this one adds to it is this one's.
        report = draftdiff.report(model).transformers[0]
        step.parts = {part: scale * (value - before.get(part, 0.0)) for part, value in report.seconds.items()}
        step.density = report.mean_density
        if config.dense_steps == 0 and step.density is None:
            raise RuntimeError(f"draftdiff left all calls dense: {report}")
        ran = report.forwards[-1].ran
        if mode.cached and ran is not None and bool(ran[1:].any()):
            raise RuntimeError("the cache did not hit on an input that it had just seen")
    model._reset_stateful_cache()  # what a cache holds is not in the next setting's memory
    output = output.cpu()
    step.error, step.finite = relative_l2(output, plain), bool(output.isfinite().all())
    return step


@torch.no_grad()
def _call(model: Any, inputs: dict[str, Any], calls: int) -> Tensor:
    with model.cache_context("cond"):
        for _ in range(calls):
            output = model(**inputs)[0]
    return output
