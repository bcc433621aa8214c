"""Attention kernels side by side on the same inputs: ours, PyTorch's and other libraries', dense and block-sparse.

Sampled rows of each are held against attention written out in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from draftdiff.bench.kernel_bars import bars
from draftdiff.bench.peers import CHOOSING, DENSE, SPARSE, Absent, Inputs, Prepare, dense_rows
from draftdiff.bench.runner import Routine, check_names, in_turns, ratios, timed, warmed
from draftdiff.compare.table import Column, spread, text_table, with_spread
from draftdiff.core.devices import dtype_named
from draftdiff.core.draft import Tail, draft_map
from draftdiff.core.grid import LatentGrid, choose_tile, tiling_for
from draftdiff.core.select import with_text
from draftdiff.kernels.block_sparse import BACKENDS, block_sparse_attention, unavailable
from draftdiff.kernels.drafting import errors, pool, select, singles, worst
from draftdiff.kernels.sampled import attention_of, some_rows


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
        "cpu-ragged": Case((11, 30, 26), 4, 64, "8,580 tokens, no axis divides"),
    },
    "cuda": {
        "wan-1.3b": Case((21, 30, 52), 12, 128, "Wan 2.1 1.3B at 480p, 32,760 tokens"),
        "wan-14b": Case((21, 45, 80), 40, 128, "Wan 2.1 14B at 720p, 75,600 tokens"),
        "hunyuan": Case((33, 45, 80), 24, 128, "HunyuanVideo at 720p, 118,800 tokens"),
        "wan-14b-64": Case((21, 45, 80), 40, 64, "as wan-14b with head_dim 64"),
        "even": Case((20, 48, 80), 40, 128, "76,800 tokens, boxes alone: what every peer can do"),
    },
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
EIGHT_BITS = {"sageattention": 1e-1, "comfy-kitchen sol_attn": 1e-1}  # what they may be off
NOT_TIMED = {"reference": "materialises every score", "flex": "timed as FlexAttention, compiled"}
BLOCK_SIZE = 128
TOKENS = 0.25  # of the budget, where single tokens are read


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, density: float) -> tuple[Inputs, Inputs, Tail]:
    """Inputs with a mask of this density, chosen by `mass`; the same with one by `error` and single tokens, of the same
    density together; and the tail.

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
    tail = Tail(k_mean, pool(v, tiling))
    keep = select("draft", probabilities, shares(case, density, device))
    inputs = Inputs(q, k, v, with_text(keep, tiling), tiling)
    keep, tokens, taken = by_probe(case, inputs, q_mean, tail, density)
    return inputs, replace(inputs, keep=with_text(keep, tiling), tokens=tokens, taken=taken), tail


def shares(case: Case, density: float, device: torch.device) -> Tensor:
    return torch.full((case.heads,), density, dtype=torch.float64, device=device)


