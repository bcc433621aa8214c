"""The mini video pipeline that ships with draftdiff: a stock `diffusers.WanPipeline` small enough for two CPU cores.

`load_mini_video()` loads it from the folder beside this file, without a network; `mini_video_defaults()` says how it
is best called and which words it knows. `samples/training/train_mini_video.py` is how its weights were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from draftdiff.pipelines.mini import weights

WEIGHTS = Path(__file__).with_name("video_weights")
TITLE = "mini video"
FILES = (
    "model_index.json",
    *(f"{part}/config.json" for part in ("transformer", "text_encoder", "vae")),
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


def mini_video_defaults(folder: Path = WEIGHTS) -> dict[str, Any]:
    """How to call the pipeline: `generate` holds its arguments, and beside it stand `fps` and the known words."""
    return weights.settings(TITLE, folder)


def load_mini_video(torch_dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS) -> WanPipeline:
    """Load the pipeline. A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file."""
    options = {"local_files_only": True, weights.DTYPE_ARGUMENT: torch_dtype}
    return weights.load(TITLE, folder, FILES, lambda: WanPipeline.from_pretrained(folder, **options))
