"""The command `draftdiff bench`: measurements of kernels, pictures and text, and a report of their results."""

from __future__ import annotations

import argparse
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path

from draftdiff.cli.gpu_day import add_gpu_day
from draftdiff.cli.options import Parser, add_seed, number, share, whole

# torch and diffusers take seconds to import: only inside the benchmark that was chosen.


def add_bench(parser: Parser) -> None:
    parts = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    parts.add_parser("check", help="whether all that computes is right on a device", fill=_check)
    parts.add_parser("compile", help="whether the Triton kernels compile for cards that are not here", fill=_compile)
    parts.add_parser("kernels", help="attention kernels side by side, ours and other libraries'", fill=_kernels)
    parts.add_parser("dit", help="denoising steps of video transformers, dense against sparse", fill=_dit)
    parts.add_parser("quality", help="what rules do to the picture, over many prompts", fill=_rules)
    parts.add_parser("schedules", help="the same for dense steps and densities over the steps", fill=_schedules)
    parts.add_parser("tuned", help="the same for a tuned spread of as many pairs, on other prompts", fill=_tuned)
    parts.add_parser(
        "gpu-day", help="all that a new GPU deserves, checks first; --dry-run rehearses it", fill=add_gpu_day
    )
    parts.add_parser("parallel", help="on paper: one clip over several GPUs, links against work", fill=_parallel)
    parts.add_parser("report", help="results of many cards on one page", fill=_report)
    var = parts.add_parser("var", help="next-scale models: CoDe and ScaleKV; the attention of their last scales")
    of_var = var.add_subparsers(title="parts", required=True, metavar="PART")
    of_var.add_parser("models", help="VAR and Infinity plain, with CoDe, with ScaleKV, with both", fill=_var)
    of_var.add_parser("caches", help="what ScaleKV per layer and per head and unguided scales change", fill=_caches)
    of_var.add_parser("attention", help="the last scales' attention, dense and sparse", fill=_last_scales)
    llm = parts.add_parser("llm", help="language models: the loop, when speculation pays, sparse prefill")
    of_llm = llm.add_subparsers(title="parts", required=True, metavar="PART")
    of_llm.add_parser("loop", help="what speculative decoding costs beside the models", fill=_loop)
    of_llm.add_parser("speculation", help="measured and predicted speed-up over the target's depth", fill=_speculation)
    of_llm.add_parser("prefill", help="reading a prompt by vertical-slash attention", fill=_prefill)


def _check(parser: Parser) -> None:
    parser.add_argument(
        "--share", type=whole(1), nargs=2, default=(1, 1), metavar=("I", "N"), help="the I-th of N shares of the cases"
    )
    _common(parser, "check.Check", rounds=1, warm_up=False)


def _compile(parser: Parser) -> None:
    known = (80, 86, 89, 90, 100, 120)
    parser.add_argument(
        "--capability",
        type=int,
        choices=known,
        nargs="+",
        default=known,
        metavar="CC",
        help=f"of {known} (default: all)",
    )
    _common(parser, "compile_ahead.CompileAhead", rounds=1, device="cpu", warm_up=False)


def _kernels(parser: Parser) -> None:
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all of the device")
    parser.add_argument(
        "--densities",
        type=number(above=0, most=1),
        nargs="+",
        default=[0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0],
        metavar="X",
        help="kept shares (default: 0.05 to 1)",
    )
    _add_dtype(parser)
    _common(parser, "kernels.Kernels", rounds=5, picture="kernels")


def _dit(parser: Parser) -> None:
    on_or_off = argparse.BooleanOptionalAction
    _add_models(parser)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="default: 0.5 0.75 0.9")
    parser.add_argument("--layers", type=whole(2), help="so many layers of each model, at least 2 (default: all)")
    parser.add_argument("--compile", action=on_or_off, help="also with compiled blocks (default: on a GPU)")
    parser.add_argument("--cache", action=on_or_off, default=True, help="also with First Block Cache (default: yes)")
    parser.add_argument(
        "--dense-attention",
        choices=["default", "cudnn", "flash"],
        default="default",
        help="GPU kernel of the dense attention to compare with (default: PyTorch's own choice)",
    )
    _common(parser, "dit.Dit", rounds=3, picture="dit")


