"""Train the mini image pair that ships with draftdiff, from nothing, on one CPU core.

It learns the world of `pipelines/mini/pictures.py` (one coloured shape in one of five places): a small multi-scale VQ
model first, then a drafter and a refiner of a quarter of its size that predict its codes, and beside them its decoder
for a while longer, which leaves the codes as they are. Every phase runs for a number of minutes rather than steps,
saves a checkpoint once a minute and when interrupted, and resumes from it:

    python samples/training/train_mini_image.py vq --minutes 11
    python samples/training/train_mini_image.py drafter --minutes 24
    python samples/training/train_mini_image.py refiner --minutes 12
    python samples/training/train_mini_image.py decoder --minutes 8
    python samples/training/train_mini_image.py export

`samples/training/score_mini_image.py` then tells what they are worth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from loop import Optimizer, Phase, existing, parser, spent, write_settings
from torch import Tensor, nn
from torch.nn.utils import parametrize

from draftdiff.cli import run
from draftdiff.files import replacing_folder
from draftdiff.pipelines.mini import pictures as mini_pictures
from draftdiff.pipelines.mini.image import WEIGHTS, load_mini_image
from draftdiff.pipelines.mini.pictures import CLASSES, COLOURS, PLACES, SHAPES
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8)
CODES, CODE_CHANNELS = 256, 8
SIZES = {"drafter": {"num_layers": 8, "num_attention_heads": 3}, "refiner": {"num_layers": 4, "num_attention_heads": 2}}
BATCH = 16
LABEL_DROPOUT = 0.1
# How pictures are best drawn.
GENERATE: dict[str, Any] = {"guidance_scale": 1.5, "top_k": 100, "top_p": 0.95}
DRAFT_SCALES = 5
# Of the VQ phase: the part of its time in which pictures may pass unquantised, and the extra weight of shapes.
UNQUANTISED, SHAPE_WEIGHT = 0.25, 3.0


def new_vq() -> VQModel:
    """64 pixels to 8 x 8 cells."""
    return VQModel(
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=CODE_CHANNELS,
        num_vq_embeddings=CODES,
        patch_nums=PATCH_NUMS,
        norm_num_groups=8,
    )


def new_transformer(kind: str) -> VARTransformer2DModel:
    """A drafter or a refiner; its residual branches start open, which saves it the time to open them."""
    model = VARTransformer2DModel(
        **SIZES[kind],
        attention_head_dim=64,
        in_channels=CODE_CHANNELS,
        vocab_size=CODES,
        num_classes=len(CLASSES),
        patch_nums=PATCH_NUMS,
        shared_adaln=True,
    )
    with torch.no_grad():
        for block in model.blocks:
            block.adaln_offset[:2] = 1.0
    return model


class ComposedClasses(nn.Module):
    """Adds to each class's own embedding those of its shape, colour and place, so that classes learn from each other.

    Only training knows of the parts; what is exported is their sum.
    """

    parts: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        parts = [
            [list(SHAPES).index(c.shape) for c in CLASSES],
            [list(COLOURS).index(c.colour) for c in CLASSES],
            [list(PLACES).index(c.place) for c in CLASSES],
        ]
        self.register_buffer("parts", torch.tensor(parts), persistent=False)
        self.tables = nn.ParameterList(nn.Parameter(0.2 * torch.randn(max(part) + 1, width)) for part in parts)

    def forward(self, own: Tensor) -> Tensor:
        shared = torch.stack([table[part] for table, part in zip(self.tables, self.parts)]).sum(0)
        return own + F.pad(shared, (0, 0, 0, 1))  # the last embedding stands for no class


def composed_transformer(kind: str) -> VARTransformer2DModel:
    """As it is trained."""
    model = new_transformer(kind)
    parametrize.register_parametrization(model.class_embed, "weight", ComposedClasses(model.class_embed.embedding_dim))
    return model


def random_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Fresh pictures [batch, 3, 64, 64] in [-1, 1] and their labels int64 [batch]."""
    labels = rng.integers(len(CLASSES), size=BATCH)
    pictures = mini_pictures.random_pictures(labels.tolist(), rng)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1, torch.from_numpy(labels)


def shape_weights(pictures: Tensor) -> Tensor:
    """Weights of pixels [batch, 1, 64, 64] with a mean of about 1.5: the shape counts more than what is around it."""
    contrast = (pictures - pictures[:, :, :1, :1]).abs().amax(dim=1, keepdim=True)
    return 1 + SHAPE_WEIGHT * F.max_pool2d(contrast, 5, stride=1, padding=2)


