"""Frames in and out: from a pipeline's output to uint8 frames, and from frames to a video or picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from draftdiff.errors import UserError
from draftdiff.files import replacing

VIDEO_SUFFIXES = (".mp4",)
IMAGE_SUFFIXES = (".png", ".jpg")


def frames_of(output: Any) -> np.ndarray:
    """The first video or image of a pipeline's output (`output_type="np"`), as uint8 [frames, height, width, 3]."""
    first = np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[0])
    return to_uint8(first if first.ndim == 4 else first[None])


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures in 0..1 as uint8 of the same shape. Raises UserError for NaN or inf in them."""
    if not np.isfinite(pictures).all():
        raise UserError("the pipeline's frames hold NaN or inf; another --dtype may help")
    return (pictures * 255).round().clip(0, 255).astype(np.uint8)


def write_frames(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 frames [frames, height, width, 3] to an mp4, or the first one to an image file."""
    with replacing(path) as partial:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            from PIL import Image

            Image.fromarray(frames[0]).save(partial)
        else:
            _write_mp4(partial, frames, fps)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    # diffusers' export_to_video rounds sizes to multiples of 16 and frames down.
    import imageio

    height, width = frames.shape[1:3]
    # 4:2:0 colour needs even sizes; all models' sizes are.
    even = frames[:, : height // 2 * 2, : width // 2 * 2]
    writer = imageio.get_writer(
        path,
        format="FFMPEG",  # type: ignore[arg-type]
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        quality=None,
        macro_block_size=1,
        output_params=["-crf", "17", "-movflags", "+faststart"],
    )
    with writer:
        for frame in even:
            writer.append_data(np.ascontiguousarray(frame))