def _rules(parser: Parser) -> None:
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="default: all; another name lists them")
    _quality(parser, "quality.Quality")


def _schedules(parser: Parser) -> None:
    parser.add_argument("--schedules", nargs="+", metavar="NAME", help="default: all; another name lists them")
    _quality(parser, "quality.Schedules")


def _tuned(parser: Parser) -> None:
    told = "so many more prompts to tune with, of --prompt the last (default: 4)"
    parser.add_argument("--calibrate", type=whole(1), default=4, metavar="N", help=told)
    _quality(parser, "tuned.Tuned")


def _quality(parser: Parser, routine: str) -> None:
    parser.add_argument("--prompts", type=whole(1), default=24, help="so many held-out prompts (default: 24)")
    parser.add_argument("--sparsity", type=share, nargs="+", default=[0.75, 0.875], help="default: 0.75 0.875")
    parser.add_argument("--steps", type=whole(1), default=10, help="denoising steps (default: 10)")
    parser.add_argument("--model", help="folder or Hub id of a diffusers pipeline (default: the embedded mini model)")
    parser.add_argument("--prompt", action="append", help="these prompts instead; may be repeated")
    add_seed(parser, "of the first prompt, each has the next; ")
    _add_dtype(parser)
    _common(parser, routine, rounds=1, picture="quality", warm_up=False)


def _var(parser: Parser) -> None:
    _add_models(parser)
    parser.add_argument(
        "--batch", type=whole(1), nargs="+", help="pictures at once (default: 1 and 64; 1 and 4 on a CPU)"
    )
    parser.add_argument(
        "--draft-scales", type=whole(1, 9), nargs="*", default=[6, 7, 8, 9], help="CoDe (default: 6 7 8 9)"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[0.2, 0.1, 0.04], help="ScaleKV (default: 0.2 0.1 0.04)"
    )
    _add_dtype(parser)
    _common(parser, "var.Var", rounds=3, picture="var")


def _caches(parser: Parser) -> None:
    _add_models(parser)
    parser.add_argument("--pictures", type=whole(1), default=40, help="of the embedded model (default: 40)")
    budgets, unguided = [0.4, 0.2, 0.1], [1, 2, 3]
    parser.add_argument("--budgets", type=float, nargs="*", default=budgets, help="ScaleKV (default: 0.4 0.2 0.1)")
    parser.add_argument("--unguided", type=whole(1), nargs="*", default=unguided, help="last scales (default: 1 2 3)")
    _common(parser, "var_caches.Caches")


def _last_scales(parser: Parser) -> None:
    kept = number(above=0, most=1)
    parser.add_argument("--density", type=kept, nargs="+", default=[1.0, 0.5, 0.25], help="kept (default: 1 0.5 0.25)")
    parser.add_argument("--budget", type=kept, default=0.1, help="ScaleKV's, for the shorter history (default: 0.1)")
    parser.add_argument("--heads", type=whole(1), default=4, help="default: 4")
    parser.add_argument("--batch", type=whole(1), default=2, help="default: 2")
    parser.add_argument("--last-only", action="store_true", help="only the last scale of each model")
    _common(parser, "last_scales.LastScales", rounds=5)


