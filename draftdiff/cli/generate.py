"""The command `draftdiff generate`: clips and pictures by a diffusers pipeline, one or many, on one GPU or several."""

from __future__ import annotations

import re
import time
from argparse import Action, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from draftdiff.cli.options import Parser, seed
from draftdiff.cli.output import note, print_json
from draftdiff.cli.video import add_attention, add_model, add_sparsity, config_of, load_model
from draftdiff.errors import UserError
from draftdiff.files import prepare_file, prepare_folder

# What is a clip's own, or how the run goes on, and not what a clip is made of.
_NOT_OF_A_CLIP = {"prompt", "prompt_file", "seed", "output", "format", "json", "made_like", "help"}
_NOT_OF_A_CLIP |= {"device", "offload", "ulysses", "ring", "vae_tiling"}
_FILES = ("image", "last_image", "video", "model", "profile", "lora")
_EXCLUSIVE = ("sparsity", "dense", "profile")


class _From(Action):
    """Keeps what the file says; `_remake` uses it for options that were not given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from draftdiff.models.clips import settings_in

        told = settings_in(values)
        actions = {action.dest: action for action in parser._actions}
        values = {
            name: _read(actions[name], value) for name, value in told.get("options", {}).items() if name in actions
        }
        values |= {"prompt": [told["prompt"]], "seed": [told["seed"]]}
        namespace.made_like = values


def _read(action: Action, value: Any) -> Any:
    if isinstance(value, list):
        return [_read(action, one) for one in value]
    return action.type(value) if callable(action.type) and isinstance(value, str) else value


def add_generate(parser: Parser) -> None:
    parser.add_argument("--prompt", action="append", help="repeat for several")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt a line; # begins a remark")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE|FOLDER",
        help=".mp4, .webm, .gif, .webp; .png or .jpg for an image, frames/%%04d.png for each frame; a folder for "
        "several clips, of which those that are there already are left",
    )
    parser.add_argument("--format", default=None, metavar="NAME", help="of clips in a folder: mp4 (default), webm, ...")
    parser.add_argument("--seed", type=seed, nargs="+", default=[0], help="several make a clip each; -1 draws one")
    parser.add_argument(
        "--from",
        dest="made_like",
        action=_From,
        type=Path,
        metavar="CLIP.json",
        help="make a clip again: all options that are not given are those of the clip that this file was put beside",
    )
    how = parser.add_mutually_exclusive_group()
    add_sparsity(how)
    how.add_argument("--dense", action="store_true", help="the pipeline as it is, without draftdiff")
    how.add_argument("--profile", type=Path, metavar="FILE", help="settings that draftdiff tune wrote")
    add_attention(parser)
    add_model(parser, with_seed=False)
    several = parser.add_argument_group("several GPUs, under torchrun or accelerate launch")
    several.add_argument("--ulysses", type=int, default=1, metavar="N", help="share one clip by heads over N processes")
    several.add_argument("--ring", type=int, default=1, metavar="N", help="share one clip by keys over N processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object a clip instead of text")
    parser.set_defaults(func=partial(_generate, parser))


def _remake(options: Namespace, parser: Parser) -> None:
    """Of options that were not given take what the file of a clip says."""
    given = {name for name, default in _defaults(parser).items() if getattr(options, name, None) is not default}
    if given & set(_EXCLUSIVE):
        given |= set(_EXCLUSIVE)
    for name, value in (options.made_like or {}).items():
        if name not in given:
            setattr(options, name, value)


def _prompts(options: Namespace) -> list[str]:
    from draftdiff.models.clips import prompts_in

    prompts = list(options.prompt or [])
    if options.prompt_file is not None:
        prompts += prompts_in(options.prompt_file)
    if not prompts:
        raise UserError("--prompt, --prompt-file or --from is needed (see draftdiff generate --help)")
    return prompts


def _ending(options: Namespace, suffixes: tuple[str, ...]) -> str | None:
    """Of the clips in a folder, made here; None for one file, whose folder is made."""
    from draftdiff.models.frames import is_numbered

    if is_numbered(options.output):
        prepare_folder(options.output.parent)
    elif options.output.suffix.lower() in suffixes or (options.output.suffix and not options.output.is_dir()):
        prepare_file(options.output, suffixes)
    else:
        ending = f".{options.format or suffixes[0][1:]}"
        if ending not in suffixes:
            raise UserError(f"--format must be {' or '.join(s[1:] for s in suffixes)}, got {options.format!r}")
        prepare_folder(options.output)
        return ending
    return None


def _options_of(options: Namespace, parser: Parser) -> dict[str, Any]:
    """What was asked for beside prompt and seed, as JSON has it: values that `_read` can read again."""
    found = {}
    for name, default in _defaults(parser).items():
        value = getattr(options, name, None)
        if name in _NOT_OF_A_CLIP or (value == default and type(value) is type(default)):
            continue
        if name in _FILES:
            value = [_absolute(v) for v in value] if isinstance(value, list) else _absolute(value)
        found[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return found


def _defaults(parser: Any) -> dict[str, Any]:
    return {action.dest: action.default for action in parser._actions}


def _absolute(place: Any) -> str:
    path, colon, weight = str(place).rpartition(":")
    bare = path if colon and re.fullmatch(r"[-+.\de]+", weight) else str(place)
    return str(Path(bare).absolute()) + str(place)[len(bare) :] if Path(bare).exists() else str(place)


def _generate(parser: Parser, options: Namespace) -> int:
    _remake(options, parser)
    prompts = _prompts(options)
    from draftdiff.models import clips
    from draftdiff.models.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    _ending(options, VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    asked = {name: getattr(options, name) for name in ("sparsity", "profile") if getattr(options, name) is not None}
    config = None if options.dense else config_of(asked, options)
    from draftdiff import enable
    from draftdiff.models import several
    from draftdiff.models.video import world_judge

    with several.processes(options.ulysses, options.ring) as mine:
        options.device = options.device or mine.device
        model, call = load_model(options, [config] if config else [])
        ending = _ending(options, VIDEO_SUFFIXES if model.makes_video else IMAGE_SUFFIXES)
        wanted = clips.plan(prompts, options.seed, options.output, ending, {"options": _options_of(options, parser)})
        if options.model is None:
            for text in world_judge(prompts)[1]:
                note(text)
        mine.share(model.pipeline)
        if config is not None:
            enable(model.pipeline, config)
        left = [(clip, False) for clip in wanted] if mine.together else clips.shared_out(wanted)
        for clip, is_made in left:
            if is_made:
                note(f"{clip.output} is there already")
            else:
                _make(clip, model, call, config, options, writes=mine.writes)
    return 0


def _make(clip: Any, model: Any, call: dict[str, Any], config: Any, options: Namespace, *, writes: bool) -> None:
    import torch

    from draftdiff import report
    from draftdiff.cli.progress import saving
    from draftdiff.models.frames import frames_of, write_frames
    from draftdiff.models.loading import inputs_refused

    fps = options.fps or model.fps
    generator = torch.Generator().manual_seed(clip.seed)
    start = time.perf_counter()
    with inputs_refused(model.pipeline), saving(model.pipeline, config is not None) as told:
        output = model.pipeline(prompt=clip.prompt, generator=generator, output_type="np", **call, **told)
    seconds = time.perf_counter() - start
    if not writes:
        return
    frames = frames_of(output)
    write_frames(clip.output, frames, fps)
    done = report(model.pipeline) if config is not None else None
    result = {
        "output": str(clip.output),
        "model": model.name,
        "prompt": clip.prompt,
        "seed": clip.seed,
        "shape": list(frames.shape),
        "fps": fps,
        "seconds": seconds,
        "config": config.to_dict() if config else None,
        "report": done.to_dict() if done else None,
    }
    from draftdiff.models.devices import about

    clip.write_sidecar({**about(model.device, model.pipeline.dtype, options.command_line), **result})
    if options.json:
        print_json(result, model.device)
    else:
        print(done or "dense: draftdiff was not enabled")
        count, height, width, _ = frames.shape
        print(f"{clip.output}: {count} frames of {width}x{height}, {seconds:.2f} s")
