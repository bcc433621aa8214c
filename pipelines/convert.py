"""From original checkpoints to folders that `from_pretrained` reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from draftdiff.core.devices import chosen_dtype
from draftdiff.errors import UserError, user_errors
from draftdiff.files import new_folder
from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.checkpoint import kind_of, read_checkpoint
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel

MODELS: dict[str, Any] = {
    model.__name__: model for model in (VARTransformer2DModel, VQModel, InfinityTransformer2DModel, AutoencoderBSQ)
}
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def convert(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    draft_scales: int | None = None,
    text_encoder: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
) -> str:
    """Convert original checkpoints to a diffusers folder; returns the class name of what was written.

    One source becomes a model. A transformer and its autoencoder become a pipeline: VAR (with two transformers the
    larger drafts and the smaller refines) or Infinity. A source is a file, a folder of shards with its index, or a
    folder of such files.
    draft_scales: of a pair, by default the N of a source named drafter_N or refiner_N, else the pipeline's own default.
    text_encoder: folder or hub repository of Infinity's flan-t5-xl, to be saved with it.
    dtype, or by its old name torch_dtype: that of the files if None.

    The folder appears whole or not at all. Raises FileNotFoundError for a source that is not there, ValueError for a
    destination that is, for sources that do not fit together or are damaged, and for an option that is not theirs.
    """
    wanted = chosen_dtype(dtype, torch_dtype)
    destination = Path(destination)
    if destination.exists():
        raise UserError(f"{destination} exists: convert writes to a new folder")
    paths = [path for source in sources for path in _files(Path(source))]
    with new_folder(destination) as partial:
        with user_errors():  # of files that are damaged or do not fit together
            result = _load(paths, draft_scales, text_encoder, wanted)
        result.save_pretrained(partial)
    return type(result).__name__


def _files(source: Path) -> list[Path]:
    if not source.is_dir() or any(source.glob("*.index.json")):
        return [source]
    files = sorted(path for path in source.iterdir() if path.suffix in _SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no checkpoint in {source}: expected files ending in {', '.join(_SUFFIXES)}")
    return files


def _load(
    paths: Sequence[Path], draft_scales: int | None, text_encoder: str | Path | None, dtype: torch.dtype | None
) -> Any:
    """A model of one checkpoint, a pipeline of several."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in tqdm(paths, desc="looking into checkpoints", unit="file"):
        tensors = read_checkpoint(path)
        try:
            kind = kind_of(tensors)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        found.setdefault(kind, []).append((sum(tensor.numel() for tensor in tensors.values()), path))
    pair = len(found.get("VARTransformer2DModel", ())) == 2
    for option, value, fits, owner in (
        ("draft_scales", draft_scales, pair, "a pair of VARTransformer2DModel"),
        ("text_encoder", text_encoder, "InfinityTransformer2DModel" in found and len(paths) > 1, "an InfinityPipeline"),
    ):
        if value is not None and not fits:
            raise UserError(f"{option} is for {owner} only, got {value!r} for {', '.join(found)}")
    if len(paths) == 1:
        return MODELS[kind].from_single_file(paths[0], dtype=dtype)
    by_size = {kind: [path for _, path in sorted(files, reverse=True)] for kind, files in found.items()}
    counts = {kind: len(files) for kind, files in by_size.items()}
    if counts in ({"VARTransformer2DModel": 1, "VQModel": 1}, {"VARTransformer2DModel": 2, "VQModel": 1}):
        drafter, *refiner = by_size["VARTransformer2DModel"]
        named = next(
            (match[1] for path in paths if (match := re.search(r"(?:drafter|refiner)_(\d+)", path.stem))), None
        )
        return VARPipeline.from_single_file(
            drafter,
            by_size["VQModel"][0],
            refiner=refiner[0] if refiner else None,
            draft_scales=int(named) if draft_scales is None and named and refiner else draft_scales,
            dtype=dtype,
        )
    if counts == {"InfinityTransformer2DModel": 1, "AutoencoderBSQ": 1}:
        return InfinityPipeline.from_single_file(
            by_size["InfinityTransformer2DModel"][0],
            by_size["AutoencoderBSQ"][0],
            text_encoder=text_encoder,
            dtype=dtype,
        )
    listed = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    raise UserError(
        f"these make no pipeline: {listed}; expected one model, one or two VARTransformer2DModel with a VQModel, "
        "or an InfinityTransformer2DModel with an AutoencoderBSQ"
    )
