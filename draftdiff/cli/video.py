"""The commands `draftdiff generate`, `compare` and `tune`: diffusers' pipelines, dense and sparse."""

from __future__ import annotations

import json
import time
from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftdiff.cli.options import Field, Once, Parser, add_place, add_seed, fields_of
from draftdiff.cli.output import deliver, note, print_json
from draftdiff.errors import UserError, user_errors
from draftdiff.files import prepare_file
from draftdiff.models.devices import about
from draftdiff.video.config import ALIASES, DraftAttentionConfig, by_field

# diffusers takes seconds to import: only inside the commands.

_FIELDS: dict[str, Field] = fields_of(DraftAttentionConfig)
_CALL = ("frames", "height", "width", "steps", "guidance", "fps", "negative_prompt")


def add_generate(parser: Parser) -> None:
    parser.add_argument("--prompt", required=True, action=Once, hint="draftdiff compare takes several")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".mp4, or .png for an image")
    how = parser.add_mutually_exclusive_group()
    _FIELDS["sparsity"].add_to(how)
    how.add_argument("--dense", action="store_true", help="the pipeline as it is, without draftdiff")
    how.add_argument("--profile", type=Path, metavar="FILE", help="settings that draftdiff tune wrote")
    _add_attention(parser)
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(func=_generate)


def add_compare(parser: Parser) -> None:
    parser.add_argument("--prompt", required=True, action="append", help="repeat for several prompts")
    parser.add_argument("-o", "--output", type=Path, default=Path("compare"), metavar="FOLDER", help="default: compare")
    parser.add_argument(
        "--sparsity", type=_FIELDS["sparsity"].read, nargs="+", help="one setting each (default: 0.5 0.75 0.9)"
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=KEY:VALUE,...",
        help=f"a further setting, over the options below; keys: {', '.join(_FIELDS)}; for example "
        '"upstream=selection:upstream,tail:false" or "flat tiles=tile:1x8x8"',
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="one more setting, that draftdiff tune wrote (in --setting: profile:FILE)",
    )
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds (default: 3)")
    _add_attention(parser)
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    parser.set_defaults(func=_compare)


def add_tune(parser: Parser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        help='least likeness to the dense videos, as "35 dB" or "lpips 0.05", or speed over dense, as "1.8x"',
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="to calibrate with; repeat for several (default for the embedded model: three of its world)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".json; a page of the same name is put beside it",
    )
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print the profile and its checks as JSON")
    parser.set_defaults(func=_tune)