def by_probe(
    case: Case, inputs: Inputs, q_mean: Tensor, tail: Tail, density: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kept tiles and the single tokens of the rule `error`, and how many are taken of each tile."""
    tiling, tokens = inputs.tiling, round(TOKENS * density * inputs.tiling.tokens)
    given = (q_mean, inputs.k, inputs.v, tail, tiling)
    error = errors(*given, scale=inputs.scale)
    keep = worst(error, shares(case, density - tokens / tiling.tokens, error.device))
    return keep, *singles(*given, keep, scale=inputs.scale, tokens=tokens)


def ours(backend: str, tail: Tail | None) -> Prepare:
    """One of our backends, prepared as peers are."""

    def prepare(inputs: Inputs) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        if backend in NOT_TIMED:
            raise Absent(NOT_TIMED[backend])
        reason = unavailable(backend, inputs.q.device, inputs.q.dtype, inputs.q.shape[-1])
        if reason:
            raise Absent(reason)
        if backend == "triton" and inputs.q.device.type != "cuda":
            raise Absent("interpreted on a CPU: not timed")
        if backend == "torch" and inputs.q.device.type == "cuda":
            raise Absent("for where Triton cannot run: not timed on a GPU")

        problem = inputs.problem(tail)
        return lambda: block_sparse_attention(problem, backend=backend), lambda out: out

    return prepare


def draft_and_select(case: Case, inputs: Inputs, density: float) -> Callable[[], Tensor]:
    """All that comes before the kernel by the rule `draft`: pooling q, k and v, the map, the selection."""
    tiling, kept = inputs.tiling, shares(case, density, inputs.q.device)

    def run() -> Tensor:
        q_mean, k_mean = pool(inputs.q, tiling), pool(inputs.k, tiling)
        pool(inputs.v, tiling)
        return select("draft", draft_map(q_mean, k_mean, counts=tiling.counts), kept)

    return run


def draft_and_probe(case: Case, inputs: Inputs, density: float) -> Callable[[], Tensor]:
    """The same by the rule `error`: pooling, the errors, the tiles, the single tokens."""

    def run() -> Tensor:
        q_mean, k_mean, v_mean = (pool(x, inputs.tiling) for x in (inputs.q, inputs.k, inputs.v))
        return by_probe(case, inputs, q_mean, Tail(k_mean, v_mean), density)[1]

    return run


BEFORE = {"draft + select": draft_and_select, "draft + probe": draft_and_probe}


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a large square product: what no attention can exceed."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = min(timed(lambda: a @ b, device)[1] for _ in range(6))
    return 2 * size**3 / seconds / 1e12


def error_on_rows(out: Tensor, inputs: Inputs, tail: Tail | None, dense: bool) -> float:
    """Largest error of sampled rows of two heads, and of the ends of the sequence."""
    problem = inputs.problem(tail)
    rows, heads = some_rows(problem)
    expected = dense_rows(inputs, rows, heads) if dense else attention_of(problem, rows, heads)
    return float((out[0, rows][:, heads].float() - expected).abs().max())


@dataclass(frozen=True)
class Candidate:
    """What is timed. tail: the one it adds.  dense: whether it reads everything.  ours: its failure is a bug.
    tokens: whether it reads single ones.  whole: itself with everything kept, which is checked instead of it, since
    nobody tells what it chooses."""

    name: str
    prepare: Prepare
    tail: Tail | None = None
    dense: bool = False
    ours: bool = False
    tokens: bool = False
    whole: Prepare | None = None


def candidates(tail: Tail) -> list[Candidate]:
    return [
        *(Candidate(name, prepare, dense=True) for name, prepare in DENSE.items()),
        *(Candidate(name, ours(name, None), ours=True) for name in BACKENDS),
        *(Candidate(f"{name} + tail", ours(name, tail), tail, ours=True) for name in BACKENDS),
        *(Candidate(f"{name} + tail + tokens", ours(name, tail), tail, ours=True, tokens=True) for name in BACKENDS),
        *(Candidate(name, prepare) for name, prepare in SPARSE.items()),
        *(Candidate(name, prepare, whole=whole) for name, (prepare, whole) in CHOOSING.items()),
    ]


@dataclass
class Row:
    """Figures of one candidate at one density. absent: why there are none.  flops: of the kept pairs, or of all.
    of_dense_time: over the fastest dense attention of the same round.  of_gemm: of a large product's rate."""

    case: str
    density: float
    backend: str
    dense: bool = False
    absent: str | None = None
    max_error: float | None = None
    correct: bool | None = None
    flops: float | None = None
    seconds: dict[str, float] | None = None
    of_dense_time: dict[str, float] | None = None
    fastest_dense: str | None = None
    tflops: float | None = None
    of_best_dense_rate: float | None = None
    of_gemm: float | None = None


def milliseconds(seconds: Mapping[str, float]) -> str:
    return f"{seconds['median'] * 1e3:.2f}"


def verdict(correct: bool) -> str:
    return "" if correct else "WRONG"


COLUMNS: tuple[Column, ...] = (
    ("case", "case", str, ""),
    ("density", "density", "{:g}".format, ""),
    ("backend", "backend", str, ""),
    ("ms", "seconds", milliseconds, ""),
    ("of dense", "of_dense_time", with_spread("", 3), ""),
    ("TFLOP/s", "tflops", "{:.2f}".format, ""),
    ("of best", "of_best_dense_rate", "{:.2f}".format, ""),
    ("of GEMM", "of_gemm", "{:.2f}".format, ""),
    ("error", "max_error", "{:.1e}".format, ""),
    ("", "correct", verdict, ""),
)


class Kernels(Routine):
    name = "kernels"
    file = "{device}-kernels"
    picture = "kernels"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.known = CASES[self.device.type]
        self.names = options.cases or list(self.known)
        check_names("--cases", self.names, self.known)
        self.dtype = dtype_named(options.dtype or ("bfloat16" if self.on_gpu else "float32"))
        torch.backends.cuda.matmul.allow_tf32 = False

    def cases(self) -> list[tuple[str, float]]:
        return list(product(self.names, dict.fromkeys(self.options.densities)))

    def about(self) -> dict[str, Any]:
        self.gemm = gemm_tflops(self.device, self.dtype)
        return {
            "kind": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "block_size": BLOCK_SIZE,
            "gemm_tflops": self.gemm,
            "cases": {name: asdict(self.known[name]) for name in self.names},
        }

    @torch.inference_mode()
    def measure(self, case: tuple[str, float]) -> list[dict[str, Any]]:
        name, density = case
        shape = self.known[name]
        inputs, with_tokens, tail = make_inputs(shape, self.device, self.dtype, density)
        counts = inputs.tiling.counts
        kept = float((inputs.keep.float() * counts).sum(-1).mul(counts).sum())
        flops = {True: 4.0 * inputs.tiling.tokens**2 * shape.heads * shape.head_dim, False: 4.0 * kept * shape.head_dim}
        rows, makers = {}, {}
        for candidate in candidates(tail):
            row = rows[candidate.name] = Row(name, density, candidate.name, candidate.dense)
            row.flops = flops[candidate.dense]
            makers[candidate.name] = self.maker(candidate, with_tokens if candidate.tokens else inputs, row)
        for before, prepare in BEFORE.items():
            rows[before] = Row(name, density, before)
            makers[before] = warmed(prepare(shape, inputs, density), self.device)
        seconds, absent = in_turns(makers, self.options.rounds)
        self.fill(rows, seconds, absent)
        return [asdict(row) for row in rows.values()]

    def maker(self, candidate: Candidate, inputs: Inputs, row: Row) -> Callable[[], Callable[[], float]]:
        """Prepares a candidate and checks it; notes the error in its row."""

        def make() -> Callable[[], float]:
            try:
                run, restore = (candidate.whole or candidate.prepare)(inputs)
                dense = candidate.dense or candidate.whole is not None
                row.max_error = error_on_rows(restore(run()), inputs, candidate.tail, dense)
                if candidate.whole is not None:
                    run, _ = candidate.prepare(inputs)
            except (RuntimeError, ValueError, TypeError) as failure:  # theirs may fail on a GPU or size of its own
                if candidate.ours:
                    raise
                raise Absent(f"failed: {' '.join(str(failure).split())[:160]}") from failure
            row.correct = row.max_error <= EIGHT_BITS.get(candidate.name, TOLERANCE[self.dtype])
            if not row.correct:
                where = f"{row.backend} in {row.case} at {row.density:g}"
                self.failures.append(f"wrong: {where}, error {row.max_error:.2g}")
            return lambda: timed(run, self.device)[1]

        return make

    def fill(self, rows: dict[str, Row], seconds: dict[str, list[float]], absent: dict[str, str]) -> None:
        """The figures that follow from the times."""
        for name, reason in absent.items():
            rows[name].absent, rows[name].flops = reason, None
        exact = [name for name in seconds if rows[name].dense and name not in EIGHT_BITS]
        best = min(exact, key=lambda name: spread(seconds[name])["median"])
        rates = {name: (rows[name].flops or 0.0) / spread(values)["median"] / 1e12 for name, values in seconds.items()}
        for name, values in seconds.items():
            row = rows[name]
            row.seconds, row.fastest_dense = spread(values), best
            row.of_dense_time = spread(ratios(values, seconds[best]))
            if row.flops is not None:
                row.tflops, row.of_best_dense_rate = rates[name], rates[name] / rates[best]
                row.of_gemm = rates[name] / self.gemm

    def conclude(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"bars": bars(results)}

    def table(self, payload: Mapping[str, Any]) -> Iterator[str]:
        yield f"{payload['device']}, {payload['dtype']}, GEMM {payload['gemm_tflops']:.2f} TFLOP/s"
        yield from text_table([row for row in payload["rows"] if row["absent"] is None], COLUMNS)
        absent: dict[str, set[str]] = {}
        for row in payload["rows"]:
            if row["absent"] is not None:
                absent.setdefault(f"{row['backend']}: {row['absent']}", set()).add(row["case"])
        yield from (f"absent  {what} ({', '.join(sorted(cases))})" for what, cases in absent.items())
        for bar in payload["bars"]:
            yield f"{'met    ' if bar['met'] else 'NOT MET'} {bar['what']}: {bar['measured']:.3f} (bar {bar['bar']})"
