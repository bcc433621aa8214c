"""Frames in and out: from a pipeline's output to uint8 frames, and from frames to files that are whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

VIDEO_SUFFIXES = (".mp4",)
IMAGE_SUFFIXES = (".png", ".jpg")


def frames_of(output: Any) -> np.ndarray:
    """The first video or image of a pipeline's output (`output_type="np"`), as uint8 [frames, height, width, 3]."""
    first = np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[0])
    return to_uint8(first if first.ndim == 4 else first[None])


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures in 0..1 as uint8 of the same shape. Raises ValueError for NaN or inf in them."""
    if not np.isfinite(pictures).all():
        raise ValueError("the pipeline's frames hold NaN or inf; another --dtype may help")
    return (pictures * 255).round().clip(0, 255).astype(np.uint8)


def check_output(path: Path, suffixes: tuple[str, ...] = VIDEO_SUFFIXES + IMAGE_SUFFIXES) -> None:
    """Raise ValueError, in one line, if a file of this name cannot be written."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"output {str(path)!r} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Raise ValueError if the folder is not there or takes no files."""
    if not folder.is_dir():
        raise ValueError(f"output folder {str(folder)!r} does not exist")
    try:
        # Trying is the only sure test: permission bits say nothing about root or a read-only disk.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. It becomes `path` at the end, or is removed after an exception."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill. It becomes `path` at the end, or is removed after an exception.

    Raises FileExistsError if there is something at `path`.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose a new folder")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp keeps its folders private
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
