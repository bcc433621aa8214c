"""Scores from one forward of each model: what the decoding loop then really does."""

import pytest
import torch

from draftdiff.llm import Chain, ModelDrafter, report, speculative
from draftdiff.llm.train.data import DistillationSet, generate_distillation_set
from draftdiff.llm.train.evaluate import chain_rounds, evaluate_draft
from tests.llm.tiny_models import prompt, tiny_model


def near(model, noise=0.05):
    """A draft that often agrees: the model itself with disturbed weights."""
    draft = tiny_model(layers=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter, original in zip(draft.parameters(), model.parameters()):
            scale = noise * original.std() if original.numel() > original.shape[-1] else 0.0
            parameter.copy_(original + scale * torch.randn(original.shape, generator=generator))
    return draft


def test_rounds_end_with_a_token_of_the_targets():
    def rounds(hits, length=2):
        return chain_rounds(torch.tensor([hit == "x" for hit in hits], dtype=torch.bool), length)

    assert [rounds(hits) for hits in ("", "-", "x", "x-", "xx", "xxx", "xxxx", "-x-xx-")] == [0, 1, 1, 1, 1, 1, 2, 3]
    assert rounds("xxxxxx", length=1) == 3


def test_a_draft_that_is_its_target_is_always_right():
    target = tiny_model(layers=2)
    written = generate_distillation_set(
        target, prompt(5, batch=3), max_new_tokens=20, temperatures=(0,), progress=False
    )
    scores = evaluate_draft(target, target, written, length=4, progress=False)
    assert (scores.acceptance, scores.agreement) == (pytest.approx(1.0), 1.0)
    assert (scores.block_efficiency, scores.tokens, scores.length) == (5.0, 60, 4)


def test_greedy_scores_are_what_the_loop_reaches():
    target = tiny_model(layers=2)
    draft, ids, new = near(target), prompt(6), 64
    written = generate_distillation_set(target, ids, max_new_tokens=new, temperatures=(0,), progress=False)
    scores = evaluate_draft(target, draft, written, length=3, progress=False)
    assert 0.3 < scores.agreement < 1
    drafter = ModelDrafter(draft, Chain(3))
    given = {"custom_generate": speculative, "drafter": drafter, "pace": None}
    out = target.generate(ids, max_new_tokens=new, do_sample=False, **given)
    assert torch.equal(out[0], written[0]["input_ids"])
    assert report(drafter).tokens_per_forward == pytest.approx(scores.block_efficiency, rel=0.05)


def test_acceptance_is_over_written_tokens_only():
    target, draft = tiny_model(layers=2), tiny_model(layers=1, seed=1)
    ids = prompt(10)[0]
    written = torch.arange(10) >= 6
    with torch.no_grad():
        p, q = (model(ids[None]).logits[0].softmax(-1) for model in (target, draft))
    scores = evaluate_draft(target, draft, DistillationSet([ids], [written]), progress=False)
    assert scores.tokens == 4
    assert scores.acceptance == pytest.approx(torch.minimum(p, q).sum(-1)[5:9].mean().item())
    assert scores.agreement == pytest.approx((q.argmax(-1)[5:9] == ids[6:]).float().mean().item())


def test_a_draft_in_train_mode_is_scored_without_dropout_and_stays_in_train_mode():
    target, draft = tiny_model(layers=2), tiny_model(layers=1, seed=1)
    text = DistillationSet([prompt(30)[0]], [torch.ones(30, dtype=torch.bool)])
    expected = evaluate_draft(target, draft, text, progress=False)
    draft.model.layers[0].self_attn.attention_dropout = 0.5  # what a Trainer leaves on
    assert evaluate_draft(target, draft.train(), text, progress=False) == expected
    assert draft.training and not target.training


def test_a_dataset_without_written_tokens_is_refused():
    model = tiny_model(layers=1)
    with pytest.raises(ValueError, match="must have written tokens"):
        evaluate_draft(model, model, DistillationSet([prompt(4)[0]], [torch.zeros(4).bool()]), progress=False)
