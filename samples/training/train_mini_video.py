"""Train the mini video pipeline that ships with draftdiff, from nothing, on two CPU cores.

It learns the world of `pipelines/mini/world.py` (one coloured shape crossing a plain background) and comes out as a
stock `diffusers.WanPipeline`: a small Wan VAE, a small Wan transformer, and a tiny text encoder trained with it.
Every phase runs for a number of minutes rather than steps, saves a checkpoint once a minute, and resumes from it:

    python samples/training/train_mini_video.py vae --minutes 10
    python samples/training/train_mini_video.py dit --minutes 90
    python samples/training/train_mini_video.py export

`dit` scores itself with the judge at each milestone and exports by itself whenever the score improves.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from loop import Optimizer, Phase, parser, spent, write_settings
from mini_video_parts import (
    GUIDANCE,
    LATENT_CHANNELS,
    SHIFT,
    STEPS,
    TEXT_TOKENS,
    build_pipeline,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)
from score_mini_video import accuracy, generate
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from draftdiff.cli import run
from draftdiff.files import replacing_folder
from draftdiff.pipelines.mini import world as mini_world
from draftdiff.pipelines.mini.video import WEIGHTS, load_mini_video

# How far the decoder must tolerate errors in the latents, relative to their unit scale: the transformer makes some.
LATENT_NOISE = 0.15


def to_model_range(clip: np.ndarray) -> torch.Tensor:
    """Frames in 0..1, channels last, to one video tensor in -1..1."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2) * 2 - 1


def vae_crops(rng: random.Random) -> Iterator[torch.Tensor]:
    """Endless batches of small moving crops, in several frame counts and sizes."""
    while True:
        frames, side, batch = rng.choice([(9, 48, 4), (13, 48, 3), (5, 64, 4)])
        clips = []
        for _ in range(batch):
            scene = mini_world.random_scene(rng)
            frame_side = rng.choice([s for s in (64, 96, 128, 160) if s >= side])
            layout = mini_world.random_layout(scene, 29, frame_side, frame_side, rng)
            first = rng.randint(0, 29 - frames)
            x, y = (layout.start[i] + layout.step[i] * first for i in (0, 1))
            if rng.random() < 0.7:  # keep the shape in view; else wherever the window falls
                shift = side / 2
                left, top = (c - shift + rng.uniform(-0.4, 0.4) * side for c in (x, y))
            else:
                left, top = (rng.uniform(0, frame_side - side) for _ in range(2))
            window = mini_world.Layout(layout.radius, (x - left, y - top), layout.step)
            clips.append(to_model_range(mini_world.render(scene, window, frames, side, side)))
        yield torch.stack(clips)


class VaePhase(Phase):
    """Clips to latents and back, by L1 and L2."""

    def __init__(self, work: Path) -> None:
        self.vae = new_vae()
        kernels = [
            p
            for n, p in self.vae.named_parameters()
            if p.ndim >= 4 and "conv_in" not in n and "decoder.conv_out" not in n
        ]
        super().__init__(work / "vae.pt", self.vae, Optimizer(self.vae.parameters(), 2e-3, kernels), average=True)
        self.batches = vae_crops(random.Random(1000 + self.step))

    def rate(self, part: float) -> float:
        return 0.02 + 0.49 * (1 + math.cos(math.pi * part))

    def decay(self) -> float:
        return min(0.995, 1 - 1 / (self.step + 2))

    def train_step(self, part: float) -> str:
        noise, video = LATENT_NOISE * min(1.0, part / 0.3), next(self.batches)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = self.vae.encode(video).latent_dist
            mean = posterior.mean.float()
            decoded = self.vae.decode(mean + noise * torch.randn_like(mean)).sample.float()
        # A shape covers few of the pixels; without extra weight the VAE learns plain backgrounds for a long time.
        contrast = (video - video.flatten(2).median(2).values[:, :, None, None, None]).abs().amax(1, keepdim=True)
        difference = (decoded - video) * (1 + 4 * (contrast > 0.05))
        fit = difference.abs().mean() + difference.square().mean()
        spread = (posterior.logvar.float() - 2 * math.log(LATENT_NOISE)).square().mean()
        self.descend(fit + 2e-3 * mean.square().mean() + 1e-4 * spread)
        return f"fit={self.smoothed(fit.item()):.4f} size={mean.std().item():.2f}"


