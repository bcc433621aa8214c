"""The command `draftdiff`: generate a video, pictures or text, compare runs, convert models, or see what works here.

A mistake of the user is one line on standard error and exit code 2; Ctrl-C is 130, a reader that has enough (`| head`)
141; a bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from draftdiff.arguments import seed

if TYPE_CHECKING:
    import numpy as np

    from draftdiff.generate import Model
    from draftdiff.video.config import DraftAttentionConfig

# torch and diffusers take seconds to import: only inside the commands that need them.


class _UsageError(ValueError):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe is understood
        return code
    except BrokenPipeError:
        # Python writes at its end what is still buffered: it must not meet the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that the signal ended


def _run(argv: list[str]) -> int:
    try:
        options = _parser().parse_args(argv)
        options.command_line = shlex.join(["draftdiff", *argv])
        return options.func(options)
    except KeyboardInterrupt:
        print("draftdiff: interrupted", file=sys.stderr)
        return 130
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except Exception as error:
        if not _is_users(error):
            raise
        message = " ".join(str(error).split()).removeprefix("draftdiff: ")
        print(f"draftdiff: error: {message}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Whether an exception tells the user of a mistake: ours that are meant so, a pipeline's check of its inputs, or a
    device that is too small. Anything else is a bug."""
    if type(error).__name__ == "OutOfMemoryError" or str(error).startswith("draftdiff.llm needs"):
        return True
    if not isinstance(error, (ValueError, FileNotFoundError)) or error.__traceback__ is None:
        return False
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame
    return raised_in.f_globals["__name__"].startswith("draftdiff") or raised_in.f_code.co_name == "check_inputs"


def _parser() -> argparse.ArgumentParser:
    from draftdiff._version import __version__

    parser = _Parser(
        prog="draftdiff",
        description="Cheap drafts for expensive models: sparse attention, CoDe, ScaleKV, and language-model drafts.",
    )
    parser.add_argument("--version", action="version", version=f"draftdiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make one video or image")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".mp4, or .png for an image")
    how = generate.add_mutually_exclusive_group()
    how.add_argument("--sparsity", type=float, help="share of key tiles to skip, from 0 to below 1 (default: 0.75)")
    how.add_argument("--dense", action="store_true", help="the pipeline as it is, without draftdiff")
    _add_attention(generate)
    _add_model(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    generate.set_defaults(func=_generate)

    compare = commands.add_parser("compare", help="time and judge dense and sparse runs side by side")
    compare.add_argument("--prompt", required=True, action="append", help="repeat for several prompts")
    compare.add_argument(
        "-o", "--output", type=Path, default=Path("compare"), metavar="FOLDER", help="default: compare"
    )
    compare.add_argument("--sparsity", type=float, nargs="+", help="one setting each (default: 0.5 0.75 0.9)")
    compare.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=KEY:VALUE,...",
        help=f"a further setting, over the options below; keys: {', '.join(_FIELDS)}; for example "
        '"upstream=selection:upstream,tail:false" or "flat tiles=tile:1x8x8"',
    )
    compare.add_argument("--repeat", type=int, default=3, help="timed rounds (default: 3)")
    _add_attention(compare)
    _add_model(compare)
    compare.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    compare.set_defaults(func=_compare)

    from draftdiff import image_cli, llm_cli

    image_cli.add_commands(commands)
    llm_cli.add_commands(commands)

    doctor = commands.add_parser("doctor", help="what works here: devices, backends, tools, models")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(func=_doctor)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace("x", ",").split(",") if part)


