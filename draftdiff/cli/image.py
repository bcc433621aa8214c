"""The commands `draftdiff image` and `draftdiff image calibrate`: pictures by next-scale models."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftdiff.cli.options import Parser, add_place, add_seed, whole
from draftdiff.cli.output import deliver, print_json
from draftdiff.errors import UserError
from draftdiff.files import prepare_file, replacing

if TYPE_CHECKING:
    from draftdiff.models.image import ImageModel

# torch and diffusers take seconds to import: only inside the commands that need them.

_MODEL = "folder or Hub id of a VARPipeline or InfinityPipeline"
_BATCH = 8


def add_image(image: Parser) -> None:
    _add_subjects(image)
    image.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=".png or .jpg, numbered if several; with --compare a folder"
    )
    image.add_argument("--count", type=int, help="pictures of each class or prompt (default: 1; with --compare: 4)")
    image.add_argument(
        "--batch-size",
        type=whole(1),
        help="pictures at once: changes the memory needed, no picture (default: 8)",
    )
    image.add_argument(
        "--draft-scales",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="CoDe: a drafter draws the first N scales, a smaller refiner the others (default: as the model was saved)",
    )
    image.add_argument("--refiner", metavar="MODEL", help="the smaller model, where --model does not hold one")
    image.add_argument(
        "--scale-kv",
        type=float,
        nargs="+",
        default=[],
        metavar="BUDGET",
        help="ScaleKV: share of the cache to keep, above 0 and at most 1 (default: all)",
    )
    image.add_argument("--scale-kv-drafters", metavar="FILE", help="made by: draftdiff image calibrate")
    image.add_argument(
        "--scale-kv-per",
        choices=("layer", "head"),
        nargs="+",
        default=[],
        help="whose budgets: of layers, or of heads by --scale-kv-drafters (default: layer)",
    )
    image.add_argument(
        "--unguided-scales",
        type=whole(1),
        nargs="+",
        default=[],
        metavar="N",
        help="make the last N scales without guidance, at half the work (default: none)",
    )
    image.add_argument(
        "--compare",
        action="store_true",
        help="measure plain, CoDe, ScaleKV and both; --draft-scales, --scale-kv, --scale-kv-per and --unguided-scales "
        "then take several values",
    )
    image.add_argument("--repeat", type=int, help="timed rounds of --compare (default: 3)")
    image.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    image.set_defaults(func=_image)

    more = image.add_subparsers(title="further commands", metavar="[calibrate]")
    calibrate = more.add_parser("calibrate", help="measure layers and heads, for --scale-kv-drafters")
    _add_subjects(calibrate)
    calibrate.add_argument("-o", "--output", type=Path, metavar="FILE", help="a .json file")
    calibrate.add_argument("--refiner", metavar="MODEL", help="also measure this smaller model")
    calibrate.add_argument("--share", type=float, help="share of (layer, scale) pairs that draft (default: 0.07)")
    calibrate.add_argument("--json", action="store_true", help="print the file's content")
    calibrate.set_defaults(func=_calibrate)


def _add_subjects(parser: Parser) -> None:
    parser.add_argument("--class", dest="classes", action="append", default=[], metavar="NAME", help="name or number")
    parser.add_argument("--prompt", dest="prompts", action="append", default=[], help="for Infinity")
    parser.add_argument("--model", help=f"{_MODEL} (default: the embedded mini model)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the model's)")
    parser.add_argument("--aspect-ratio", type=float, help="height / width, for Infinity (default: 1)")
    parser.add_argument("--size", help="0.06M, 0.25M, 0.60M or 1M pixels, for Infinity (default: 1M)")
    add_seed(parser, "of the first picture, one more for each next; ")
    add_place(parser)


def _load(options: Namespace) -> tuple[ImageModel, list[Any], dict[str, Any]]:
    """The model, the subjects (class names and ids, or prompts; may be none) and the arguments of the call."""
    from draftdiff.models.image import load

    if options.classes and options.prompts:
        raise UserError("give --class or --prompt, not both")
    if options.model is None and options.prompts:
        raise UserError("the embedded model takes --class, not --prompt")
    model = load(options.model, refiner=options.refiner, dtype=options.dtype, device=options.device)
    kind = type(model.pipeline).__name__
    if model.by_class and options.prompts:
        raise UserError(f"{kind} takes --class, not --prompt")
    if not model.by_class and options.classes:
        raise UserError(f"{kind} takes --prompt, not --class")
    call = dict(model.defaults)
    if options.guidance_scale is not None:
        call["guidance_scale"] = options.guidance_scale
    for name in ("aspect_ratio", "size"):
        value = getattr(options, name)
        if value is None:
            continue
        if model.by_class:
            raise UserError(f"{kind} takes no --{name.replace('_', '-')}: its size is fixed")
        call[name] = value
    model.scales(call)  # raises for a size that is unknown
    subjects = [int(text) if text.isdecimal() else text for text in options.classes] or list(options.prompts)
    model.check_subjects(subjects)
    return model, subjects, call


def _needed(subjects: list[Any], model: ImageModel) -> list[Any]:
    if not subjects:
        option = "--class" if model.by_class else "--prompt"
        names = list((model.pipeline.config.get("id2label") or {}).values())
        known = f"; this model's classes are: {', '.join(names[:20])}{', ...' * (len(names) > 20)}" if names else ""
        raise UserError(f"{option} is needed{known}")
    return subjects


def _image(options: Namespace) -> int:
    if options.compare:
        return _compare(options)
    from tqdm import tqdm

    from draftdiff.models.frames import IMAGE_SUFFIXES, write_picture
    from draftdiff.models.image import Setting

    if options.output is None:
        raise UserError("-o FILE is needed: where to write the picture")
    prepare_file(options.output, IMAGE_SUFFIXES)
    for name in ("draft_scales", "scale_kv", "scale_kv_per", "unguided_scales"):
        if len(getattr(options, name)) > 1:
            raise UserError(f"--{name.replace('_', '-')} takes one value, or several with --compare")
    if options.repeat is not None:
        raise UserError("--repeat belongs to --compare")
    count = 1 if options.count is None else options.count
    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")

    model, subjects, call = _load(options)
    subjects = [subject for subject in _needed(subjects, model) for _ in range(count)]
    paths = _numbered(options.output, len(subjects))
    for path in paths:
        prepare_file(path, IMAGE_SUFFIXES)
    model = _with_drafters(model, options)
    draft_scales = options.draft_scales[0] if options.draft_scales else model.saved_setting.draft_scales
    setting = Setting(
        draft_scales,
        options.scale_kv[0] if options.scale_kv else None,
        options.scale_kv_per[0] if options.scale_kv_per else "layer",
        options.unguided_scales[0] if options.unguided_scales else None,
    )
    model.check(setting, call)
    model.apply(setting)
    seconds, right = 0.0, []
    size = options.batch_size or _BATCH
    several = len(subjects) > size
    if several:
        model.pipeline.set_progress_bar_config(leave=False)
    for first in tqdm(range(0, len(subjects), size), desc="pictures", unit="batch", disable=not several):
        batch = subjects[first : first + size]
        start = time.perf_counter()
        pictures = model.pictures(batch, options.seed + first, **call)
        seconds += time.perf_counter() - start
        for path, subject, picture in zip(paths[first:], batch, pictures):
            write_picture(path, picture)  # each as it comes: what was made is not lost with what fails
            right.append(model.judge(subject, picture) if model.judge else None)
    if options.json:
        result = {
            "outputs": list(map(str, paths)),
            "model": model.name,
            "subjects": subjects,
            "seeds": [options.seed + i for i in range(len(subjects))],
            "setting": setting.name,
            **asdict(setting),
            "call": call,
            "size": list(pictures.shape[1:3]),
            "seconds": seconds,
            "right": right if model.judge else None,
        }
        print_json(result, model.device)
    else:
        height, width = pictures.shape[1:3]
        for path, subject in zip(paths, subjects):
            print(f"{path}: {subject}, {width}x{height}")
        print(f"{setting.name}: {seconds:.2f} s")
    return 0


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_stem(f"{path.stem}-{i:0{digits}d}") for i in range(1, count + 1)]


def _compare(options: Namespace) -> int:
    from draftdiff.compare.comparison import check_folder
    from draftdiff.compare.image import ImageComparison, compare_images

    folder = Path("compare-image") if options.output is None else options.output
    check_folder(folder, ImageComparison.made_by)
    from draftdiff.compare import image_page
    from draftdiff.models.devices import about
    from draftdiff.models.image import EMBEDDED, default_settings, settings_of

    if options.batch_size is not None:
        raise UserError("--batch-size is not for --compare, which draws all pictures at once: lower --count")
    count = 4 if options.count is None else options.count
    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    model, subjects, call = _load(options)
    if not subjects and model.name == EMBEDDED:
        names = list(model.pipeline.config.id2label.values())
        subjects = names[:: len(names) // 8 + 2]  # of each shape, and of different colours and places
    subjects = [subject for subject in _needed(subjects, model) for _ in range(count)]
    model = _with_drafters(model, options)
    scales = model.scales(call)
    drafted, budgets = default_settings(scales, model.refiner is not None)
    if options.draft_scales or options.scale_kv or options.unguided_scales:  # only what was asked for
        drafted, budgets = options.draft_scales, options.scale_kv
    per = list(dict.fromkeys(options.scale_kv_per)) or ["layer"]
    comparison = compare_images(
        model,
        subjects,
        settings_of(drafted, budgets, scales, per, options.unguided_scales),
        repeat=3 if options.repeat is None else options.repeat,
        seed=options.seed,
        call=call,
        about=about(model.device, model.pipeline.dtype, options.command_line),
    )
    return deliver(comparison, image_page.write, folder, options)


def _with_drafters(model: ImageModel, options: Namespace) -> ImageModel:
    """The model with the calibration of a file. Raises UserError for one that does not fit."""
    for option in ("per", "drafters"):
        if getattr(options, f"scale_kv_{option}") and not options.scale_kv and not options.compare:
            raise UserError(f"--scale-kv-{option} needs --scale-kv BUDGET")
    if options.scale_kv_drafters is None:
        return model
    from draftdiff.models.image_calibration import with_calibration

    return with_calibration(model, Path(options.scale_kv_drafters))


def _calibrate(options: Namespace) -> int:
    if options.output is None:
        raise UserError("-o FILE is needed: where to write the layers")
    prepare_file(options.output, (".json",))
    from draftdiff.models.image import PLAIN
    from draftdiff.models.image_calibration import DRAFTERS, calibrated
    from draftdiff.var.selectivity import WIDE_SHARE

    share = WIDE_SHARE if options.share is None else options.share
    if not 0 <= share < 1:
        raise UserError(f"--share must be at least 0 and below 1, got {share}")
    model, subjects, call = _load(options)
    if not subjects and model.by_class:
        classes = model.pipeline.transformer.config.num_classes
        subjects = list(range(classes))[:: max(classes // 10, 1)][:10]  # ten are enough, says the paper
    _needed(subjects, model)
    model.apply(PLAIN)
    content = {
        "made_by": "draftdiff image calibrate",
        "model": model.name,
        "layers": model.pipeline.transformer.config.num_layers,
        "subjects": subjects,
        "seed": options.seed,
        "share": share,
        "call": call,
        **calibrated(model, subjects, options.seed, share, call),
    }
    with replacing(options.output) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(content))
        return 0
    for name, which in DRAFTERS.items():
        if name in content:
            layers = sorted({layer for row in content[name].values() for layer in row})
            print(f"{which}: layers {', '.join(map(str, layers)) or 'none'} draft at some scale")
    print(options.output)
    return 0
