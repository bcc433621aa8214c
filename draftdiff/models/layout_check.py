"""Whether a model's row of the table is right, shown on a short run or on one forward with small random inputs.

Three facts about each transformer: with everything kept it computes what dense attention does, with a quarter kept it
is sparse, and once disabled it is what it was.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from draftdiff.errors import UserError, one_line
from draftdiff.models.devices import find_device, find_dtype
from draftdiff.models.loading import inputs_refused, loading, quiet_diffusers
from draftdiff.models.video import load
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.layouts import Layout, layout_for, register_layout
from draftdiff.video.patch import disable, enable, report

# How far sums in another order may be from each other after a run, as a share of the result's norm.
_NOISE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_ALWAYS: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0, "dense_above": 1.0}
# Of a short run: as little as leaves a choice of tiles. Names are those of the pipelines' calls.
_SHORT: dict[str, Any] = {
    "prompt": "a red circle moves right",
    "height": 256,
    "width": 256,
    "num_frames": 17,
    "num_inference_steps": 2,
    "output_type": "latent",
}
_GRIDS = ((3, 12, 20), (1, 20, 24))
_TEXT = 12
# Names by which configs tell the width of what a forward gets, first match first.
_WIDTHS = {
    "encoder_hidden_states": (
        "text_dim",
        "text_embed_dim",
        "caption_channels",
        "joint_attention_dim",
        "cross_attention_dim",
        "context_in_dim",
        "in_text_dim",
        "cap_feat_dim",
    ),
    "pooled_projections": ("pooled_projection_dim", "in_text_dim2"),
}


@dataclass(frozen=True)
class Finding:
    """One fact about one transformer; told: the figures, or what went wrong."""

    transformer: str
    fact: str
    holds: bool
    told: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'WRONG '} {self.transformer}: {self.fact} ({self.told})"


def check_model(
    name: str, layout: str | None = None, *, device: str | None = None, dtype: str | None = None
) -> list[Finding]:
    """Load a folder and see about its transformers.

    name: folder of a saved pipeline, or of a transformer.  layout: "module:NAME" of a `Layout` for the transformer's
    class, where the table has none or another one; the module may hold the class, too.  device, dtype: as in `load`.
    Raises UserError for what cannot be loaded or called.
    """
    row, module = _row(layout) if layout else (None, None)
    folder = Path(name).expanduser()
    if (folder / "model_index.json").is_file() or not folder.is_dir():
        model = load(name, dtype=dtype, device=device)
        parts = {key: part for key, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
        with _registered(row, [part for key, part in parts.items() if "transformer" in key]):
            return _findings(model.pipeline, _short_run(model.pipeline, model.defaults))
    transformer = _transformer(folder, module, device, dtype)
    with _registered(row, [transformer]):
        return _findings(transformer, _one_forward(transformer, layout_for(transformer)))


def _row(place: str) -> tuple[Layout, Any]:
    module, _, name = place.partition(":")
    sys.path.insert(0, "")  # a file beside the user
    try:
        loaded = import_module(module)
        row = getattr(loaded, name)
    except Exception as error:  # the user's file runs
        raise UserError(
            f"--layout must be module:NAME of a draftdiff.Layout, got {place!r}: {one_line(error)}"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(row, Layout):
        raise UserError(f"--layout must name a draftdiff.Layout, got {place!r}, a {type(row).__name__}")
    return row, loaded


@contextmanager
def _registered(row: Layout | None, models: list[nn.Module]) -> Iterator[None]:
    """While it lasts, the classes of these models have this row."""
    undo = [register_layout(type(model).__name__, row) for model in models] if row else []
    try:
        yield
    finally:
        for take_back in reversed(undo):
            take_back()


def _transformer(folder: Path, module: Any, device: str | None, dtype: str | None) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model folder {str(folder)!r} holds neither model_index.json nor config.json")
    place = find_device(device)
    with loading(str(folder)), quiet_diffusers():
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")
        cls = getattr(module, kind, None) or getattr(diffusers, kind, None)
        if cls is None:
            raise UserError(
                f"model folder {str(folder)!r} is of class {kind!r}, which diffusers has not: give --layout"
            )
        model = cls.from_pretrained(folder)
        return model.to(place, find_dtype(dtype, place, embedded=False)).eval()


def _short_run(pipeline: Any, defaults: dict[str, Any]) -> Callable[[], Tensor]:
    """Two steps of a small picture or video, the same at every call."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given = defaults | {key: value for key, value in _SHORT.items() if key in parameters}
    if "image" in parameters and parameters["image"].default is inspect.Parameter.empty:
        from PIL import Image

        given["image"] = Image.new("RGB", (given.get("width", 256), given.get("height", 256)), "red")
    pipeline.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        with inputs_refused(pipeline), torch.no_grad():
            out = pipeline(**given, generator=torch.Generator().manual_seed(0))
        return _joined(out[0])

    return run