def _steps_or_share(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _layers(text: str) -> int | tuple[int, ...]:
    return _numbers(text) if "," in text or "x" in text else int(text)


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# The fields of DraftAttentionConfig that the command line can set, and how to read them.
_FIELDS: dict[str, Callable[[str], Any]] = {
    "sparsity": float,
    "selection": str,
    "row_floor": float,
    "tail": _flag,
    "tile": _numbers,
    "block_size": int,
    "dense_steps": _steps_or_share,
    "dense_layers": _layers,
    "min_tokens": int,
    "backend": str,
}


def _field(name: str) -> Callable[[str], Any]:
    """An argparse type that names the value and the field in its error."""

    def read(text: str) -> Any:
        try:
            return _FIELDS[name](text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"cannot read {text!r}") from None

    return read


def _add_attention(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention (defaults: those of DraftAttentionConfig)")
    group.add_argument("--selection", help="draft, upstream (the paper's rule) or full")
    group.add_argument("--row-floor", type=_field("row_floor"), help="share of the budget dealt evenly to the rows")
    group.add_argument("--no-tail", dest="tail", action="store_const", const=False, help="drop skipped tiles wholly")
    group.add_argument("--tile", type=_field("tile"), metavar="T,H,W", help="tile in tokens: frames, rows, columns")
    group.add_argument("--block-size", type=_field("block_size"), help="64 or 128 tokens")
    group.add_argument(
        "--dense-steps", type=_field("dense_steps"), metavar="N|SHARE", help="first steps that stay dense: 5, or 0.2"
    )
    group.add_argument(
        "--dense-layers", type=_field("dense_layers"), metavar="N|I,J", help="layers that stay dense: first N, or these"
    )
    group.add_argument("--min-tokens", type=_field("min_tokens"), help="calls with fewer video tokens stay dense")
    group.add_argument("--backend", help="kernel (default: auto; draftdiff doctor lists them)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and size (defaults: the model's)")
    group.add_argument("--model", help="folder or Hub id of a diffusers pipeline (default: the embedded mini model)")
    group.add_argument("--negative-prompt")
    group.add_argument("--image", metavar="FILE", help="first frame, for image-to-video pipelines")
    group.add_argument("--frames", type=int)
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--guidance", type=float, help="classifier-free guidance scale")
    group.add_argument("--seed", type=seed, default=0, help="default: 0")
    group.add_argument("--fps", type=float, help="frames per second of the video")
    group.add_argument("--dtype", help="float32, float16 or bfloat16")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ...")
    group.add_argument(
        "--offload", nargs="?", const="model", choices=("model", "sequential"), help="keep weights in main memory"
    )


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the config that were given; a list of sparsities is not one."""
    given = {name: getattr(options, name) for name in _FIELDS}
    given = {name: value for name, value in given.items() if value is not None and not isinstance(value, list)}
    if options.model is None:
        # It is there to show the method, also on a GPU where so few tokens do not pay.
        given.setdefault("min_tokens", 0)
    return given


def _settings(options: argparse.Namespace) -> dict[str, DraftAttentionConfig]:
    """All sparse settings of a comparison by name."""
    from draftdiff.video.config import DraftAttentionConfig

    base = _fields(options)
    sparsities = options.sparsity or ([] if options.setting else [0.5, 0.75, 0.9])
    settings = {f"sparsity {value:g}": DraftAttentionConfig(**base | {"sparsity": value}) for value in sparsities}
    for text in options.setting:
        name, equals, body = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--setting {text!r} must be NAME=KEY:VALUE,KEY:VALUE,...")
        if name in settings:
            raise ValueError(f"--setting {name!r} is given twice")
        fields = dict(base)
        for pair in filter(None, body.split(",")):
            key, _, value = pair.partition(":")
            if key not in _FIELDS:
                raise ValueError(f"--setting {name!r}: unknown key {key!r}; keys: {', '.join(_FIELDS)}")
            try:
                fields[key] = _FIELDS[key](value)
            except (ValueError, KeyError):
                raise ValueError(f"--setting {name!r}: cannot read {pair!r}") from None
        settings[name] = DraftAttentionConfig(**fields)
    return settings


def _load(options: argparse.Namespace, configs: list[DraftAttentionConfig]) -> tuple[Model, dict[str, Any]]:
    """The model, and the arguments of its call, checked as far as can be before running it."""
    from diffusers.utils import load_image

    from draftdiff import disable, enable
    from draftdiff.generate import call_arguments, load
    from draftdiff.kernels.block_sparse import resolve

    image = None
    if options.image is not None:
        try:
            image = load_image(options.image)
        except (OSError, ValueError):
            raise ValueError(f"image {options.image!r} cannot be read") from None
    model = load(options.model, dtype=options.dtype, device=options.device, offload=options.offload)
    for config in configs:
        enable(model.pipeline, config)
        resolve(config.backend, model.device, model.pipeline.dtype, 64)
        disable(model.pipeline)
    names = ("frames", "height", "width", "steps", "guidance", "fps", "negative_prompt")
    call = call_arguments(model, image=image, **{name: getattr(options, name) for name in names})
    if options.model is None:
        _warn_of_unknown_words(options.prompt)
    return model, call


def _warn_of_unknown_words(prompts: str | list[str]) -> None:
    from draftdiff.pipelines.mini import world as mini_world

    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        if mini_world.parse_caption(prompt) is None:
            print(
                f"draftdiff: note: the embedded model knows {', '.join(mini_world.COLOURS)} "
                f"{', '.join(mini_world.SHAPES)} moving {', '.join(mini_world.MOTIONS)}; {prompt!r} lacks one of them",
                file=sys.stderr,
            )


def _generate(options: argparse.Namespace) -> int:
    from draftdiff.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_output, frames_of, write_frames

    check_output(options.output)
    import torch

    from draftdiff import DraftAttentionConfig, enable, report
    from draftdiff.devices import device_name, versions

    config = None if options.dense else DraftAttentionConfig(**_fields(options))
    model, call = _load(options, [config] if config else [])
    check_output(options.output, VIDEO_SUFFIXES if model.makes_video else IMAGE_SUFFIXES)
    if config is not None:
        enable(model.pipeline, config)
    fps = options.fps or model.fps
    generator = torch.Generator().manual_seed(options.seed)
    start = time.perf_counter()
    output = model.pipeline(prompt=options.prompt, generator=generator, output_type="np", **call)
    seconds = time.perf_counter() - start
    frames = frames_of(output)
    write_frames(options.output, frames, fps)

    done = report(model.pipeline) if config is not None else None
    if options.json:
        result = {
            "output": str(options.output),
            "model": model.name,
            "prompt": options.prompt,
            "seed": options.seed,
            "shape": list(frames.shape),
            "fps": fps,
            "seconds": seconds,
            "config": vars(config) if config else None,
            "report": done.to_dict() if done else None,
            "device": device_name(model.device),
            "versions": versions(),
        }
        print(json.dumps(result, default=str))
    else:
        print(done or "dense: draftdiff was not enabled")
        count, height, width, _ = frames.shape
        print(f"{options.output}: {count} frames of {width}x{height}, {seconds:.2f} s")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from draftdiff.compare.folder import check_folder
    from draftdiff.compare.run import MADE_BY, compare

    check_folder(options.output, MADE_BY)
    settings = _settings(options)
    from draftdiff.devices import device_name, versions

    model, call = _load(options, list(settings.values()))
    model.pipeline.set_progress_bar_config(leave=False)
    comparison = compare(
        model.pipeline,
        options.prompt,
        settings,
        repeat=options.repeat,
        seed=options.seed,
        call_kwargs=call,
        judge=_mini_judge if options.model is None else None,
    )
    comparison.fps = options.fps or model.fps
    comparison.about = {
        "model": model.name,
        "device": device_name(model.device),
        "dtype": str(model.pipeline.dtype).removeprefix("torch."),
        "versions": versions(),
        "command": options.command_line,
    }
    # Printed before it is written: hours of runs should not be lost to a full disk.
    print(json.dumps(comparison.to_dict(), default=str) if options.json else comparison.table())
    comparison.write(options.output)
    if not options.json:
        print(options.output / "report.html")
    return 0


def _mini_judge(prompt: str, frames: np.ndarray) -> dict[str, bool] | None:
    """What of the prompt the embedded model's clip shows, None for a prompt that is not of its world."""
    from draftdiff.pipelines.mini import judge as mini_judge
    from draftdiff.pipelines.mini import world as mini_world

    scene = mini_world.parse_caption(prompt)
    return None if scene is None else mini_judge.compare(mini_judge.judge(frames / 255), scene)


def _doctor(options: argparse.Namespace) -> int:
    from draftdiff.doctor import examine, is_healthy, to_text

    findings = examine()
    print(json.dumps(findings, indent=1) if options.json else to_text(findings))
    return 0 if is_healthy(findings) else 1
