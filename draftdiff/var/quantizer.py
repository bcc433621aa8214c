"""Multi-scale residual quantisation (VAR, arXiv 2404.02905, Algorithms 1 and 2).

A feature map is the sum over scales of code maps, enlarged to its size and smoothed by a small convolution, phi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from draftdiff.errors import UserError


def resize_area(x: Tensor, side: int) -> Tensor:
    """Shrink feature maps [batch, channels, height, width] to side x side by averaging."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="area")


def resize_bicubic(x: Tensor, side: int) -> Tensor:
    """Enlarge feature maps [batch, channels, height, width] to side x side."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bicubic")


@dataclass
class Quantized:
    """latents: sum over all scales, [batch, channels, side, side], with straight-through gradients.
    indices: int64 [batch, side^2] per scale.  loss: codebook and commitment loss, averaged over scales.
    """

    latents: Tensor
    indices: list[Tensor]
    loss: Tensor


class MultiScaleQuantizer(nn.Module):
    """num_embeddings codes of `channels` numbers; scales with sides `patch_nums`, the last one the map's own.

    num_phi: smoothing convolutions shared among the scales, 0 for one per scale.  phi_share: what of a code map phi
    replaces by its convolution.  cosine: nearest code by angle rather than distance.
    """

    def __init__(
        self,
        num_embeddings: int,
        channels: int,
        patch_nums: Sequence[int],
        num_phi: int = 4,
        phi_share: float = 0.5,
        beta: float = 0.25,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.phi_share = phi_share
        self.beta = beta
        self.cosine = cosine
        self.embedding = nn.Embedding(num_embeddings, channels)
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_phi or len(self.patch_nums))]
        self.phi = nn.ModuleList(convolutions if phi_share else [])
        nn.init.normal_(self.embedding.weight, std=0.5)

    def phi_index(self, scale: int, scales: int) -> int:
        """The convolution of a scale: the one whose tick is nearest to its place among all scales."""
        count = len(self.phi)
        margin = 1 / (3 * count if count == 4 else 2 * count)
        # In float64 of NumPy: some scales lie half-way between two ticks, and rounding decides as in the originals.
        ticks = np.linspace(margin, 1 - margin, count)
        return int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1))))

    def contribution(self, codes: Tensor, scale: int, patch_nums: Sequence[int] | None = None) -> Tensor:
        """What a scale adds to the latents [batch, channels, side, side].

        codes: [batch, tokens, channels] in raster order.
        """
        patch_nums = patch_nums or self.patch_nums
        side = patch_nums[scale]
        h = rearrange(codes, "b (h w) c -> b c h w", h=side)
        h = resize_bicubic(h, patch_nums[-1])
        if not self.phi_share:
            return h
        smooth = self.phi[self.phi_index(scale, len(patch_nums))](h)
        return h * (1 - self.phi_share) + smooth * self.phi_share

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest code, int64 [batch, height * width], for x [batch, channels, height, width]."""
        rows = rearrange(x, "b c h w -> (b h w) c").float()
        codes = self.embedding.weight.float()
        if self.cosine:
            index = (F.normalize(rows, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)
        else:
            index = (codes.square().sum(-1) - 2 * rows @ codes.T).argmin(-1)
        return index.view(len(x), -1)

    def forward(self, features: Tensor, patch_nums: Sequence[int] | None = None) -> Quantized:
        """Quantise features [batch, channels, side, side] scale by scale, coarse to fine."""
        patch_nums = patch_nums or self.patch_nums
        if features.shape[-1] != patch_nums[-1] or features.shape[-2] != patch_nums[-1]:
            raise UserError(f"features must be {patch_nums[-1]} x {patch_nums[-1]}, got {tuple(features.shape[-2:])}")
        target = features.detach()
        latents = torch.zeros_like(target)
        indices, loss = [], features.new_zeros(())
        for scale, side in enumerate(patch_nums):
            with torch.no_grad():
                index = self.nearest(resize_area(target - latents, side))
            indices.append(index)
            latents = latents + self.contribution(self.embedding(index), scale, patch_nums)
            loss = loss + F.mse_loss(latents, target) + self.beta * F.mse_loss(latents.detach(), features)
        return Quantized(features + (latents - features).detach(), indices, loss / len(patch_nums))

    @torch.no_grad()
    def revive(self, features: Tensor, unused: Tensor) -> None:
        """Move unused codes, bool [num_embeddings], to what is left of random cells of these features at random scales.

        For training: a code that is nearest to nothing gets no gradient, so without this all but a few codes die.
        """
        latents, left = torch.zeros_like(features), []
        for scale, side in enumerate(self.patch_nums):
            small = resize_area(features - latents, side)
            left.append(rearrange(small, "b c h w -> (b h w) c"))
            latents = latents + self.contribution(self.embedding(self.nearest(small)), scale)
        cells = torch.cat(left)
        chosen = torch.randint(len(cells), (int(unused.sum()),), device=cells.device)
        self.embedding.weight[unused] = cells[chosen].to(self.embedding.weight.dtype)

    def latents_by_scale(self, indices: Sequence[Tensor], patch_nums: Sequence[int] | None = None) -> list[Tensor]:
        """The latents after each scale, for indices int64 [batch, side^2] per scale."""
        patch_nums = patch_nums or self.patch_nums
        latents: list[Tensor] = []
        for scale, index in enumerate(indices):
            added = self.contribution(self.embedding(index), scale, patch_nums)
            latents.append(latents[-1] + added if latents else added)
        return latents

    def teacher_inputs(self, indices: Sequence[Tensor], patch_nums: Sequence[int] | None = None) -> Tensor:
        """What a transformer reads to predict scales 1, 2, ... of these pictures: [batch, tokens - 1, channels]."""
        patch_nums = patch_nums or self.patch_nums
        latents = self.latents_by_scale(indices[:-1], patch_nums)
        inputs = [resize_area(x, side) for x, side in zip(latents, patch_nums[1:])]
        return torch.cat([rearrange(x, "b c h w -> b (h w) c") for x in inputs], dim=1)