def export_vae(average: AutoencoderKLWan, work: Path) -> None:
    """Measure the latents, so that the pipeline can scale them to zero mean and unit variance, and save the VAE."""
    rng = random.Random(7)
    latents, errors = [], []
    for _ in tqdm(range(24), desc="measuring latents"):
        video = to_model_range(mini_world.random_clip(mini_world.random_scene(rng), 29, 128, 128, rng))[None]
        with torch.no_grad():
            mean = average.encode(video).latent_dist.mean
            latents.append(mean)
            errors.append((average.decode(mean).sample - video).abs().mean().item())
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    average.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    average.save_pretrained(work / "vae")
    tqdm.write(f"vae: mean absolute error {np.mean(errors):.4f} on full clips (pixels in -1..1); std {flat.std(1)}")


class LatentPool:
    """Rendered and encoded clips of one size, kept in memory because encoding costs about as much as a training step.

    It grows during training. Captions are not stored: each use of a clip gets a new wording.
    """

    def __init__(self, vae: AutoencoderKLWan, grid: tuple[int, int, int], seed: int) -> None:
        self.vae, self.rng = vae, random.Random(seed)
        self.frames, self.height, self.width = 4 * (grid[0] - 1) + 1, 8 * grid[1], 8 * grid[2]
        shape = (1, LATENT_CHANNELS, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)
        self.latents: list[torch.Tensor] = []
        self.scenes: list[mini_world.Scene] = []

    @torch.no_grad()
    def grow(self, count: int) -> None:
        scenes = [mini_world.random_scene(self.rng) for _ in range(count)]
        clips = [mini_world.random_clip(scene, self.frames, self.height, self.width, self.rng) for scene in scenes]
        with torch.autocast("cpu", torch.bfloat16):
            mean = self.vae.encode(torch.stack([to_model_range(clip) for clip in clips])).latent_dist.mean.float()
        self.latents += list(((mean - self.mean) / self.std).half())
        self.scenes += scenes

    def draw(self, count: int) -> tuple[torch.Tensor, list[str]]:
        chosen = self.rng.sample(range(len(self.scenes)), count)
        captions = [mini_world.caption(self.scenes[i], self.rng) for i in chosen]
        # Without a caption now and then, the model also learns what guidance steers away from.
        captions = ["" if self.rng.random() < 0.1 else text for text in captions]
        return torch.stack([self.latents[i] for i in chosen]).float(), captions


def encode_captions(
    text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> torch.Tensor:
    """Text embeddings as WanPipeline makes them: padded to a fixed length, zero after the last token."""
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    tokens = tokens.to(text_encoder.device)
    hidden = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None]


def draw_sigmas(count: int, tokens: int, most: float = SHIFT) -> torch.Tensor:
    """Noise levels, one per clip, spread evenly over a logit-normal and shifted towards noise for larger clips.

    The same clip in more tokens is readable through more noise, so what it shows is decided at higher noise levels.
    most: the largest shift.
    """
    even = (torch.arange(count) + torch.rand(count)) / count
    plain = torch.where(torch.rand(count) < 0.1, even, torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4))))
    shift = min(most, 2.2 * math.sqrt(tokens / 192))
    return shift * plain / (1 + (shift - 1) * plain)


@dataclass(frozen=True)
class Stage:
    """Part of the training: until which share of the time, on which latent grids and how often, in what batch."""

    until: float
    grids: dict[tuple[int, int, int], tuple[float, int]]


# Most of what there is to learn is learnt on few tokens, at a fifteenth of the cost; the full grid comes last.
STAGES = (
    Stage(0.14, {(3, 8, 8): (1.0, 24)}),
    Stage(0.26, {(3, 8, 8): (0.15, 24), (5, 8, 8): (0.85, 16)}),
    Stage(0.40, {(5, 8, 8): (0.35, 16), (8, 8, 8): (0.25, 12), (3, 16, 16): (0.4, 8)}),
    Stage(1.00, {(8, 16, 16): (0.7, 4), (5, 8, 8): (0.1, 16), (8, 8, 8): (0.08, 12), (3, 16, 16): (0.12, 8)}),
)


