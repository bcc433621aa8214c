"""Attention kernels side by side on the same inputs: ours, PyTorch's and other libraries', dense and block-sparse.

    python samples/bench_kernels.py                        # the GPU if there is one, else the CPU
    python samples/bench_kernels.py --device cpu --rounds 7
    python samples/bench_kernels.py --cases wan-14b --densities 0.1 0.2

Every timing is also a check: sampled rows are held against attention written out in fp32, and a wrong kernel ends the
script with status 1. Backends take turns in each round. Writes samples/results/<device>-kernels.json and .png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from draftdiff.core.draft import Tail, draft_map
from draftdiff.core.grid import LatentGrid, choose_tile, tiling_for
from draftdiff.core.select import with_text
from draftdiff.kernels.block_sparse import BACKENDS, block_sparse_attention, unavailable
from draftdiff.kernels.drafting import pool, select
from draftdiff.kernels.problem import Problem
from draftdiff.models.devices import device_name
from samples.bench_common import RESULTS, device_slug, median_and_spread, timed, versions, write_result
from samples.bench_peers import DENSE, SPARSE, Absent, Inputs, Prepare, reference_rows


@dataclass(frozen=True)
class Case:
    """Shape of one attention call, batch 1."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    about: str


CASES = {
    "cpu": {
        "cpu-64": Case((8, 32, 32), 4, 64, "8,192 tokens"),
        "cpu-128": Case((8, 32, 32), 4, 128, "8,192 tokens"),
        "cpu-ragged": Case((11, 30, 26), 4, 64, "8,580 tokens, ragged tiles"),
    },
    "cuda": {
        "wan-1.3b": Case((21, 30, 52), 12, 128, "Wan 2.1 1.3B at 480p, 32,760 tokens"),
        "wan-14b": Case((21, 45, 80), 40, 128, "Wan 2.1 14B at 720p, 75,600 tokens"),
        "hunyuan": Case((33, 45, 80), 24, 128, "HunyuanVideo at 720p, 118,800 tokens"),
        "wan-14b-64": Case((21, 45, 80), 40, 64, "as wan-14b with head_dim 64"),
        "even": Case((20, 48, 80), 40, 128, "76,800 tokens, no ragged tile: what every peer can do"),
    },
}
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
EIGHT_BITS = {"sageattention": 1e-1}
NOT_TIMED = {"reference": "materialises every score", "flex": "timed as FlexAttention, compiled"}
BLOCK_SIZE = 128


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, density: float) -> tuple[Inputs, Tail, Tensor]:
    """Inputs with a mask of this density by the `draft` rule, the tail, and the draft map.

    Neighbours share half of their variance, as video tokens do, so that rows of the mask are uneven.
    """
    grid = LatentGrid(*case.grid)
    tiling = tiling_for(grid, choose_tile(grid, BLOCK_SIZE), BLOCK_SIZE, device=device)
    generator = torch.Generator(device).manual_seed(0)
    coarse = [(n + 3) // 4 for n in case.grid]
    index = [torch.arange(n, device=device) // 4 for n in case.grid]

    def random() -> Tensor:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, case.heads, case.head_dim, generator=generator, device=device)

        shared = normal(*coarse)[index[0][:, None, None], index[1][:, None], index[2]].flatten(0, 2)
        return ((shared + normal(grid.tokens)) * 0.5**0.5)[None].to(dtype)

    q, k, v = random(), random(), random()
    q_mean, k_mean = pool(q, tiling), pool(k, tiling)
    probabilities = draft_map(q_mean, k_mean, counts=tiling.counts[: tiling.video_tiles])
    shares = torch.full((case.heads,), density, dtype=torch.float64)
    keep = select("draft", probabilities, shares)
    return Inputs(q, k, v, with_text(keep, tiling), tiling), Tail(k_mean, pool(v, tiling)), probabilities


def ours(backend: str, tail: Tail | None) -> Prepare:
    """One of our backends as `bench_peers` prepares peers."""

    def prepare(inputs: Inputs) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        if backend in NOT_TIMED:
            raise Absent(NOT_TIMED[backend])
        reason = unavailable(backend, inputs.q.device, inputs.q.dtype, inputs.q.shape[-1])
        if reason:
            raise Absent(reason)
        if backend == "triton" and inputs.q.device.type != "cuda":
            raise Absent("interpreted on a CPU: not timed")

        problem = Problem(inputs.q, inputs.k, inputs.v, inputs.keep, inputs.tiling, tail=tail)
        return lambda: block_sparse_attention(problem, backend=backend), lambda out: out

    return prepare


def draft_and_select(case: Case, inputs: Inputs, density: float) -> Callable[[], Tensor]:
    """All that comes before the kernel: pooling q, k and v, the map, the selection."""
    shares = torch.full((case.heads,), density, dtype=torch.float64, device=inputs.q.device)
    tiling = inputs.tiling

    def run() -> Tensor:
        q_mean, k_mean = pool(inputs.q, tiling), pool(inputs.k, tiling)
        pool(inputs.v, tiling)
        return select("draft", draft_map(q_mean, k_mean, counts=tiling.counts), shares)

    return run


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a large square product: what no attention can exceed."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = min(timed(lambda: a @ b, device)[1] for _ in range(6))
    return 2 * size**3 / seconds / 1e12


def error_on_rows(out: Tensor, inputs: Inputs, tail: Tail | None, dense: bool) -> float:
    """Largest error of sampled rows of two heads, and of the ends of the sequence."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(inputs.tiling.tokens, (32,), generator=generator)
    rows = torch.cat([rows, torch.tensor([0, inputs.tiling.tokens - 1])]).to(out.device)
    heads = torch.tensor([0, inputs.q.shape[2] - 1], device=out.device)
    expected = reference_rows(inputs, rows, heads, tail, dense)
    return float((out[0, rows][:, heads].float() - expected).abs().max())


def bench(case_name: str, case: Case, gemm: float, options: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """All rows of one case. gemm: TFLOP/s of a large product."""
    device, dtype = options.device, options.dtype
    found: list[dict[str, Any]] = []
    dense_flops = 4 * torch.Size(case.grid).numel() ** 2 * case.heads * case.head_dim
    for density in options.densities:
        inputs, tail, _ = make_inputs(case, device, dtype, density)
        kept = float(inputs.keep.float().mul(inputs.tiling.counts).sum(-1).mul(inputs.tiling.counts).sum())
        flops = 4.0 * kept * case.head_dim
        candidates: list[tuple[str, Prepare, Tail | None, bool]]
        candidates = [(name, prepare, None, True) for name, prepare in DENSE.items()]
        candidates += [(name, ours(name, None), None, False) for name in BACKENDS]
        candidates += [(f"{name} + tail", ours(name, tail), tail, False) for name in BACKENDS]
        candidates += [(name, prepare, None, False) for name, prepare in SPARSE.items()]
        runs: dict[str, Callable[[], Tensor]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name, prepare, its_tail, dense in candidates:
            row = {"case": case_name, "density": density, "backend": name, "dense": dense}
            rows[name] = row
            try:
                run, restore = prepare(inputs)
                error = error_on_rows(restore(run()), inputs, its_tail, dense)
            except Absent as reason:
                row["absent"] = str(reason)
                continue
            except (RuntimeError, ValueError, TypeError) as failure:  # theirs may fail on a GPU or size of its own
                if not dense and name.partition(" ")[0] in BACKENDS:
                    raise
                row["absent"] = f"failed: {' '.join(str(failure).split())[:160]}"
                continue
            row["max_error"] = error
            row["correct"] = error <= EIGHT_BITS.get(name, TOLERANCE[dtype])
            row["flops"] = dense_flops if dense else flops
            runs[name] = run
        runs["draft + select"] = draft_and_select(case, inputs, density)
        rows["draft + select"] = {"case": case_name, "density": density, "backend": "draft + select", "dense": False}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run, device)[1])
                progress.update()
        best_dense = min(
            (name for name in runs if rows[name]["dense"] and name not in EIGHT_BITS),
            key=lambda name: median_and_spread(seconds[name])["median"],
        )
        for name in runs:
            row = rows[name]
            row["seconds"] = median_and_spread(seconds[name])
            # Against the dense run of the same round: what slows the machine slows both.
            ratios = [mine / dense for mine, dense in zip(seconds[name], seconds[best_dense])]
            row["of_dense_time"] = median_and_spread(ratios)
            row["fastest_dense"] = best_dense
            if "flops" in row:
                row["tflops"] = row["flops"] / row["seconds"]["median"] / 1e12
        best_rate = rows[best_dense]["tflops"]
        for row in rows.values():
            if "tflops" in row:
                row["of_best_dense_rate"] = row["tflops"] / best_rate
                row["of_gemm"] = row["tflops"] / gemm
        found += rows.values()
    return found


EVEN = ("cpu-64", "cpu-128")
# Backend, density, the largest share of dense SDPA's time that we allow ourselves, and where. The torch backend is the
# fallback without a compiler and multiplies the holes of ragged tiles too: no bar there.
CPU_BARS = [
    ("cpu + tail", 0.1, 0.18, tuple(CASES["cpu"])),
    ("cpu + tail", 0.25, 0.40, tuple(CASES["cpu"])),
    ("cpu + tail", 0.5, 0.72, tuple(CASES["cpu"])),
    ("torch + tail", 0.1, 0.30, EVEN),
    ("torch + tail", 0.25, 0.65, EVEN),
    ("draft + select", 0.25, 0.04, tuple(CASES["cpu"])),
]


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What we set out to reach, and what was measured. `bar` is a least value for rates, a most for shares of time."""

    def at(case: str, backend: str, density: float) -> dict[str, Any] | None:
        found = (r for r in rows if (r["case"], r["backend"], r["density"]) == (case, backend, density))
        row = next(found, None)
        return row if row and "seconds" in row else None

    checks: list[tuple[str, float | None, str, float]] = []
    for backend, density, most, where in CPU_BARS:
        for case in where:
            row = at(case, backend, density)
            if row:
                checks.append(
                    (
                        f"{case}: {backend} at {density:g}, share of SDPA's time",
                        row["of_dense_time"]["median"],
                        "<=",
                        most,
                    )
                )
    for case, least in (("wan-14b", 450.0), ("wan-14b-64", 340.0)):
        full, sparse = at(case, "triton", 1.0), at(case, "triton", 0.15)
        if full:
            checks.append((f"{case}: our dense mode, TFLOP/s", full["tflops"], ">=", least))
        if full and sparse:
            checks.append(
                (f"{case}: rate at 0.15 over our own dense rate", sparse["tflops"] / full["tflops"], ">=", 0.85)
            )
    for case in CASES["cuda"]:
        for density in DENSITIES:
            mine = at(case, "triton", density)
            for peer in ("FlexAttention", "FlashInfer", "VSA (fastvideo-kernel)"):
                theirs = at(case, peer, density) if density <= 0.5 else None
                if mine and theirs:
                    faster = theirs["seconds"]["median"] / mine["seconds"]["median"]
                    checks.append((f"{case}: times as fast as {peer} at {density:g}", faster, ">=", 1.0))
    mine, before = at("wan-14b", "triton + tail", 0.2), at("wan-14b", "draft + select", 0.2)
    if mine and before:
        together = mine["of_dense_time"]["median"] + before["of_dense_time"]["median"]
        checks.append(("wan-14b: speed-up at 0.2 with draft, selection, tail", 1 / together, ">=", 3.0))
        checks.append(("wan-14b: draft + select, share of dense time", before["of_dense_time"]["median"], "<=", 0.04))
    return [
        {
            "what": what,
            "measured": value,
            "bar": f"{sign} {bar:g}",
            "met": value >= bar if sign == ">=" else value <= bar,
        }
        for what, value, sign, bar in checks
        if value is not None
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The measured rows for a terminal, then what is absent."""
    names = f"{'case':<12}{'density':>8}  {'backend':<24}{'ms':>10}{'of dense':>10}{'least-most':>15}"
    lines = [names + f"{'TFLOP/s':>9}{'of best':>9}{'of GEMM':>9}{'error':>10}"]
    absent: dict[str, set[str]] = {}
    for row in rows:
        if "absent" in row:
            absent.setdefault(f"{row['backend']}: {row['absent']}", set()).add(row["case"])
            continue
        ratio, rate = row["of_dense_time"], row.get("tflops")
        lines.append(
            f"{row['case']:<12}{row['density']:>8g}  {row['backend']:<24}{row['seconds']['median'] * 1e3:>10.2f}"
            f"{ratio['median']:>10.3f}{ratio['min']:>8.3f}-{ratio['max']:.3f}"
            + (
                f"{rate:>9.2f}{row['of_best_dense_rate']:>9.2f}{row['of_gemm']:>9.2f}{row['max_error']:>10.1e}"
                if rate
                else ""
            )
            + ("" if row.get("correct", True) else "  WRONG")
        )
    lines += [f"absent  {what} ({', '.join(sorted(cases))})" for what, cases in absent.items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", help="default: all of the device")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, in which all backends take turns")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the json and the plot")
    parser.add_argument("--json", action="store_true", help="print the result instead of tables")
    options = parser.parse_args()
    try:
        options.device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu or cuda, got {options.device!r}")
    if options.device.type not in CASES:
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    known = CASES[options.device.type]
    options.cases = options.cases or list(known)
    for name in options.cases:
        if name not in known:
            parser.error(f"--cases must be among {', '.join(known)}, got {name!r}")
    for density in options.densities:
        if not 0 < density <= 1:
            parser.error(f"--densities must be above 0 and at most 1, got {density:g}")
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {options.rounds}")
    default = "float32" if options.device.type == "cpu" else "bfloat16"
    options.dtype = getattr(torch, options.dtype or default)
    return options


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    gemm = gemm_tflops(options.device, options.dtype)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), tqdm(unit=" calls", disable=None, file=sys.stderr) as progress:
        for name in options.cases:
            progress.set_description(name)
            rows += bench(name, CASES[options.device.type][name], gemm, options, progress)
    result = {
        "device": device_name(options.device),
        "kind": options.device.type,
        "versions": versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "dtype": str(options.dtype).removeprefix("torch."),
        "block_size": BLOCK_SIZE,
        "gemm_tflops": gemm,
        "cases": {name: vars(CASES[options.device.type][name]) for name in options.cases},
        "rows": rows,
        "bars": bars(rows),
    }
    path = options.out / f"{device_slug(options.device)}-kernels.json"
    write_result(path, result)
    try:
        from samples.bench_kernels_plot import draw
    except ImportError:
        print("no plot: pip install 'draftdiff[plots]'", file=sys.stderr)
    else:
        draw(result, path.with_suffix(".png"))
    wrong = [row for row in rows if not row.get("correct", True)]
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{result['device']}, {result['dtype']}, GEMM {gemm:.2f} TFLOP/s")
        print(table(rows))
        for bar in result["bars"]:
            print(f"{'met    ' if bar['met'] else 'NOT MET'} {bar['what']}: {bar['measured']:.3f} (bar {bar['bar']})")
        print(f"written to {path} and {path.with_suffix('.png').name}")
    for row in wrong:
        print(
            f"wrong: {row['backend']} in {row['case']} at {row['density']:g}, error {row['max_error']:.2g}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