def _parallel(parser: Parser) -> None:
    tokens, processes = [75_600, 134_000, 1_000_000], [1, 8, 64]
    parser.add_argument(
        "--tokens", type=whole(1), nargs="+", default=tokens, metavar="N", help="default: Wan, H3, more"
    )
    parser.add_argument("--processes", type=whole(1), nargs="+", default=processes, metavar="N", help="default: 1 8 64")
    parser.add_argument("--heads", type=whole(1), default=40, metavar="N", help="default: 40")
    parser.add_argument("--head-dim", type=whole(1), default=128, metavar="N", help="default: 128")
    parser.add_argument("--density", type=number(above=0, most=1), default=0.2, metavar="X", help="default: 0.2")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(func=lambda options: import_module("draftdiff.bench.parallel").table(options))


def _report(parser: Parser) -> None:
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSON files that draftdiff bench or compare wrote, or folders",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="PAGE", help="default: report.html"
    )
    parser.set_defaults(func=lambda options: import_module("draftdiff.bench.report").run(options))


def _loop(parser: Parser) -> None:
    _common(parser, "llm.Loop", rounds=7, threads=1, device="cpu")


def _speculation(parser: Parser) -> None:
    parser.add_argument(
        "--times",
        type=whole(1),
        nargs="+",
        default=[1, 2, 4, 8],
        help="depths, in those of the target (default: 1 2 4 8)",
    )
    parser.add_argument("--prompts", type=whole(1), default=4, help="default: 4")
    parser.add_argument("--prompt-tokens", type=whole(1), default=160, help="length of each (default: 160)")
    parser.add_argument("--tokens", type=whole(1), default=128, help="new tokens (default: 128)")
    _common(parser, "speculation.Speculation", rounds=3, threads=1, device="cpu", picture="speculation")


def _prefill(parser: Parser) -> None:
    parser.add_argument(
        "--tokens", type=whole(1), nargs="+", default=[4096, 8192, 16384], help="default: 4096 8192 16384"
    )
    parser.add_argument(
        "--pattern",
        type=int,
        nargs=2,
        action="append",
        metavar=("COLUMNS", "LOCAL"),
        help="may be repeated (default: 2048 2048, the paper's, and 1024 1024, 512 512)",
    )
    parser.add_argument("--heads", type=whole(1), default=4, help="default: 4")
    parser.add_argument("--key-heads", type=whole(1), default=1, help="default: 1")
    parser.add_argument("--head-dim", type=whole(1), default=128, help="default: 128")
    _common(parser, "sparse_prefill.Prefill", rounds=5)


def _add_models(parser: Parser) -> None:
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: all; another name lists them")


def _add_dtype(parser: Parser) -> None:
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: bfloat16 on a GPU, float32 on a CPU)")


def _common(
    parser: Parser,
    routine: str,
    rounds: int | None = None,
    picture: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    warm_up: bool = True,
) -> None:
    """routine: module and class.  rounds: None where nothing is timed.  warm_up: whether an untimed round comes first.
    The others are defaults."""
    if rounds is None:
        parser.set_defaults(rounds=None)
    else:
        said = "timed, after an untimed one" if warm_up else "of all settings"
        parser.add_argument("--rounds", type=whole(1), default=rounds, help=f"{said} (default: {rounds})")
    parser.add_argument(
        "--device", default=device, help=f"cpu, cuda or cuda:N (default: {device or 'a GPU if there is'})"
    )
    parser.add_argument("--threads", type=whole(1), default=threads, help=f"of a CPU (default: {threads or 'all'})")
    parser.add_argument("-o", "--output", type=Path, default=Path(), metavar="FOLDER", help="default: where you are")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    if picture is not None:
        parser.add_argument(
            "--redraw", type=Path, metavar="FILE", help="only draw the picture of an earlier result anew"
        )
    parser.set_defaults(func=partial(_bench, routine, picture))


def _bench(routine: str, picture: str | None, options: Namespace) -> int:
    from draftdiff.bench.runner import redraw, run

    if picture is not None and options.redraw is not None:
        return redraw(picture, options.redraw)
    module, _, name = routine.partition(".")
    return run(getattr(import_module(f"draftdiff.bench.{module}"), name)(options))