WHERE_LOADED = ("_name_or_path", "is_local", "local_files_only")  # what the hosts' files tell of this machine


def export(pipe: WanPipeline, folder: Path, training: dict[str, object]) -> None:
    """Save the pipeline in half precision with its settings, whole or not at all."""
    half = copy.deepcopy(pipe).to(torch.float16)
    with replacing_folder(folder) as partial:
        half.save_pretrained(partial, safe_serialization=True)
        for file in (partial / "model_index.json", *partial.glob("*/*config.json")):
            told = json.loads(file.read_text(encoding="utf-8"))
            kept = {name: value for name, value in told.items() if name not in WHERE_LOADED}
            # The class's older name, which every supported transformers version knows.
            text = json.dumps(kept, indent=2).replace("TokenizersBackend", "PreTrainedTokenizerFast")
            file.write_text(f"{text}\n", encoding="utf-8")
        settings = {
            "about": "A mini video model for draftdiff. `generate` holds the arguments to call the pipeline with.",
            "generate": {
                "height": 128,
                "width": 128,
                "num_frames": 29,
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
                "max_sequence_length": TEXT_TOKENS,
            },
            "fps": 8,
            "prompt_example": mini_world.plain_caption(mini_world.Scene("red", "circle", "right", "small", "black")),
            "words": {
                "colours": list(mini_world.COLOURS),
                "shapes": list(mini_world.SHAPES),
                "motions": list(mini_world.MOTIONS),
                "sizes": list(mini_world.SIZES),
                "backgrounds": list(mini_world.BACKGROUNDS),
                "other": list(mini_world.FUNCTION_WORDS),
                "synonyms": mini_world.SYNONYMS,
            },
            "held_out_combinations": [list(combination) for combination in mini_world.HELD_OUT],
            "training": training,
        }
        write_settings(partial, settings)


SMALL, FULL = (5, 8, 8), (8, 16, 16)
# Shares of the time at which to look: cheaply on the small grid at first, then on the full one.
LOOKS = ((0.12, SMALL), (0.25, SMALL), (0.42, FULL), (0.62, FULL), (0.82, FULL))


