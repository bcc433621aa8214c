"""Train the mini video pipeline on, on a GPU: clearer shapes, and pictures of 256 x 256, which are 8,192 tokens.

Both phases start from the weights that ship with draftdiff, which `train_mini_video.py` made on two CPU cores, and may
run beside each other; each takes minutes on a GPU, and hours on a CPU:

    python samples/training/train_mini_video_large.py decoder --minutes 4 --device cuda --workers 4
    python samples/training/train_mini_video_large.py dit --minutes 5 --device cuda --workers 8
    python samples/training/train_mini_video_large.py export

`decoder` sharpens what the VAE decodes and leaves its latents as they are; `dit` trains the transformer and the text
encoder on them. `export` puts what they have made in the place of the weights that ship.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loop import Optimizer, Phase, existing, parser, spent
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from train_mini_video import LATENT_NOISE, draw_sigmas, encode_captions, to_model_range
from train_mini_video import export as save

from draftdiff.cli import run
from draftdiff.models.devices import find_device
from draftdiff.pipelines.mini import world as mini_world
from draftdiff.pipelines.mini.video import WEIGHTS, load_mini_video, mini_video_defaults

SHIFT = 8.0  # of the timesteps: the same clip in more tokens is readable through more noise
# Latent grids: how often, and in what batch. The smaller ones keep what the model knows of other sizes.
GRIDS = {(8, 32, 32): (0.45, 4), (8, 16, 16): (0.4, 16), (3, 16, 16): (0.07, 32), (5, 8, 8): (0.08, 64)}
CLIPS, AT_ONCE = 2400, 8  # of each grid that are rendered, and how many in a call of the encoder
CROPS = ((13, 96, 12), (9, 128, 8), (5, 160, 8))  # frames, side, batch


class Clips(IterableDataset):
    """Endless clips of a size, rendered by the workers of a `DataLoader`: pixels in -1..1 and their scene."""

    def __init__(self, frames: int, side: int, seed: int) -> None:
        self.frames, self.side, self.seed = frames, side, seed

    def __iter__(self) -> Iterator[tuple[Tensor, mini_world.Scene]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            scene = mini_world.random_scene(rng)
            yield to_model_range(mini_world.random_clip(scene, self.frames, self.side, self.side, rng)), scene


class Crops(IterableDataset):
    """Endless batches of windows of moving clips, most with a shape in view."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            frames, side, batch = rng.choice(CROPS)
            yield torch.stack([self.window(rng, frames, side) for _ in range(batch)])

    @staticmethod
    def window(rng: random.Random, frames: int, side: int) -> Tensor:
        scene = mini_world.random_scene(rng)
        frame_side = max(side, rng.choice([128, 256, 256]))
        layout = mini_world.random_layout(scene, 29, frame_side, frame_side, rng)
        first = rng.randint(0, 29 - frames)
        x, y = (layout.start[i] + layout.step[i] * first for i in (0, 1))
        if rng.random() < 0.85:
            left, top = (c - side / 2 + rng.uniform(-0.4, 0.4) * side for c in (x, y))
        else:
            left, top = (rng.uniform(0, frame_side - side) for _ in range(2))
        seen = mini_world.Layout(layout.radius, (x - left, y - top), layout.step)
        return to_model_range(mini_world.render(scene, seen, frames, side, side))


class DecoderPhase(Phase):
    """Noisy latents of the VAE back to clips, by L1 and L2 with weight on shapes and edges; the encoder stays."""

    def __init__(self, work: Path, device: torch.device, workers: int) -> None:
        self.vae = load_mini_video().vae.to(device).requires_grad_(False)
        self.device = device
        decoder = torch.nn.ModuleList([self.vae.post_quant_conv, self.vae.decoder]).requires_grad_(True)
        kernels = [p for n, p in decoder.named_parameters() if p.ndim >= 4 and "conv_out" not in n]
        optimizer = Optimizer(decoder.parameters(), 1e-3, kernels, muon_rate=0.01)
        super().__init__(work / "large-decoder.pt", decoder, optimizer, average=True)
        self.batches = iter(DataLoader(Crops(1000 + self.step), batch_size=None, num_workers=workers))

    def decay(self) -> float:
        return min(0.98, 1 - 1 / (self.step + 2))

    def train_step(self, part: float) -> str:
        video = next(self.batches).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                mean = self.vae.encode(video).latent_dist.mean.float()
            decoded = self.vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample.float()
        contrast = (video - video.flatten(2).median(2).values[:, :, None, None, None]).abs().amax(1, keepdim=True)
        difference = (decoded - video) * (1 + 4 * (contrast > 0.05))
        self.descend(difference.abs().mean() + difference.square().mean())
        return f"error={self.smoothed((decoded - video).square().mean().item()):.5f}"

    def result(self) -> dict[str, Any]:
        """The VAE's weights with the averaged decoder."""
        assert self.average is not None
        self.model.load_state_dict(self.average.state_dict())
        return self.vae.state_dict()


