"""Specialised fine-tuning of a drafter and a refiner for collaborative decoding (CoDe, arXiv 2411.17787, section 3.4).

The drafter sees only the scales it will draw; the refiner learns from a large teacher, first all scales, in the end
only those that it will draw. The authors released the result but not the code; losses and schedules are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from draftdiff.errors import UserError
from draftdiff.var.collaborative import check_draft_scales, check_pair
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """learning_rate, weight_decay: of AdamW.  label_dropout: share of labels replaced by no class, for guidance.
    clip: largest norm of the gradient.
    """

    learning_rate: float
    weight_decay: float
    label_dropout: float = 0.1
    clip: float = 2.0


# The paper's, for ImageNet models at a batch of 1024: 5 and 25 % of the epochs of the original training.
DRAFTER_RECIPE = Recipe(learning_rate=1e-6, weight_decay=0.08)
REFINER_RECIPE = Recipe(learning_rate=1e-5, weight_decay=0.0)


def drafter_loss(logits: Tensor, indices: Tensor) -> Tensor:
    """Cross-entropy over the drafted scales: logits [batch, tokens, vocabulary], indices int64 [batch, tokens]."""
    return F.cross_entropy(logits.float().flatten(0, 1), indices.flatten())


def refiner_loss(logits: Tensor, teacher_logits: Tensor, drafted_tokens: int, progress: float) -> Tensor:
    """KL(refiner || teacher), a mean over all tokens: those after the drafted scales count 1, the drafted ones
    1 - progress.

    logits, teacher_logits: [batch, tokens, vocabulary].  progress: through the training, 0 to 1.
    """
    log_p, log_q = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    weights = torch.ones(divergence.shape[1], device=divergence.device)
    weights[:drafted_tokens] = 1 - progress
    return (divergence * weights).mean()


def specialise_drafter(
    drafter: VARTransformer2DModel,
    vae: VQModel,
    batches: Batches,
    draft_scales: int,
    *,
    steps: int,
    recipe: Recipe = DRAFTER_RECIPE,
) -> list[float]:
    """Fine-tune a drafter in place on scales 0 to draft_scales - 1; returns the loss of every step.

    batches: (pictures [batch, 3, height, width] in [-1, 1], class labels int64 [batch]), repeated if there are too few.
    Raises ValueError for a draft_scales out of range, no step or no batch.
    """
    check_draft_scales(draft_scales, len(drafter.config.patch_nums))
    drafted_tokens = drafter.starts[draft_scales]

    def loss(pictures: Tensor, labels: Tensor, _progress: float) -> Tensor:
        indices, inputs = _encode(vae, pictures, drafter.config.patch_nums)
        given = inputs[:, : drafted_tokens - 1] if draft_scales > 1 else None
        logits = drafter(given, labels).sample
        return drafter_loss(logits, indices[:, :drafted_tokens])

    return _train(drafter, loss, batches, steps, recipe, "drafter")


def specialise_refiner(
    refiner: VARTransformer2DModel,
    teacher: VARTransformer2DModel,
    vae: VQModel,
    batches: Batches,
    draft_scales: int,
    *,
    steps: int,
    recipe: Recipe = REFINER_RECIPE,
) -> list[float]:
    """Fine-tune a refiner in place towards a teacher (a drafter not yet fine-tuned); see specialise_drafter."""
    check_pair(teacher, refiner, draft_scales)
    drafted_tokens = refiner.starts[draft_scales]
    teacher.eval()

    def loss(pictures: Tensor, labels: Tensor, progress: float) -> Tensor:
        _, inputs = _encode(vae, pictures, refiner.config.patch_nums)
        with torch.no_grad():
            wanted = teacher(inputs, labels).sample
        return refiner_loss(refiner(inputs, labels).sample, wanted, drafted_tokens, progress)

    return _train(refiner, loss, batches, steps, recipe, "refiner")


@torch.no_grad()
def _encode(vae: VQModel, pictures: Tensor, patch_nums: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Indices [batch, tokens] of all scales, and what predicts those after the first [batch, tokens - 1, channels]."""
    indices = vae.encode(pictures.to(vae.device, vae.dtype), patch_nums)
    return torch.cat(indices, dim=1), vae.quantize.teacher_inputs(indices, patch_nums)


def _train(
    model: VARTransformer2DModel,
    loss: Callable[[Tensor, Tensor, float], Tensor],
    batches: Batches,
    steps: int,
    recipe: Recipe,
    name: str,
) -> list[float]:
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    losses: list[float] = []
    source = _repeated(batches)
    model.train()
    for step in (bar := tqdm(range(steps), desc=name, leave=False)):
        pictures, labels = next(source)
        dropped = torch.rand(len(labels)) < recipe.label_dropout
        labels = labels.masked_fill(dropped.to(labels.device), model.config.num_classes).to(model.device)
        value = loss(pictures, labels, step / max(steps - 1, 1))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(value.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    model.eval()
    return losses


def _repeated(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UserError("there are no batches left to train on")
