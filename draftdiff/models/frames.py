"""Frames in and out: from a pipeline's output to uint8 frames, and from frames to a video or pictures."""

from __future__ import annotations

import errno
import io
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from draftdiff.errors import UserError, user_errors
from draftdiff.files import replacing

_H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "17", "-movflags", "+faststart")
_VP9 = ("-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p", "-crf", "24", "-b:v", "0", "-row-mt", "1")
_PALETTE = ("-filter_complex", "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse", "-loop", "0")
_WEBP = ("-c:v", "libwebp", "-quality", "90", "-loop", "0")
# Of ffmpeg, by the file's ending.
_ENCODERS = {".mp4": _H264, ".webm": _VP9, ".gif": _PALETTE, ".webp": _WEBP}
VIDEO_SUFFIXES = tuple(_ENCODERS)
IMAGE_SUFFIXES = (".png", ".jpg")
_NUMBERED = re.compile(r"%0?\d*d")


def frames_of(output: Any) -> np.ndarray:
    """The first video or image of a pipeline's output (`output_type="np"`), as uint8 [frames, height, width, 3]."""
    first = np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[0])
    return to_uint8(first if first.ndim == 4 else first[None])


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures in 0..1 as uint8 of the same shape. Raises UserError for NaN or inf in them."""
    if not np.isfinite(pictures).all():
        raise UserError("the pipeline's frames hold NaN or inf; another --dtype may help")
    return (pictures * 255).round().clip(0, 255).astype(np.uint8)


def is_numbered(path: Path) -> bool:
    """Whether it stands for one picture a frame, as in frames/%04d.png."""
    return bool(_NUMBERED.search(path.name)) and path.suffix.lower() in IMAGE_SUFFIXES


def write_frames(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 frames [frames, height, width, 3] to a video, one picture each (%04d.png), or the first to a picture.

    Raises NotWritten, which says why, for a full disk or an encoder that fails.
    """
    if is_numbered(path):
        for number, frame in enumerate(frames, start=1):
            write_picture(path.with_name(path.name % number), frame)
        return
    if path.suffix.lower() in IMAGE_SUFFIXES:
        write_picture(path, frames[0])
        return
    with replacing(path) as partial:
        _write_video(partial, frames, fps)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture [height, width, 3] in the format of the file's ending."""
    from PIL import Image

    # Not to the file at once: Pillow writes a JPEG on a full disk half, and says nothing.
    content = io.BytesIO()
    Image.fromarray(picture).save(content, Image.registered_extensions()[path.suffix.lower()])
    with replacing(path) as partial:
        partial.write_bytes(content.getvalue())


def _write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    # By ffmpeg itself, whose exit status tells a failure that imageio's writer keeps to itself. diffusers'
    # export_to_video also rounds sizes to multiples of 16 and frames down.
    height, width = (side // 2 * 2 for side in frames.shape[1:3])  # 4:2:0 colour needs even sizes; all models' are
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    target = [*_ENCODERS[path.suffix.lower()], str(path)]
    even: Any = np.ascontiguousarray(frames[:, :height, :width])
    command = [ffmpeg(), "-v", "error", "-y", *source, *target]
    done = subprocess.run(command, input=memoryview(even).cast("B"), stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(errno.EIO, f"the video encoder failed: {said[0] if said else _ended(done.returncode)}")


def _ended(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def ffmpeg() -> str:
    """Path of ffmpeg: the one that comes with imageio-ffmpeg unless IMAGEIO_FFMPEG_EXE names another.

    Raises UserError where there is none.
    """
    import imageio_ffmpeg

    with user_errors(RuntimeError):
        found = imageio_ffmpeg.get_ffmpeg_exe()
    if shutil.which(found) is None:
        raise UserError(f"IMAGEIO_FFMPEG_EXE names no program: {found!r}")
    return found
