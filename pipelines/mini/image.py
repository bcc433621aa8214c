"""The mini image pair that ships with draftdiff: a `VARPipeline` small enough to draw a picture in a second on a CPU.

`load_mini_image()` loads it from the folder beside this file, without a network, `load_mini_refiner()` the small model
for collaborative decoding; `mini_image_defaults()` says how the pipeline is best called. Weights are stored in half
precision. `samples/training/train_mini_image.py` is how they were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from draftdiff.core.devices import chosen_dtype
from draftdiff.pipelines.mini import weights
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.transformer_var import VARTransformer2DModel

WEIGHTS = Path(__file__).with_name("image_weights")
TITLE = "mini image"
PARTS = ("transformer", "refiner", "vae")


def mini_image_defaults(folder: Path = WEIGHTS) -> dict[str, Any]:
    """How to call the pipeline: `generate` holds its arguments, `draft_scales` the N for collaborative decoding."""
    return weights.settings(TITLE, folder)


def load_mini_image(
    draft_scales: int | None = None,
    torch_dtype: str | torch.dtype | None = None,
    folder: Path = WEIGHTS,
    *,
    dtype: str | torch.dtype | None = None,
) -> VARPipeline:
    """Load the pipeline, with its refiner at work after that many drafted scales if a number is given.

    dtype, or by its old name torch_dtype: float32 if None.
    A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file; so does a draft_scales
    out of range.
    """
    options: Any = {"local_files_only": True, "dtype": chosen_dtype(dtype, torch_dtype) or torch.float32}
    files = ("model_index.json", "scheduler/scheduler_config.json", *_files("transformer"), *_files("vae"))
    pipe = weights.load(TITLE, folder, files, lambda: VARPipeline.from_pretrained(folder, **options))
    if draft_scales is not None:
        pipe.enable_collaborative(load_mini_refiner(options["dtype"], folder), draft_scales)
    return pipe


def load_mini_refiner(
    torch_dtype: str | torch.dtype | None = None, folder: Path = WEIGHTS, *, dtype: str | torch.dtype | None = None
) -> VARTransformer2DModel:
    """Load the refiner for `pipe.enable_collaborative`. Raises like `load_mini_image`."""

    wanted = chosen_dtype(dtype, torch_dtype) or torch.float32

    def refiner() -> VARTransformer2DModel:
        return VARTransformer2DModel.from_pretrained(folder / "refiner", dtype=wanted, local_files_only=True)

    return weights.load(TITLE, folder, _files("refiner"), refiner)


def _files(part: str) -> tuple[str, str]:
    return f"{part}/config.json", f"{part}/diffusion_pytorch_model.safetensors"
