"""The mini video pipeline that ships with draftdiff: a stock `diffusers.WanPipeline` small enough for two CPU cores.

`load_mini_video()` loads it from the folder beside this file, without a network; `mini_video_defaults()` says how it
is best called and which words it knows. `samples/training/train_mini_video.py` is how its weights were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from draftdiff.core.devices import chosen_dtype
from draftdiff.hosts.diffusers import with_one_dtype
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


def load_mini_video(
    torch_dtype: str | torch.dtype | None = None, folder: Path = WEIGHTS, *, dtype: str | torch.dtype | None = None
) -> WanPipeline:
    """Load the pipeline. dtype, or by its old name torch_dtype: float32 if None.

    A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file.
    """
    options = with_one_dtype({"dtype": chosen_dtype(dtype, torch_dtype) or torch.float32, "local_files_only": True})
    return weights.load(TITLE, folder, FILES, lambda: WanPipeline.from_pretrained(folder, **options))