def _joined(output: Any) -> Tensor:
    return torch.cat([x.detach().float().flatten().cpu() for x in tree_leaves(output) if isinstance(x, Tensor)])


def _one_forward(model: Any, layout: Layout) -> Callable[[], Tensor]:
    """A call with the row's example, or with inputs that are guessed from what configs tell."""
    refused = ""
    for arguments in [layout.example(model)] if layout.example else _guesses(model):
        here = {key: _there(value, model) for key, value in arguments.items()}

        def run(here: dict[str, Any] = here) -> Tensor:
            with torch.no_grad():
                return _joined(model(**here))

        try:
            run()
        except Exception as error:  # of the model's own code
            refused = refused or one_line(error)
            continue
        return run
    name = type(model).__name__
    raise UserError(f"{name} cannot be called ({refused}): give its pipeline's folder, or `example` in its Layout")


def _there(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def _guesses(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments of a forward with latents in each of the usual orders."""
    config, parameters = model.config, inspect.signature(type(model).forward).parameters
    patch = config.get("patch_size") or 1
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    channels = next((config[key] for key in ("in_channels", "in_visual_dim") if key in config), 4)
    generator = torch.Generator().manual_seed(0)
    common: dict[str, Any] = {"timestep": torch.tensor([500.0]), "guidance": torch.tensor([3.5])}
    common["encoder_attention_mask"] = torch.ones(1, _TEXT, dtype=torch.long)
    for name, keys in _WIDTHS.items():
        width = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
        common[name] = torch.randn([1, _TEXT, width][-3 if name.startswith("encoder") else -1 :], generator=generator)
    common["pooled_projections"] = common["pooled_projections"].flatten()[None]
    for frames, height, width in _GRIDS:
        *_, rows, columns = patch
        f, h, w = frames * (patch[0] if len(patch) == 3 else 1), height * rows, width * columns
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())
        packed = {
            "num_frames": frames,
            "height": height,
            "width": width,
            "img_ids": ids,
            "txt_ids": torch.zeros(_TEXT, 3),
        }
        packed["img_shapes"] = [[(frames, height, width)]]
        for shape in ((channels, f, h, w), (f, channels, h, w), (f, h, w, channels), (channels, h, w)):
            yield _taken(common | {"hidden_states": torch.randn(1, *shape, generator=generator)}, parameters)
        latents = torch.randn(1, frames * height * width, channels, generator=generator)
        yield _taken(common | packed | {"hidden_states": latents}, parameters)


def _taken(arguments: dict[str, Any], parameters: Any) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key in parameters}


def _findings(target: Any, run: Callable[[], Tensor]) -> list[Finding]:
    """Of each supported transformer of a pipeline, or of the transformer itself; `run` calls it."""
    dense = run()
    enable(target, DraftAttentionConfig(selection="full", **_ALWAYS))
    full, with_all = run(), report(target).transformers
    enable(target, DraftAttentionConfig(sparsity=0.75, **_ALWAYS))
    sparse, with_few = run(), report(target).transformers
    disable(target)
    undone = run()

    noise = _NOISE.get(getattr(target, "dtype", torch.float32), _NOISE[torch.float32])
    far, names = _apart(full, dense), ", ".join(part.transformer for part in with_few)
    equal = far <= noise and all(part.mean_density is not None for part in with_all)
    found = [Finding(names, "all kept equals dense", equal, f"differs by {far:.1e} of its norm, {noise:g} is allowed")]
    for part in with_few:
        density, off = part.mean_density, _apart(sparse, dense)
        grid = "x".join(map(str, part.grid or ())) or "none"
        told = "no sparse call" if density is None else f"density {density:.2f}, grid {grid}, {off:.1e} from dense"
        told += "".join(f"; dense: {reason}" for reason in part.reasons)
        found.append(Finding(part.transformer, "sparse is sparse", density is not None and density < 0.9, told))
    same, told = torch.equal(undone, dense), f"differs by {_apart(undone, dense):.1e}"
    return [*found, Finding(names, "disabled it is what it was", same, told)]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
