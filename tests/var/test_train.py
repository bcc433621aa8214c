"""CoDe's losses against their definitions, and that the specialised models are better at what they will do."""

import copy

import pytest
import torch

from draftdiff.var.train import Recipe, drafter_loss, refiner_loss, specialise_drafter, specialise_refiner
from tests.var import tiny

FAST = Recipe(learning_rate=3e-3, weight_decay=0.0)


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        small = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
        labels = torch.randint(5, (8,), generator=generator)
        small[:, 0] = labels[:, None, None] / 2 - 1  # the class shows
        yield torch.nn.functional.interpolate(small, scale_factor=4), labels


def test_the_drafters_loss_is_the_mean_cross_entropy():
    logits, indices = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = -logits.log_softmax(-1).gather(-1, indices[..., None]).mean()
    torch.testing.assert_close(drafter_loss(logits, indices), expected)


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_the_refiners_loss_forgets_the_drafted_scales_linearly(progress, weight):
    logits, teacher = torch.randn(2, 6, 7), torch.randn(2, 6, 7)
    p, q = logits.softmax(-1), teacher.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    expected = (weight * divergence[:, :4].sum() + divergence[:, 4:].sum()) / 12
    torch.testing.assert_close(refiner_loss(logits, teacher, 4, progress), expected)
    assert refiner_loss(logits, logits, 4, progress).abs() < 1e-6


def nats_of_drafted_scales(model, vae, drafted):
    pictures, labels = next(iter(batches()))
    with torch.no_grad():
        indices = vae.encode(pictures)
        logits = model(vae.quantize.teacher_inputs(indices), labels).sample[:, : model.starts[drafted]]
        return drafter_loss(logits, torch.cat(indices, dim=1)[:, : model.starts[drafted]]).item()


def divergence_after(model, teacher, vae, drafted):
    pictures, labels = next(iter(batches()))
    with torch.no_grad():
        inputs = vae.quantize.teacher_inputs(vae.encode(pictures))
        return refiner_loss(model(inputs, labels).sample, teacher(inputs, labels).sample, model.starts[drafted], 1.0)


def test_a_specialised_drafter_predicts_the_drafted_scales_better():
    drafter, vae = tiny.transformer(), tiny.vq_model()
    before = nats_of_drafted_scales(drafter, vae, 3)
    losses = specialise_drafter(drafter, vae, list(batches()), 3, steps=40, recipe=FAST)
    assert len(losses) == 40 and not drafter.training
    assert nats_of_drafted_scales(drafter, vae, 3) < 0.8 * before


def test_a_specialised_refiner_comes_closer_to_its_teacher_on_the_scales_that_it_draws():
    teacher, refiner, vae = tiny.transformer(0), tiny.transformer(7, num_layers=1), tiny.vq_model()
    untouched = copy.deepcopy(teacher.state_dict())
    before = divergence_after(refiner, teacher, vae, 3)
    specialise_refiner(refiner, teacher, vae, list(batches()), 3, steps=40, recipe=FAST)
    assert divergence_after(refiner, teacher, vae, 3) < 0.7 * before
    assert all(torch.equal(a, b) for a, b in zip(untouched.values(), teacher.state_dict().values()))


def test_training_that_cannot_be_is_named():
    drafter, vae = tiny.transformer(), tiny.vq_model()
    with pytest.raises(ValueError, match="draft_scales must be a whole number from 1 to 5, got 6"):
        specialise_drafter(drafter, vae, batches(), 6, steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        specialise_drafter(drafter, vae, batches(), 2, steps=0)
    with pytest.raises(ValueError, match="no batches"):
        specialise_drafter(drafter, vae, [], 2, steps=1)
    with pytest.raises(ValueError, match="the same vocab_size"):
        specialise_refiner(tiny.transformer(vocab_size=64), drafter, vae, batches(), 2, steps=1)