def _add_attention(parser: Parser) -> None:
    group = parser.add_argument_group("attention, the fields of DraftAttentionConfig")
    for name, field in _FIELDS.items():
        if name != "sparsity":
            field.add_to(group)
    for alias, (meant, kind, _) in ALIASES.items():
        option, told = (f"--{text.replace('_', '-')}" for text in (alias, meant))
        group.add_argument(option, type=kind, metavar="X", help=f"{told} as ComfyUI has it")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model and size (defaults: the model's)")
    group.add_argument("--model", help="folder or Hub id of a diffusers pipeline (default: the embedded mini model)")
    group.add_argument("--negative-prompt")
    group.add_argument("--variant", metavar="NAME", help="of the weight files, for example fp16")
    group.add_argument("--image", metavar="FILE", help="first frame, for image-to-video pipelines")
    group.add_argument("--video", metavar="FILE", help="clip to start from, for video-to-video pipelines")
    group.add_argument("--frames", type=int)
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--guidance", type=float, help="classifier-free guidance scale")
    add_seed(group)
    group.add_argument("--fps", type=float, help="frames per second of the video")
    add_place(group)
    group.add_argument(
        "--offload", nargs="?", const="model", choices=("model", "sequential"), help="keep weights in main memory"
    )


def _config(fields: dict[str, Any], options: Namespace) -> DraftAttentionConfig:
    """Of these fields, for the others the options that were given, and for what is left the fields' profile."""
    fields = dict(fields)
    profile = fields.pop("profile", None)
    given = {name: getattr(options, name) for name in (*_FIELDS, *ALIASES) if name != "sparsity"}
    given = {name: value for name, value in given.items() if value is not None}
    if options.model is None:
        # It is there to show the method, also on a GPU where so few tokens do not pay.
        given.setdefault("min_tokens", 0)
    with user_errors():
        asked = by_field(given) | by_field(fields)
        return (
            DraftAttentionConfig(**asked)
            if profile is None
            else replace(DraftAttentionConfig.from_profile(profile), **asked)
        )


def _named(sparsity: float | tuple[float, ...]) -> str:
    values = sparsity if isinstance(sparsity, tuple) else (sparsity,)
    return f"sparsity {','.join(f'{value:g}' for value in values)}"


def _settings(options: Namespace) -> dict[str, DraftAttentionConfig]:
    """All sparse settings of a comparison by name."""
    sparsities = options.sparsity or ([] if options.setting or options.profile else [0.5, 0.75, 0.9])
    settings = {_named(value): _config({"sparsity": value}, options) for value in sparsities}
    if options.profile:
        settings["profile"] = _config({"profile": options.profile}, options)
    for text in options.setting:
        name, equals, body = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--setting {text!r} must be NAME=KEY:VALUE,KEY:VALUE,...")
        if name in settings:
            raise UserError(f"--setting {name!r} is given twice")
        settings[name] = _config(dict(_pair(name, pair) for pair in body.split(",") if pair), options)
    return settings


def _pair(setting: str, pair: str) -> tuple[str, Any]:
    key, _, value = pair.partition(":")
    if key == "profile":
        return key, value
    if key not in (*_FIELDS, *ALIASES):
        raise UserError(f"--setting {setting!r}: unknown key {key!r}; keys: {', '.join(_FIELDS)}")
    try:
        return key, ALIASES[key][1](value) if key in ALIASES else _FIELDS[key].read(value)
    except (ArgumentTypeError, ValueError):
        raise UserError(f"--setting {setting!r}: cannot read {pair!r}") from None


def _load(options: Namespace, configs: list[DraftAttentionConfig]) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments of its call, checked as far as can be before running it."""
    from diffusers.utils import load_image, load_video

    from draftdiff.models.video import call_arguments, load
    from draftdiff.video.patch import check

    given = {}
    for name, read in (("image", load_image), ("video", load_video)):
        path = getattr(options, name)
        try:
            given[name] = None if path is None else read(path)
        except Exception:  # Pillow and imageio have many
            raise UserError(f"{name} {path!r} cannot be read") from None
    places = {name: getattr(options, name) for name in ("dtype", "device", "offload", "variant")}
    model = load(options.model, **places)
    for config in configs:
        check(model.pipeline, config)
    return model, call_arguments(model, **given, **{name: getattr(options, name) for name in _CALL})


def _generate(options: Namespace) -> int:
    from draftdiff.models.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, frames_of, write_frames

    prepare_file(options.output, VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    asked = {name: getattr(options, name) for name in ("sparsity", "profile") if getattr(options, name) is not None}
    config = None if options.dense else _config(asked, options)
    import torch

    from draftdiff import enable, report
    from draftdiff.models.loading import inputs_refused
    from draftdiff.models.video import world_judge

    model, call = _load(options, [config] if config else [])
    prepare_file(options.output, VIDEO_SUFFIXES if model.makes_video else IMAGE_SUFFIXES)
    if options.model is None:
        for text in world_judge([options.prompt])[1]:
            note(text)
    if config is not None:
        enable(model.pipeline, config)
    fps = options.fps or model.fps
    generator = torch.Generator().manual_seed(options.seed)
    start = time.perf_counter()
    with inputs_refused(model.pipeline):
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
            "config": config.to_dict() if config else None,
            "report": done.to_dict() if done else None,
        }
        print_json(result, model.device)
    else:
        print(done or "dense: draftdiff was not enabled")
        count, height, width, _ = frames.shape
        print(f"{options.output}: {count} frames of {width}x{height}, {seconds:.2f} s")
    return 0


def _compare(options: Namespace) -> int:
    from draftdiff.compare.comparison import check_folder
    from draftdiff.compare.video import VideoComparison

    check_folder(options.output, VideoComparison.made_by)
    settings = _settings(options)
    from draftdiff.compare import video_page
    from draftdiff.compare.video_run import compare_videos
    from draftdiff.models.video import world_judge

    model, call = _load(options, list(settings.values()))
    judge, notes = world_judge(options.prompt) if options.model is None else (None, [])
    for text in notes:
        note(text)
    model.pipeline.set_progress_bar_config(leave=False)
    comparison = compare_videos(
        model.pipeline,
        options.prompt,
        settings,
        repeat=options.repeat,
        seed=options.seed,
        call_kwargs=call,
        judge=judge,
        fps=options.fps or model.fps,
        about={"model": model.name, **about(model.device, model.pipeline.dtype, options.command_line)},
    )
    return deliver(comparison, video_page.write, options.output, options)


def _tune(options: Namespace) -> int:
    prepare_file(options.output, (".json",))
    from draftdiff.compare import tune, tune_page
    from draftdiff.models.video import world_prompts

    tune.Target.of(options.target)
    if options.model is not None and not options.prompt:
        raise UserError("--prompt is needed with --model: the profile is found with what it is to be used for")
    # As for the other commands: the embedded model has few tokens.
    config = replace(tune.BASE, min_tokens=0) if options.model is None else tune.BASE
    model, call = _load(options, [config])
    model.pipeline.set_progress_bar_config(leave=False)
    tuning = tune.search(
        model.pipeline,
        options.prompt or world_prompts(),
        target=options.target,
        call_kwargs=call,
        config=config,
        seed=options.seed,
        about={"model": model.name, **about(model.device, model.pipeline.dtype, options.command_line)},
    )
    print(json.dumps(tuning.to_dict(), default=str) if options.json else tuning.table())
    page = options.output.with_suffix(".html")
    tuning.profile.write(options.output)
    tune_page.write(tuning, page)
    if not options.json:
        print(f"{options.output}, {page}")
    return 0