class VQPhase(Phase):
    """Pictures to codes and back, by L1 and the quantiser's own loss."""

    def __init__(self, work: Path) -> None:
        self.vq = new_vq()
        super().__init__(work / "image_vq.pt", self.vq, Optimizer(self.vq.parameters(), adam_rate=2e-3))
        self.rng = np.random.default_rng()
        self.used = torch.zeros(CODES, dtype=torch.bool)

    def train_step(self, part: float) -> str:
        pictures, _ = random_batch(self.rng)
        features = self.vq.quant_conv(self.vq.encoder(pictures))
        out = self.vq.quantize(features)
        # Early on most pictures pass unquantised: the autoencoder learns to see before the codes learn what it sees.
        bypass = torch.rand(len(pictures), 1, 1, 1) < 1 - part / UNQUANTISED
        sample = self.vq.decoder(self.vq.post_quant_conv(torch.where(bypass, features, out.latents)))
        error = ((sample - pictures).abs() * shape_weights(pictures)).mean()
        self.descend(error + out.loss)
        self.used[torch.cat(out.indices, dim=1).flatten()] = True
        shown = f"L1={self.smoothed(error.item()):.4f} quantiser={out.loss.item():.4f} codes={int(self.used.sum())}"
        if self.step % 25 == 24:
            if part < 0.6:
                self.vq.quantize.revive(features.detach(), ~self.used)
            if self.step % 100 == 99 or part < 0.6:
                self.used.zero_()
        return shown


class DecoderPhase(Phase):
    """The way back from codes to pictures once more, with the codes as they are: transformers need not learn anew."""

    def __init__(self, work: Path) -> None:
        self.vq = trained_vq(work)
        parameters = [*self.vq.post_quant_conv.parameters(), *self.vq.decoder.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        super().__init__(work / "image_decoder.pt", self.vq, Optimizer(parameters, adam_rate=1e-3))
        self.rng = np.random.default_rng()

    def train_step(self, part: float) -> str:
        pictures, _ = random_batch(self.rng)
        with torch.no_grad():
            latents = self.vq.quantize.latents_by_scale(self.vq.encode(pictures))[-1]
        sample = self.vq.decoder(self.vq.post_quant_conv(latents))
        error = ((sample - pictures).abs() * shape_weights(pictures)).mean()
        self.descend(error)
        return f"L1={self.smoothed(error.item()):.4f}"


class TransformerPhase(Phase):
    """Codes of all scales from the class and the scales before, by cross-entropy."""

    def __init__(self, kind: str, work: Path) -> None:
        self.vq, model = trained_vq(work), composed_transformer(kind)
        matrices = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and name.endswith("weight")]
        super().__init__(work / f"image_{kind}.pt", model, Optimizer(model.parameters(), 2e-3, matrices))
        self.rng = np.random.default_rng()

    def train_step(self, part: float) -> str:
        pictures, labels = random_batch(self.rng)
        with torch.no_grad():
            indices = self.vq.encode(pictures)
            inputs = self.vq.quantize.teacher_inputs(indices)
        labels = labels.masked_fill(torch.rand(len(labels)) < LABEL_DROPOUT, len(CLASSES))
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(inputs, labels).sample
        loss = F.cross_entropy(logits.float().flatten(0, 1), torch.cat(indices, dim=1).flatten())
        self.descend(loss)
        return f"cross-entropy={self.smoothed(loss.item()):.4f}"


PHASES: dict[str, Callable[[Path], Phase]] = {
    "vq": VQPhase,
    "decoder": DecoderPhase,
    "drafter": partial(TransformerPhase, "drafter"),
    "refiner": partial(TransformerPhase, "refiner"),
}


def trained_vq(work: Path, phase: str = "vq") -> VQModel:
    """The VQ model of a work folder as a phase has left it, frozen."""
    vq = new_vq().requires_grad_(False).eval()
    vq.load_state_dict(torch.load(existing(work / f"image_{phase}.pt", phase))["model"])
    return vq


def trained_transformer(kind: str, work: Path) -> VARTransformer2DModel:
    """The drafter or refiner of a work folder, its class embeddings summed up."""
    model = composed_transformer(kind)
    model.load_state_dict(torch.load(existing(work / f"image_{kind}.pt", kind))["model"])
    parametrize.remove_parametrizations(model.class_embed, "weight", leave_parametrized=True)
    return model.requires_grad_(False).eval()


def export(work: Path, folder: Path) -> None:
    """Save the pipeline and the refiner in half precision with their settings, whole or not at all."""
    vq = trained_vq(work, "decoder")
    drafter, refiner = (trained_transformer(kind, work) for kind in ("drafter", "refiner"))
    with replacing_folder(folder) as new:
        scheduler = VARScheduler(PATCH_NUMS, top_k=GENERATE["top_k"], top_p=GENERATE["top_p"])
        pipe = VARPipeline(drafter.half(), vq.half(), scheduler, id2label=mini_pictures.class_names())
        pipe.save_pretrained(new)
        refiner.half().save_pretrained(new / "refiner")
        settings = {
            "about": "A mini image pair for draftdiff. `generate` holds the arguments to call the pipeline with.",
            "generate": GENERATE,
            "draft_scales": DRAFT_SCALES,
            "class_example": CLASSES[0].name,
            "words": {"shapes": list(SHAPES), "colours": list(COLOURS), "places": list(PLACES)},
            "training": {kind: spent(work / f"image_{kind}.pt") for kind in PHASES},
        }
        write_settings(new, settings)


def main() -> None:
    arguments = parser(__doc__, PHASES, minutes=12, threads=1).parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.phase == "export":
        export(arguments.work, WEIGHTS)
        load_mini_image(draft_scales=DRAFT_SCALES)
        print(f"exported {arguments.work} to {WEIGHTS}")
        return
    try:
        PHASES[arguments.phase](arguments.work).run(arguments.minutes)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command carries on from {arguments.work}") from None


if __name__ == "__main__":
    sys.exit(run(main, "train_mini_image"))
