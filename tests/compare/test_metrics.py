"""Metrics have their known values where there is a formula, and say why where they cannot be had."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from draftdiff.compare import metrics
from draftdiff.compare.metrics import Unavailable, lpips, psnr, quality, relative_l2, ssim, vmaf
from draftdiff.compare.perceptual import ShiftTolerantLpips


@pytest.fixture
def video():
    """Smooth colours that move: uint8 [6, 64, 80, 3]."""
    t, y, x = np.meshgrid(np.arange(6), np.arange(64), np.arange(80), indexing="ij")
    waves = [np.sin((x + 3 * t) / 9), np.cos((y - 2 * t) / 7), np.sin((x + y) / 11)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noisy(video, strength):
    noise = np.random.default_rng(0).integers(-strength, strength + 1, video.shape)
    return np.clip(video.astype(int) + noise, 0, 255).astype(np.uint8)


def test_a_video_is_like_itself(video):
    same = quality(video, video.copy(), torch.ones(3), torch.ones(3))
    assert same.psnr == metrics.PSNR_LIMIT and same.ssim == pytest.approx(1) and same.latent_l2 == 0
    assert same.vmaf is not None and same.vmaf > 97


def test_psnr_of_one_level_everywhere(video):
    assert psnr(np.clip(video, 0, 254) + 1, np.clip(video, 0, 254)) == pytest.approx(20 * math.log10(255))


def test_psnr_is_the_mean_over_frames():
    truth = np.zeros((2, 16, 16, 3), np.uint8)
    frames = truth.copy()
    frames[0] += 1
    frames[1] += 10
    assert psnr(frames, truth) == pytest.approx((20 * math.log10(255) + 20 * math.log10(25.5)) / 2)


def test_ssim_of_two_plain_colours_has_a_closed_form():
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_ssim_in_a_window_agrees_with_the_written_out_sums():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (2, 1, 11, 11, 3), dtype=np.uint8)
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / np.outer(bell, bell).sum()
    expected = []
    for channel in range(3):
        a, b = x[0, :, :, channel].astype(float), y[0, :, :, channel].astype(float)
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        shared = (weights * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 6.5025, 58.5225
        expected.append(
            (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    assert ssim(x, y) == pytest.approx(np.mean(expected))


def test_every_metric_falls_as_noise_grows(video):
    little, much = quality(noisy(video, 4), video), quality(noisy(video, 30), video)
    assert little.psnr > much.psnr and little.ssim > much.ssim
    assert little.vmaf is not None and much.vmaf is not None and little.vmaf > much.vmaf


def test_latents_are_compared_relative_to_the_dense_ones():
    assert relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_what_is_not_there_is_none_with_its_reason(video, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    metrics._lpips_network.cache_clear()
    result = quality(video, video)
    assert result.lpips is None and "draftdiff[metrics]" in result.missing["lpips"]
    assert result.latent_l2 is None and "latents" in result.missing["latent_l2"]


def test_vmaf_needs_a_size_and_libvmaf(video, monkeypatch):
    with pytest.raises(Unavailable, match="at least 32 pixels a side, got 80x16"):
        vmaf(video[:, :16], video[:, :16])
    monkeypatch.setattr(metrics, "has_libvmaf", lambda _executable: False)
    with pytest.raises(Unavailable, match="without libvmaf"):
        vmaf(video, video)


def test_a_failing_ffmpeg_is_told(video, monkeypatch):
    monkeypatch.setattr(metrics, "has_libvmaf", lambda _executable: True)
    monkeypatch.setattr(metrics, "ffmpeg", lambda: "false")
    with pytest.raises(Unavailable, match="ffmpeg failed: exit status 1"):
        vmaf(video, video)


def test_lpips_tells_alike_from_unlike(video):
    metrics._lpips_network.cache_clear()
    assert lpips(video, video) == pytest.approx(0, abs=1e-6)
    assert lpips(noisy(video, 60), video) > lpips(noisy(video, 6), video) > 0


# By the authors' own code.
@pytest.mark.parametrize(("size", "distance"), [((64, 64), 0.030341673642396927), ((65, 97), 0.021132908761501312)])
def test_lpips_is_the_authors(size, distance):
    rng = np.random.RandomState(1)
    x, y = (rng.uniform(-1, 1, (1, 3, *size)).astype(np.float32) for _ in range(2))
    found = ShiftTolerantLpips()(torch.from_numpy(x), torch.from_numpy((x + y) / 2))
    assert found.item() == pytest.approx(distance, rel=1e-4)


def test_lpips_runs_no_code_of_the_package_that_holds_its_weights():
    code = (
        "import sys; from draftdiff.compare.perceptual import ShiftTolerantLpips; ShiftTolerantLpips()\n"
        "print({'stlpips_pytorch', 'torchvision', 'IPython'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_videos_of_other_sizes_are_refused(video):
    with pytest.raises(ValueError, match="videos to compare must have one shape, got"):
        quality(video[:, :32], video)
