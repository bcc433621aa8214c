"""The commands `draftdiff compare` and `tune`, and what they share with `generate`: diffusers' pipelines."""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError, Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from draftdiff.cli.options import Field, Parser, add_place, add_seed, fields_of
from draftdiff.cli.output import deliver, note
from draftdiff.errors import UserError, user_errors
from draftdiff.files import prepare_file
from draftdiff.models.devices import about
from draftdiff.video.config import ALIASES, DraftAttentionConfig, by_field

# diffusers takes seconds to import: only inside the commands.

_FIELDS: dict[str, Field] = fields_of(DraftAttentionConfig)
_CALL = ("frames", "height", "width", "steps", "guidance", "fps", "negative_prompt", "strength")


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
    add_attention(parser)
    add_model(parser)
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
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print the profile and its checks as JSON")
    parser.set_defaults(func=_tune)


def add_sparsity(parser: Any) -> None:
    _FIELDS["sparsity"].add_to(parser)


def add_attention(parser: Parser) -> None:
    group = parser.add_argument_group("attention, the fields of DraftAttentionConfig")
    for name, field in _FIELDS.items():
        if name != "sparsity":
            field.add_to(group)
    for alias, (meant, kind, _) in ALIASES.items():
        option, told = (f"--{text.replace('_', '-')}" for text in (alias, meant))
        group.add_argument(option, type=kind, metavar="X", help=f"{told} as ComfyUI has it")


def add_model(parser: Parser, *, with_seed: bool = True, several: bool = False) -> None:
    group = parser.add_argument_group("model and size (defaults: the model's)")
    told = "folder or Hub id of a diffusers pipeline"
    if several:
        group.add_argument("--model", action="append", help=f"{told}; repeat to offer several beside the embedded one")
    else:
        group.add_argument("--model", help=f"{told} (default: the embedded mini model)")
    group.add_argument("--negative-prompt")
    group.add_argument("--variant", metavar="NAME", help="of the weight files, for example fp16")
    group.add_argument("--image", metavar="FILE", help="first frame, or the picture to work on")
    group.add_argument("--last-image", metavar="FILE", help="last frame, for pipelines that fill what is between")
    group.add_argument("--video", metavar="FILE", help="clip to start from, for video-to-video pipelines")
    group.add_argument(
        "--strength", type=float, metavar="X", help="how much of --video or --image is made anew, 0 to 1"
    )
    group.add_argument("--frames", "--num-frames", type=int, metavar="N")
    group.add_argument("--size", type=_size, metavar="WxH", help="--width and --height at once")
    group.add_argument("--height", type=int, metavar="N", help="pixels")
    group.add_argument("--width", type=int, metavar="N", help="pixels")
    group.add_argument("--steps", "--num-inference-steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance", "--guidance-scale", type=float, metavar="X", help="of classifier-free guidance")
    if with_seed:
        add_seed(group)
    group.add_argument("--fps", type=float, metavar="X", help="frames per second of the video")
    add_place(group)
    group.add_argument(
        "--offload",
        nargs="?",
        const="model",
        choices=("model", "sequential", "group"),
        help="keep weights in main memory: whole parts (model), layers (sequential), layers ahead of time (group)",
    )
    setup = parser.add_argument_group("changes to the pipeline, all as diffusers has them")
    setup.add_argument("--lora", action="append", default=[], metavar="PLACE[:WEIGHT]", help="repeat for several")
    setup.add_argument("--scheduler", metavar="NAME", help="for example UniPCMultistep")
    setup.add_argument("--flow-shift", type=float, metavar="X", help="of a flow-matching scheduler")
    setup.add_argument("--attention-backend", metavar="NAME", help="of dense calls: native, sage, _flash_3, ...")
    setup.add_argument(
        "--cache",
        metavar="NAME[:FIELD=VALUE,...]",
        help="first-block, taylorseer, mag, pab, faster or dbcache; compare shows it alone and with each setting",
    )
    setup.add_argument("--compile", action="store_true", help="compile the transformer's repeated blocks")
    setup.add_argument("--vae-tiling", action="store_true", help="decode part by part, with less memory")
    setup.add_argument("--quantize", metavar="NAME", help="load the transformer as bnb-4bit, bnb-8bit, int8 or fp8")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX*](\d+)", text)
    if found is None:
        raise ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}")
    return int(found[1]), int(found[2])


def config_of(fields: dict[str, Any], options: Namespace) -> DraftAttentionConfig:
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
    settings = {_named(value): config_of({"sparsity": value}, options) for value in sparsities}
    if options.profile:
        settings["profile"] = config_of({"profile": options.profile}, options)
    for text in options.setting:
        name, equals, body = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--setting {text!r} must be NAME=KEY:VALUE,KEY:VALUE,...")
        if name in settings:
            raise UserError(f"--setting {name!r} is given twice")
        settings[name] = config_of(dict(_pair(name, pair) for pair in body.split(",") if pair), options)
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


def load_model(
    options: Namespace, configs: list[DraftAttentionConfig], *, with_cache: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments of its call, checked as far as can be before running it."""
    from diffusers.utils import load_image, load_video

    from draftdiff.models.setup import Setup
    from draftdiff.models.video import call_arguments, load
    from draftdiff.video.patch import check

    given = {}
    for name, read in (("image", load_image), ("last_image", load_image), ("video", load_video)):
        path = getattr(options, name)
        try:
            given[name] = None if path is None else read(path)
        except Exception:  # Pillow and imageio have many
            raise UserError(f"{name} {path!r} cannot be read") from None
    sizes = dict(zip(("width", "height"), options.size or ()))
    for name, size in sizes.items():
        if getattr(options, name) not in (None, size):
            raise UserError(f"--size says {name} {size}, --{name} says {getattr(options, name)}")
    asked = {name: sizes.get(name, getattr(options, name)) for name in _CALL}
    places = {name: getattr(options, name) for name in ("dtype", "device", "offload", "variant", "quantize")}
    setup = Setup(**{field.name: getattr(options, field.name) for field in fields(Setup)})
    if not with_cache:
        setup = replace(setup, cache=None)
    model = load(options.model, **places, setup=setup)
    for config in configs:
        check(model.pipeline, config)
    return model, call_arguments(model, **given, **asked)


def _compare(options: Namespace) -> int:
    from draftdiff.compare.comparison import check_folder
    from draftdiff.compare.video import VideoComparison

    check_folder(options.output, VideoComparison.made_by)
    settings = _settings(options)
    from draftdiff.compare import video_page
    from draftdiff.compare.video_run import compare_videos
    from draftdiff.models.video import world_judge

    model, call = load_model(options, list(settings.values()), with_cache=False)
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
        cache=options.cache,
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
    model, call = load_model(options, [config])
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
