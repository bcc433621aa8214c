"""The commands `draftdiff llm generate` and `draftdiff llm compare`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from draftdiff.cli.options import Once, Parser, add_place, add_seed
from draftdiff.cli.output import deliver, print_json
from draftdiff.errors import UserError, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from draftdiff.llm.workloads.base import Case, Workload
    from draftdiff.models.llm import LanguageModel

# torch and transformers take seconds to import: only inside the commands that need them.

_METHODS = (
    "plain, chain, adaptive, tree, sampled, trimmed, pearl, omnidraft, universal, hydra, medusa, longspec, falcon, "
    "ngram, ngram-puct (all lossless), speckv, specpc, speckv-pc, speckv-chain"
)


def add_llm(llm: Parser) -> None:
    parts = llm.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = parts.add_parser("generate", help="continue one prompt")
    hint = "draftdiff llm compare takes several"
    generate.add_argument("--prompt", metavar="TEXT", action=Once, hint=hint, help='for example "def "')
    generate.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file instead")
    generate.add_argument("--method", default="chain", metavar="NAME", help=f"{_METHODS} (default: chain)")
    _add_common(generate)
    generate.add_argument("--tokens", type=int, default=128, help="new tokens (default: 128)")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    generate.set_defaults(func=_generate)

    compare = parts.add_parser("compare", help="measure every method beside plain decoding")
    compare.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="repeat for several"
    )
    compare.add_argument("--prompt-file", dest="prompt_files", type=Path, action="append", default=[], metavar="FILE")
    compare.add_argument(
        "--method",
        dest="methods",
        action="append",
        default=[],
        metavar="NAME",
        help=f"repeat for several: {_METHODS} (default: all)",
    )
    compare.add_argument(
        "--workload",
        choices=("drawing", "travel"),
        help="cases with known answers instead of prompts: scores, paired differences from plain decoding, verdicts",
    )
    compare.add_argument("--cases", type=int, help="of the workload (default: 24)")
    compare.add_argument(
        "--noise", type=float, help="of travel's tables with --model, 0 to 1: 10,000 tokens (default: 0.3)"
    )
    compare.add_argument("--examples", type=int, default=4, help="prompts where none is given, up to 8 (default: 4)")
    compare.add_argument("--prompt-tokens", type=int, default=384, help="length of those (default: 384)")
    compare.add_argument("--repeat", type=int, help="timed rounds (default: 3, with a workload 1)")
    compare.add_argument(
        "-o", "--output", type=Path, default=Path("compare-llm"), metavar="FOLDER", help="default: compare-llm"
    )
    _add_common(compare)
    compare.add_argument("--tokens", type=int, help="new tokens (default: 64, with a workload what its answers need)")
    compare.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    compare.set_defaults(func=_compare)


def _add_common(parser: Parser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--capacity", type=int, default=128, help="tokens that SpecKV and SpecPC keep (default: 128)")
    add_seed(parser)
    parser.add_argument("--model", help="folder or Hub id of the target (default: the embedded mini pair)")
    parser.add_argument("--draft", help="folder or Hub id of a smaller model; most methods need the same tokenizer")
    parser.add_argument(
        "--same-tokenizer",
        action="store_true",
        help="take the draft's tokenizer for the target's, whatever they say",
    )
    add_place(parser)


def _check_transformers() -> None:
    with user_errors(ImportError):  # which says that the installed one is too old
        import draftdiff.llm  # noqa: F401


def _load(options: Namespace, workload: str | None = None) -> LanguageModel:
    import transformers

    from draftdiff.models.llm import load

    transformers.utils.logging.set_verbosity_error()
    return load(
        options.model,
        options.draft,
        dtype=options.dtype,
        device=options.device,
        same_tokenizer=options.same_tokenizer,
        workload=workload,
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"prompt file {str(file)!r} cannot be read: {error}") from None


def _generate(options: Namespace) -> int:
    if (options.prompt is None) == (options.prompt_file is None):
        raise UserError("give --prompt TEXT or --prompt-file FILE")
    if options.capacity < 1:
        raise UserError(f"capacity must be at least 1, got {options.capacity}")
    text = options.prompt if options.prompt_file is None else _read(options.prompt_file)
    _check_transformers()
    import torch
    from transformers import TextStreamer

    from draftdiff.models.llm import encode
    from draftdiff.models.llm_methods import check_method, generate_options

    arguments = generate_options(options.tokens, options.temperature)
    model = _load(options)
    method = check_method(model, options.method)
    ids = encode(model, text)
    if not options.json:
        print(text, end="", flush=True)
        arguments["streamer"] = TextStreamer(model.tokenizer, skip_prompt=True)
    torch.manual_seed(options.seed)
    run = method.run(model, ids, arguments, options.capacity)
    if options.json:
        result = {
            "model": model.name,
            "method": options.method,
            "prompt": text,
            "text": model.tokenizer.decode(run.tokens),
            "tokens": len(run.tokens),
            "seconds": run.seconds,
            "cache_bytes": run.cache,
            "report": run.report.to_dict() if run.report else None,
        }
        print_json(result, model.device)
        return 0
    sys.stdout.flush()  # before what goes to standard error
    speed = f"{method.title}: {len(run.tokens)} tokens in {run.seconds:.2f} s, cache {run.cache / 1e6:.3g} MB"
    print(speed if run.report is None else f"{speed}\n{run.report}", file=sys.stderr)
    return 0


def _prompts(options: Namespace, model: LanguageModel) -> list[Tensor]:
    from draftdiff.models.llm import encode, example_prompts

    texts = [*options.prompts, *map(_read, options.prompt_files)]
    if texts:
        return [encode(model, text) for text in texts]
    return example_prompts(model, options.examples, options.prompt_tokens)


def _compare(options: Namespace) -> int:
    _check_transformers()
    from draftdiff.compare.comparison import check_folder
    from draftdiff.compare.llm import LlmComparison, compare_methods

    check_folder(options.output, LlmComparison.made_by)
    from draftdiff.compare import llm_page
    from draftdiff.models.devices import about
    from draftdiff.models.llm import encode
    from draftdiff.models.llm_methods import generate_options, methods_of

    workload, cases = _cases(options)
    usual = 64 if workload is None else workload.tokens
    arguments = generate_options(usual if options.tokens is None else options.tokens, options.temperature)
    model = _load(options, options.workload)
    comparison = compare_methods(
        model,
        _prompts(options, model) if workload is None else [encode(model, case.prompt) for case in cases],
        options.methods or methods_of(model),
        capacity=options.capacity,
        options=arguments,
        repeat=(3 if workload is None else 1) if options.repeat is None else options.repeat,
        seed=options.seed,
        about=about(model.device, model.target.dtype, options.command_line),
        workload=None if workload is None else (workload, cases),
    )
    return deliver(comparison, llm_page.write, options.output, options)


def _cases(options: Namespace) -> tuple[Workload | None, list[Case]]:
    """The workload that was asked for and its cases. Raises UserError for options that do not go together."""
    from draftdiff.compare.llm_workload import checked_cases
    from draftdiff.llm.workloads.named import named_workload

    if options.workload is None:
        for name in ("cases", "noise"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} goes with --workload")
        return None, []
    if options.prompts or options.prompt_files:
        raise UserError("--workload brings its own prompts: leave --prompt and --prompt-file out")
    workload = named_workload(options.workload, compact=options.model is None, noise=options.noise)
    return workload, checked_cases(workload, options.seed, 24 if options.cases is None else options.cases)
