"""Clips for the eye: side by side under their names, as videos and as contact sheets."""

from __future__ import annotations

import re

import numpy as np

SIDE_BY_SIDE = "side by side"
STRIP = 34  # height of the names above the clips, in pixels


def file_name(prompt: int, setting: str, frames: int) -> str:
    slug = re.sub(r"[^a-z0-9.]+", "-", setting.lower()).strip("-.") or "setting"
    return f"{prompt + 1:02d}-{slug}{'.mp4' if frames > 1 else '.png'}"


def side_by_side(clips: dict[str, np.ndarray], widest: int = 3840) -> np.ndarray:
    """Clips of one size in a row, each under its name: uint8 [frames, height, width, 3]. Small clips are magnified by
    whole pixels so that the names can be read; a row beyond `widest` pixels is shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = next(iter(clips.values())).shape[1:3]
    scale: float = max(1, -(-256 // width))
    if scale * width * len(clips) > widest:
        scale = widest / (width * len(clips))
    size = (round(width * scale) // 2 * 2, round(height * scale) // 2 * 2)
    font = ImageFont.load_default(size=max(10, min(20, size[0] // max(map(len, clips)) * 1.6)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS

    columns = []
    for name, frames in clips.items():
        label = Image.new("RGB", (size[0], STRIP), (24, 26, 30))
        ImageDraw.Draw(label).text((size[0] / 2, STRIP / 2), name, font=font, anchor="mm", fill=(240, 240, 240))
        scaled = [np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames]
        columns.append(np.stack([np.concatenate([np.asarray(label), frame]) for frame in scaled]))
    return np.concatenate(columns, axis=2)


def contact_sheet(together: np.ndarray, moments: int = 3) -> np.ndarray:
    """Some frames of `side_by_side` below one another, the names on top only: uint8 [height, width, 3]."""
    chosen = together[np.linspace(0, len(together) - 1, moments).round().astype(int)]
    return np.concatenate([chosen[0], *chosen[1:, STRIP:]])