class DitPhase(Phase):
    """The transformer and the text encoder: scored now and then, and exported where they score best on all tokens."""

    warm_up = 40

    def __init__(self, work: Path) -> None:
        torch.manual_seed(0)
        self.work = work
        self.vae = AutoencoderKLWan.from_pretrained(work / "vae")
        self.vae.requires_grad_(False)
        self.tokenizer = new_tokenizer()
        self.transformer = new_transformer()
        self.text_encoder = new_text_encoder(len(self.tokenizer))
        matrices = [p for name, p in self.transformer.blocks.named_parameters() if p.ndim == 2]
        model = torch.nn.ModuleList([self.transformer, self.text_encoder])
        super().__init__(work / "dit.pt", model, Optimizer(model.parameters(), 1.5e-3, matrices), average=True)
        self.kept.setdefault("best", -1.0)
        self.rng = random.Random(self.step)
        self.pools: dict[tuple[int, int, int], LatentPool] = {}
        self.losses: dict[tuple[int, int, int], float] = {}
        self.looks = [*LOOKS]

    def rate(self, part: float) -> float:
        return min(1.0, 0.03 + 0.97 * (1 - part) / 0.6)

    def pool(self, grid: tuple[int, int, int], at_least: int) -> LatentPool:
        if grid not in self.pools:
            self.pools[grid] = LatentPool(self.vae, grid, seed=hash(grid) + self.step)
        pool = self.pools[grid]
        with tqdm(
            total=at_least, desc=f"rendering {grid}", disable=len(pool.scenes) >= at_least, mininterval=10
        ) as bar:
            while len(pool.scenes) < at_least:
                pool.grow(4)
                bar.update(4)
        return pool

    def train_step(self, part: float) -> str:
        stage = next(stage for stage in STAGES if part < stage.until)
        grid = self.rng.choices(list(stage.grids), [weight for weight, _ in stage.grids.values()])[0]
        loss = self.loss_on(grid, stage.grids[grid][1])
        self.descend(loss)
        self.losses[grid] = 0.97 * self.losses.get(grid, loss.item()) + 0.03 * loss.item()
        due = [look for look in self.looks if look[0] <= part]
        self.looks = self.looks[len(due) :]
        if due:
            shape = due[-1][1]
            self.milestone(shape, 12 if shape == SMALL else 6, ship=shape == FULL)
        return "loss " + " ".join(f"{'x'.join(map(str, g))}={value:.3f}" for g, value in self.losses.items())

    def loss_on(self, grid: tuple[int, int, int], batch: int) -> torch.Tensor:
        pool = self.pool(grid, at_least=max(8 * batch, 160))
        if len(pool.scenes) < 6000:  # about five uses of each clip
            pool.grow(max(1, batch // 5))
        clean, captions = pool.draw(batch)
        sigma = draw_sigmas(batch, math.prod(grid))
        noise = torch.randn_like(clean)
        mix = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            text = encode_captions(self.text_encoder, self.tokenizer, captions)
            velocity = self.transformer((1 - mix) * clean + mix * noise, 1000 * sigma, text, return_dict=False)[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def pipeline(self) -> WanPipeline:
        transformer, text_encoder = self.average
        return build_pipeline(transformer, text_encoder, self.tokenizer, self.vae)  # type: ignore[arg-type]

    def evaluate(self, grid: tuple[int, int, int], count: int) -> dict[str, dict[str, float]]:
        """Score the averaged weights on prompts of seen combinations, and apart from that on held-out ones."""
        call = {"num_frames": 4 * (grid[0] - 1) + 1, "height": 8 * grid[1], "width": 8 * grid[2]}
        call |= {"num_inference_steps": 12, "max_sequence_length": TEXT_TOKENS}
        scores = {}
        with torch.autocast("cpu", torch.bfloat16):
            for name, held_out in (("seen", False), ("held-out", True)):
                scenes = mini_world.even_scenes(count, held_out, seed=1)
                clips = generate(self.pipeline(), scenes, 4, seed=500, guidance_scale=GUIDANCE, **call)
                scores[name] = accuracy(clips, scenes)
        return scores

    def milestone(self, grid: tuple[int, int, int], count: int, ship: bool) -> None:
        """Score, report, and export if nothing better was exported; only seen combinations decide that."""
        started = time.time()
        scores = self.evaluate(grid, count)
        record = {"step": self.step, "minutes": round(self.seconds / 60, 1), "grid": grid, **scores}
        with (self.work / "scores.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, score in scores.items():
            shares = "  ".join(f"{key} {value:.0%}" for key, value in score.items())
            tqdm.write(f"step {self.step}, grid {grid}, {name}: {shares}  ({time.time() - started:.0f} s)")
        if ship:
            validation = scores["seen"]["all"] + 0.1 * float(np.mean(list(scores["seen"].values())))
            if validation >= self.kept["best"]:
                self.kept["best"] = validation
                training = {"steps": self.step, "minutes": round(self.seconds / 60, 1), "validation": scores}
                export(self.pipeline(), WEIGHTS, training)
                tqdm.write(f"exported to {WEIGHTS.name} (validation score {validation:.3f})")

    def run(self, minutes: float) -> None:
        """Go through the stages, and score the end."""
        self.transformer.compile_repeated_blocks()
        torch._dynamo.config.recompile_limit = 32
        self.looks = [look for look in LOOKS if look[0] > self.seconds / (60 * minutes)]
        super().run(minutes)
        self.milestone(FULL, 6, ship=True)
        self.save()


def main() -> None:
    arguments = parser(__doc__, ["vae", "dit"], minutes=10, threads=2).parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work
    phase = VaePhase(work) if arguments.phase == "vae" else DitPhase(work)
    try:
        if arguments.phase == "export":
            export(phase.pipeline(), WEIGHTS, spent(work / "dit.pt"))
            load_mini_video()
            print(f"exported step {phase.step} to {WEIGHTS}")
        else:
            phase.run(arguments.minutes)
            if arguments.phase == "vae":
                export_vae(phase.average, work)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command carries on from {work}") from None


if __name__ == "__main__":
    sys.exit(run(main, "train_mini_video"))
