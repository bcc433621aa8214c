"""The mini video pipeline that ships with draftdiff: a stock `diffusers.WanPipeline` small enough for two CPU cores.

`load_mini_video()` loads it from the folder beside this file, without a network; `mini_video_defaults()` says how it
is best called and which words it knows. `samples/train_mini_video.py` is how its weights were made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanPipeline
from diffusers.utils import logging as diffusers_logging
from packaging.version import Version
from transformers.utils import logging as transformers_logging

WEIGHTS = Path(__file__).with_name("mini_video_weights")
DEFAULTS_FILE = "draftdiff.json"

# The argument's new name; the old one warns where the new one exists.
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def mini_video_defaults(folder: Path = WEIGHTS) -> dict[str, Any]:
    """How to call the pipeline: `generate` holds its arguments, and beside it stand `fps` and the known words."""
    file = folder / DEFAULTS_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"mini video settings are missing: {file}") from None
    except ValueError as error:
        raise ValueError(f"mini video settings are unreadable: {file}: {error}") from None


def load_mini_video(torch_dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS) -> WanPipeline:
    """Load the pipeline. A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file."""
    expected = [folder / "model_index.json", folder / DEFAULTS_FILE]
    expected += [folder / part / "config.json" for part in ("transformer", "text_encoder", "vae")]
    weights = [
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        folder / "text_encoder" / "model.safetensors",
        folder / "vae" / "diffusion_pytorch_model.safetensors",
    ]
    for file in [*expected, *weights]:
        if not file.is_file():
            raise FileNotFoundError(f"mini video weights are missing: {file}")
    digests = mini_video_defaults(folder).get("sha256", {})
    for file in weights:
        if hashlib.sha256(file.read_bytes()).hexdigest() != digests.get(file.relative_to(folder).as_posix()):
            raise ValueError(f"mini video weights are damaged: {file} does not match its checksum in {DEFAULTS_FILE}")
    try:
        with _no_progress_bars():
            return WanPipeline.from_pretrained(folder, local_files_only=True, **{_DTYPE: torch_dtype})
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"mini video weights cannot be loaded: {folder}: {reason}") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes a fraction of a second; the libraries' bars for it would only clutter the terminal."""
    libraries = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in libraries:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in libraries:
            module.enable_progress_bar()
