"""Specialised fine-tuning (CoDe, arXiv 2411.17787, section 3.4) on the mini image pair: what does it gain?

Fine-tunes copies of the shipped drafter and refiner for one number of drafted scales with `draftdiff.var.train`, and
compares before and after: both losses on pictures that neither has seen, and the judge's accuracy of collaborative
decoding from the same seeds, with the p-value of McNemar's exact test:

    python samples/training/specialise_mini_image.py --draft-scales 4 --per-class 1 --json results.json

The shipped pair itself stays as it is: it serves every number of drafted scales, and plain VAR too.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from score_mini_image import generate, wilson_interval
from torch import Tensor

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, new_file
from draftdiff.pipelines.mini.image import load_mini_image, load_mini_refiner, mini_image_defaults
from draftdiff.pipelines.mini.picture_judge import judge
from draftdiff.pipelines.mini.pictures import CLASSES, random_pictures
from draftdiff.var.collaborative import check_draft_scales
from draftdiff.var.train import Recipe, specialise_drafter, specialise_refiner
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel

# The paper's rates are for ImageNet models and 1024 pictures a batch; these models are 500 times smaller. Rates of 1e-4
# and 5e-4 at half the batch made the drafter worse and the refiner no better.
DRAFTER_RECIPE = Recipe(learning_rate=1e-5, weight_decay=0.08)
REFINER_RECIPE = Recipe(learning_rate=2e-4, weight_decay=0.0)


def random_pictures_and_labels(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """New pictures [count, 3, 64, 64] in [-1, 1] and labels int64 [count]."""
    labels = rng.integers(len(CLASSES), size=count)
    pictures = torch.from_numpy(random_pictures(labels.tolist(), rng))
    return pictures.permute(0, 3, 1, 2) * 2 - 1, torch.from_numpy(labels)


def fresh_batches(batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of new pictures and labels."""
    rng = np.random.default_rng(seed)
    while True:
        yield random_pictures_and_labels(rng, batch)


@torch.no_grad()
def held_out_losses(
    model: VARTransformer2DModel,
    teacher: VARTransformer2DModel | None,
    vae: VQModel,
    pictures: Tensor,
    labels: Tensor,
    draft_scales: int,
) -> np.ndarray:
    """Per picture: a drafter's cross-entropy over the drafted scales, or, with a teacher, a refiner's divergence
    KL(refiner || teacher) over the others."""
    drafted, losses = model.starts[draft_scales], []
    for some, classes in zip(pictures.split(40), labels.split(40)):
        indices = vae.encode(some)
        inputs = vae.quantize.teacher_inputs(indices)
        log_p = model(inputs, classes).sample.log_softmax(-1)
        if teacher is None:
            wanted = torch.cat(indices, dim=1)[:, :drafted, None]
            losses.append(-log_p[:, :drafted].gather(-1, wanted).mean((1, 2)))
        else:
            log_p, log_q = log_p[:, drafted:], teacher(inputs, classes).sample[:, drafted:].log_softmax(-1)
            losses.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(1))
    return torch.cat(losses).numpy()


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided exact p-value that two judgements (bool) of the same trials differ by chance (McNemar 1947)."""
    only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
    differing = only_before + only_after
    tail = sum(math.comb(differing, i) for i in range(min(only_before, only_after) + 1))
    return min(1.0, 2 * tail / 2**differing)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="specialise_mini_image", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--draft-scales", type=int, default=4, help="scales that the drafter draws (default 4)")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, for each model (default 200)")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step (default 32)")
    parser.add_argument("--per-class", type=int, default=4, help="pictures of each class to judge (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of training pictures and of scored ones (default 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=new_file(), help="also write the scores to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    pipe, refiner = load_mini_image(), load_mini_refiner()
    try:
        check_draft_scales(arguments.draft_scales, len(pipe.scheduler))
    except ValueError as error:
        parser.error(str(error))
    pipe.set_progress_bar_config(disable=True)
    vae, teacher = pipe.vae.requires_grad_(False), pipe.transformer
    drafter, specialised = copy.deepcopy(teacher), copy.deepcopy(refiner)
    sizes: dict[str, Any] = {"draft_scales": arguments.draft_scales, "steps": arguments.steps}
    batches = fresh_batches(arguments.batch, arguments.seed)
    specialise_drafter(drafter, vae, batches, recipe=DRAFTER_RECIPE, **sizes)
    specialise_refiner(specialised, teacher, vae, batches, recipe=REFINER_RECIPE, **sizes)

    rows: list[dict[str, Any]] = []
    held_out = random_pictures_and_labels(np.random.default_rng(arguments.seed + 10**6), 480)
    print(f"N={arguments.draft_scales}, {arguments.steps} steps of {arguments.batch} pictures; losses on 480 others")
    for name, before, after in (
        ("drafter: cross-entropy of drafted scales", teacher, drafter),
        ("refiner: divergence of refined scales", refiner, specialised),
    ):
        losses = [
            held_out_losses(model, teacher if before is refiner else None, vae, *held_out, arguments.draft_scales)
            for model in (before, after)
        ]
        gain = losses[0] - losses[1]
        spread = 1.96 * float(gain.std()) / math.sqrt(len(gain))
        means = [float(loss.mean()) for loss in losses]
        rows.append({"loss": name, "before": means[0], "after": means[1], "gain": float(gain.mean()), "spread": spread})
        print(f"{name:<42}{means[0]:>8.4f} -> {means[1]:.4f}   gain {gain.mean():.4f} +- {spread:.4f} (95%)")

    labels, call = list(range(len(CLASSES))) * arguments.per_class, mini_image_defaults()["generate"]
    pairs = {
        "as shipped": (teacher, refiner),
        "refiner specialised": (teacher, specialised),
        "both specialised": (drafter, specialised),
    }
    right: dict[str, np.ndarray] = {}
    for name, (first, second) in pairs.items():
        pipe.register_modules(transformer=first)
        pipe.enable_collaborative(second, arguments.draft_scales)
        pictures = generate(pipe, labels, 20, arguments.seed, **call)
        right[name] = np.array([judge(picture).shows(label) for picture, label in zip(pictures, labels)])

    print(f"accuracy of collaborative decoding, {len(labels)} pictures")
    for name, shown in right.items():
        low, high = wilson_interval(float(shown.mean()), len(shown))
        p_value = mcnemar(right["as shipped"], shown)
        rows.append({"pair": name, "accuracy": float(shown.mean()), "interval": [low, high], "p_value": p_value})
        print(f"{name:<22}{shown.mean():>8.1%}   95% interval {low:.1%} - {high:.1%}   p against shipped {p_value:.3g}")
    if arguments.json:
        report = {**sizes, "batch": arguments.batch, "pictures": len(labels), "call": call, "rows": rows}
        write_json(arguments.json, report)


if __name__ == "__main__":
    sys.exit(run(main, "specialise_mini_image"))
