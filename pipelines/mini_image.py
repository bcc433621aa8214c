"""The mini image pair that ships with draftdiff: a `VARPipeline` small enough to draw a picture in a second on a CPU.

`load_mini_image()` loads it from the folder beside this file, without a network, `load_mini_refiner()` the small model
for collaborative decoding; `mini_image_defaults()` says how the pipeline is best called. Weights are stored in half
precision. `samples/train_mini_image.py` is how they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from packaging.version import Version

from draftdiff.pipelines.mini_video import _no_progress_bars
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.transformer_var import VARTransformer2DModel

WEIGHTS = Path(__file__).with_name("mini_image_weights")
DEFAULTS_FILE = "draftdiff.json"
PARTS = ("transformer", "refiner", "vae")

_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
Loaded = TypeVar("Loaded")


def mini_image_defaults(folder: Path = WEIGHTS) -> dict[str, Any]:
    """How to call the pipeline: `generate` holds its arguments, `draft_scales` the N for collaborative decoding."""
    file = folder / DEFAULTS_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"mini image settings are missing: {file}") from None
    except ValueError as error:
        raise ValueError(f"mini image settings are unreadable: {file}: {error}") from None


def load_mini_image(
    draft_scales: int | None = None, torch_dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS
) -> VARPipeline:
    """Load the pipeline, with its refiner at work after that many drafted scales if a number is given.

    A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file; so does a draft_scales
    out of range.
    """
    _check_files(folder, ("transformer", "vae"), ("model_index.json", "scheduler/scheduler_config.json"))
    pipe = _loaded(folder, lambda: VARPipeline.from_pretrained(folder, local_files_only=True, **{_DTYPE: torch_dtype}))
    if draft_scales is not None:
        pipe.enable_collaborative(load_mini_refiner(torch_dtype, folder), draft_scales)
    return pipe


def load_mini_refiner(torch_dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS) -> VARTransformer2DModel:
    """Load the refiner for `pipe.enable_collaborative`. Raises like `load_mini_image`."""
    _check_files(folder, ("refiner",))
    part = folder / "refiner"
    return _loaded(part, lambda: VARTransformer2DModel.from_pretrained(part, **{_DTYPE: torch_dtype}))


def _check_files(folder: Path, parts: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
    weights = [folder / part / "diffusion_pytorch_model.safetensors" for part in parts]
    configs = [folder / part / "config.json" for part in parts]
    for file in [*(folder / name for name in (*others, DEFAULTS_FILE)), *configs, *weights]:
        if not file.is_file():
            raise FileNotFoundError(f"mini image weights are missing: {file}")
    digests = mini_image_defaults(folder).get("sha256", {})
    for file in weights:
        if hashlib.sha256(file.read_bytes()).hexdigest() != digests.get(file.relative_to(folder).as_posix()):
            raise ValueError(f"mini image weights are damaged: {file} does not match its checksum in {DEFAULTS_FILE}")


def _loaded(source: Path, load: Callable[[], Loaded]) -> Loaded:
    try:
        with _no_progress_bars():
            return load()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"mini image weights cannot be loaded: {source}: {reason}") from error