class LatentPool:
    """Rendered and encoded clips of one size on the device. It grows until it holds `CLIPS`, a few each step: encoding
    them costs about as much. Captions are not kept: each use of a clip gets a new wording."""

    def __init__(self, pipe: Any, grid: tuple[int, int, int], seed: int, workers: int) -> None:
        self.vae, self.rng = pipe.vae, random.Random(seed)
        clips = Clips(4 * (grid[0] - 1) + 1, 8 * grid[1], seed)
        self.clips = iter(DataLoader(clips, batch_size=None, num_workers=workers))
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, device=self.vae.device).view(shape)
        self.std = torch.tensor(self.vae.config.latents_std, device=self.vae.device).view(shape)
        self.latents: list[Tensor] = []
        self.scenes: list[mini_world.Scene] = []

    @torch.no_grad()
    def grow(self) -> None:
        """By `AT_ONCE` clips."""
        drawn = [next(self.clips) for _ in range(AT_ONCE)]
        with torch.autocast(self.vae.device.type, torch.bfloat16):
            video = torch.stack([clip for clip, _ in drawn]).to(self.vae.device)
            mean = self.vae.encode(video).latent_dist.mean.float()
        self.latents += list((mean - self.mean) / self.std)
        self.scenes += [scene for _, scene in drawn]
        if self.full:
            del self.clips  # and the processes that render

    @property
    def full(self) -> bool:
        return len(self.scenes) >= CLIPS

    def draw(self, count: int) -> tuple[Tensor, list[str]]:
        chosen = self.rng.sample(range(len(self.scenes)), count)
        captions = [mini_world.caption(self.scenes[i], self.rng) for i in chosen]
        # Without a caption now and then, the model also learns what guidance steers away from.
        captions = ["" if self.rng.random() < 0.1 else text for text in captions]
        return torch.stack([self.latents[i] for i in chosen]), captions


class DitPhase(Phase):
    """The transformer and the text encoder, from the weights that ship, on latents of the VAE's own."""

    warm_up = 30

    def __init__(self, work: Path, device: torch.device, workers: int) -> None:
        self.pipe = load_mini_video().to(device)
        self.device, self.workers = device, workers
        self.pipe.vae.requires_grad_(False)
        self.transformer, self.text_encoder = self.pipe.transformer, self.pipe.text_encoder
        matrices = [p for p in self.transformer.blocks.parameters() if p.ndim == 2]
        model = torch.nn.ModuleList([self.transformer, self.text_encoder])
        super().__init__(work / "large-dit.pt", model, Optimizer(model.parameters(), 8e-4, matrices), average=True)
        self.rng = random.Random(self.step)
        self.pools: dict[tuple[int, int, int], LatentPool] = {}
        self.losses: dict[tuple[int, int, int], Tensor] = {}
        self.shown = ""

    def rate(self, part: float) -> float:
        return min(1.0, 0.01 + 0.99 * (1 - part) / 0.85)

    def pool(self, grid: tuple[int, int, int]) -> LatentPool:
        """The clips of a grid, at least as many as two batches."""
        if grid not in self.pools:
            self.pools[grid] = LatentPool(self.pipe, grid, math.prod(grid) + self.step, self.workers)
        pool = self.pools[grid]
        while not pool.full and len(pool.scenes) < 2 * GRIDS[grid][1]:
            pool.grow()
        return pool

    def train_step(self, part: float) -> str:
        grid = self.rng.choices(list(GRIDS), [weight for weight, _ in GRIDS.values()])[0]
        batch = GRIDS[grid][1]
        pool = self.pool(grid)
        if not pool.full:
            pool.grow()
        clean, captions = pool.draw(batch)
        sigma = draw_sigmas(batch, math.prod(grid), SHIFT).to(self.device)
        noise = torch.randn_like(clean)
        mix = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16):
            text = encode_captions(self.text_encoder, self.pipe.tokenizer, captions)
            velocity = self.transformer((1 - mix) * clean + mix * noise, 1000 * sigma, text, return_dict=False)[0]
        loss = (velocity.float() - (noise - clean)).square().mean()
        self.descend(loss)
        self.losses[grid] = self.losses.get(grid, loss.detach()).lerp(loss.detach(), 0.03)
        if self.step % 20 == 0:  # reading a number waits for the GPU
            self.shown = " ".join(f"{'x'.join(map(str, g))}={value:.3f}" for g, value in self.losses.items())
        return f"loss {self.shown}"


def export(work: Path) -> None:
    """Put what the phases have made in the place of the weights that ship, in half precision, whole or not at all."""
    pipe = load_mini_video()
    trained = torch.load(existing(work / "large-dit.pt", "dit"), map_location="cpu")["average"]
    torch.nn.ModuleList([pipe.transformer, pipe.text_encoder]).load_state_dict(trained)
    if (work / "large-vae.pt").exists():
        pipe.vae.load_state_dict(torch.load(work / "large-vae.pt", map_location="cpu"))
    training = {**mini_video_defaults()["training"], "on a GPU": spent(work / "large-dit.pt")}
    save(pipe, WEIGHTS, training)


def main() -> None:
    made = parser(__doc__, ["decoder", "dit"], minutes=3, threads=2)
    made.add_argument("--device", default="cpu", help="where to train (default cpu)")
    made.add_argument("--workers", type=int, default=0, help="processes that render clips (default: none)")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    work, device = arguments.work, find_device(arguments.device)
    if arguments.phase == "export":
        export(work)
        return
    phase: DecoderPhase | DitPhase
    if arguments.phase == "decoder":
        phase = DecoderPhase(work, device, arguments.workers)
    else:
        phase = DitPhase(work, device, arguments.workers)
    try:
        phase.run(arguments.minutes)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command carries on from {work}") from None
    if isinstance(phase, DecoderPhase):
        torch.save(phase.result(), work / "large-vae.pt")


if __name__ == "__main__":
    sys.exit(run(main, "train_mini_video_large"))
