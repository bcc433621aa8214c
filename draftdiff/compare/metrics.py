"""How far a video is from the dense one of the same seed.

PSNR and SSIM are a few lines of torch on RGB frames, as the papers of the field report them: ffmpeg's versions see
luma only after a conversion to YUV, and cap PSNR. VMAF is ffmpeg's libvmaf, fed with raw frames, not with the encoded
file. LPIPS is the shift-tolerant one, with the weights of `stlpips-pytorch`.
All work on uint8 frames [frames, height, width, 3]: what a viewer sees.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.compare.perceptual import ShiftTolerantLpips
from draftdiff.models.frames import ffmpeg

PSNR_LIMIT = 100.0  # of identical frames, for which it is infinite
_WINDOW, _SIGMA = 11, 1.5  # of SSIM, as in its paper (Wang et al. 2004)
_VMAF_SMALLEST, _LPIPS_SMALLEST = 32, 64  # pixels a side; libvmaf crashes below


class Unavailable(Exception):
    """A metric that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Quality:
    """Likeness to the dense video. psnr in dB; ssim up to 1; vmaf up to 100; lpips and latent_l2 from 0 (alike).

    latent_l2: |latents - dense latents| / |dense latents| at the end of denoising.  missing: why a value is None.
    """

    psnr: float
    ssim: float
    vmaf: float | None
    lpips: float | None
    latent_l2: float | None
    missing: dict[str, str] = field(default_factory=dict)


def quality(
    frames: np.ndarray,
    reference: np.ndarray,
    latents: Tensor | None = None,
    reference_latents: Tensor | None = None,
) -> Quality:
    """All metrics of one video against its reference. Raises ValueError for frames of another size or number."""
    if frames.shape != reference.shape:
        raise ValueError(f"videos to compare must have one shape, got {frames.shape} and {reference.shape}")
    values: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for metric in (vmaf, lpips):
        try:
            values[metric.__name__] = metric(frames, reference)
        except Unavailable as reason:  # noqa: PERF203
            values[metric.__name__], missing[metric.__name__] = None, str(reason)
    distance = None
    if latents is None or reference_latents is None:
        missing["latent_l2"] = "this pipeline does not hand out its latents"
    else:
        distance = relative_l2(latents, reference_latents)
    return Quality(psnr(frames, reference), ssim(frames, reference), values["vmaf"], values["lpips"], distance, missing)


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over RGB, mean of the frames, each at most PSNR_LIMIT."""
    ratios = []
    for frame, truth in zip(frames, reference):
        error = np.square(frame.astype(np.float64) - truth.astype(np.float64)).mean()
        ratios.append(PSNR_LIMIT if error == 0 else min(PSNR_LIMIT, 10 * np.log10(255**2 / error)))
    return float(np.mean(ratios))


def ssim(frames: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian windows inside the frame, mean over RGB and frames."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    bell = (-(offsets**2) / (2 * _SIGMA**2)).exp()
    bell /= bell.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))

    values = []
    for pair in zip(frames, reference):
        x, y = (torch.from_numpy(frame.astype(np.float64)).permute(2, 0, 1)[:, None] for frame in pair)
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        values.append((luminance * structure).mean())
    return float(torch.stack(values).mean())


def relative_l2(latents: Tensor, reference: Tensor) -> float:
    """|latents - reference| / |reference|."""
    latents, reference = latents.double(), reference.double()
    return float((latents - reference).norm() / reference.norm())


@lru_cache(maxsize=4)
def has_libvmaf(executable: str) -> bool:
    filters = subprocess.run([executable, "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    return " libvmaf " in filters.stdout


def vmaf(frames: np.ndarray, reference: np.ndarray) -> float:
    """VMAF (v0.6.1) of the luma, at the videos' own size, mean of the frames. A video against itself has 97 to 100."""
    executable = ffmpeg()
    if not has_libvmaf(executable):
        raise Unavailable("this ffmpeg is built without libvmaf")
    _, height, width, _ = frames.shape
    if min(height, width) < _VMAF_SMALLEST:
        raise Unavailable(f"needs frames of at least {_VMAF_SMALLEST} pixels a side, got {width}x{height}")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i"]
    graph = "[0]format=yuv444p[video];[1]format=yuv444p[truth];[video][truth]libvmaf=log_fmt=json:log_path=vmaf.json"
    with tempfile.TemporaryDirectory() as folder:
        frames.tofile(Path(folder, "video.rgb"))
        reference.tofile(Path(folder, "truth.rgb"))
        command = [executable, "-loglevel", "error", *raw, "video.rgb", *raw, "truth.rgb"]
        run = subprocess.run(
            [*command, "-lavfi", graph, "-f", "null", "-"], cwd=folder, capture_output=True, text=True, check=False
        )
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
            raise Unavailable(f"ffmpeg failed: {reason}")
        log = json.loads(Path(folder, "vmaf.json").read_text(encoding="utf-8"))
    return float(log["pooled_metrics"]["vmaf"]["mean"])


@lru_cache(maxsize=1)
def _lpips_network() -> ShiftTolerantLpips:
    try:
        return ShiftTolerantLpips()
    except FileNotFoundError as error:
        raise Unavailable(f"needs draftdiff[metrics] ({error})") from None


def lpips(frames: np.ndarray, reference: np.ndarray) -> float:
    """Shift-tolerant LPIPS on AlexNet features, mean of the frames."""
    if min(frames.shape[1:3]) < _LPIPS_SMALLEST:
        raise Unavailable(f"needs frames of at least {_LPIPS_SMALLEST} pixels a side")
    network = _lpips_network()
    distances = []
    for pair in zip(frames, reference):
        x, y = (torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in pair)
        with torch.no_grad():
            distances.append(float(network(x, y)))
    return float(np.mean(distances))
