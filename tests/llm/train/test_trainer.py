"""The trainer: its loss by hand, a frozen target, resumption, and drafts that come nearer to their target."""

import pytest
import torch
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, TrainingArguments

from draftdiff.llm.train.data import DistillationSet, collate, generate_distillation_set, packed_text
from draftdiff.llm.train.evaluate import evaluate_draft
from draftdiff.llm.train.losses import LOSSES, tvd
from draftdiff.llm.train.trainer import DraftTrainer
from draftdiff.llm.train.trim import trim
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def written(target):
    prompts = prompt(4, batch=16)
    return generate_distillation_set(target, prompts, max_new_tokens=24, temperatures=(0.0, 1.0), progress=False)


def arguments(folder, **options):
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        **options,
    }
    return TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1000, weight_decay=0.0, **options
    )


def everything_of(rows):
    """A set in which all tokens count."""
    return DistillationSet(rows, [torch.ones(len(row), dtype=torch.bool) for row in rows])


def test_the_loss_is_the_mean_over_written_tokens_of_both_kinds_of_rows(target, written, tmp_path):
    draft = tiny_model(layers=1, seed=1)
    trainer = DraftTrainer(draft, arguments(tmp_path), target=target, loss="tvd", train_dataset=written)
    text = packed_text(prompt(20)[0], 10)
    rows = [written[0], text[0], written[20], text[1]]
    with torch.no_grad():
        loss = trainer.compute_loss(draft, collate(rows)).item()
        total, tokens = 0.0, 0
        for row in rows:
            ids, counted = row["input_ids"], row["written"][1:]
            q, p = (model(ids[None]).logits[0, :-1] for model in (draft, target))
            cross_entropy = torch.nn.functional.cross_entropy(q, ids[1:], reduction="none")
            total += (tvd(q, p) if row["distil"] else cross_entropy)[counted].sum().item()
            tokens += int(counted.sum())
    assert loss == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_training_brings_the_draft_nearer_and_leaves_the_target_alone(loss, target, written, tmp_path):
    draft = tiny_model(layers=1, seed=1)
    before = evaluate_draft(target, draft, written, progress=False).acceptance
    weights = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    options = {"max_steps": 25, "per_device_train_batch_size": 16}
    DraftTrainer(draft, arguments(tmp_path, **options), target=target, loss=loss, train_dataset=written).train()
    assert evaluate_draft(target, draft.eval(), written, progress=False).acceptance > before + 0.02
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_cross_entropy_runs_without_a_target(written, tmp_path):
    draft = tiny_model(layers=1, seed=1)
    trainer = DraftTrainer(draft, arguments(tmp_path), loss="ce", train_dataset=written, eval_dataset=written)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(target, written, tmp_path):
    def run(folder, **options):
        draft = tiny_model(layers=1, seed=1)
        given = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = DraftTrainer(draft, given, target=target, loss="lk", train_dataset=written)
        trainer.train(**options)
        return draft

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_accumulated_batches_of_uneven_rows_take_the_step_of_one_and_it_is_the_token_mean(loss, target, tmp_path):
    uneven = everything_of([prompt(n, seed=n)[0] for n in (4, 60)])
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    steps = []
    for size, accumulated in ((2, 1), (1, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        draft = tiny_model(layers=1, seed=1)
        given = arguments(tmp_path, **options, **sizes)
        DraftTrainer(draft, given, target=target, loss=loss, train_dataset=uneven).train()
        steps.append(list(draft.parameters()))
    by_hand = tiny_model(layers=1, seed=1)
    for ids in uneven.ids:
        with torch.no_grad():
            p = target(ids[None]).logits[0, :-1]
        q = by_hand(ids[None]).logits[0, :-1]
        (LOSSES["kl"](q, p) if loss == "kl" else LOSSES["ce"](q, ids[1:])).sum().div(3 + 59).backward()
    for whole, accumulated, start in zip(*steps, by_hand.parameters()):
        torch.testing.assert_close(accumulated, whole, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(whole, start - 0.1 * start.grad, atol=1e-6, rtol=1e-4)


def test_the_loss_of_an_evaluation_is_the_token_mean_whatever_the_batch_size(target, tmp_path):
    draft, rows = tiny_model(layers=1, seed=1), [prompt(n, seed=n)[0] for n in (4, 40, 6, 60, 5)]
    uneven = everything_of(rows)
    losses = []
    for size in (1, 2, 5):
        given = arguments(tmp_path, per_device_eval_batch_size=size)
        trainer = DraftTrainer(draft, given, target=target, train_dataset=uneven, eval_dataset=uneven)
        losses += [trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]]
    with torch.no_grad():
        total = sum(tvd(*(m(row[None]).logits[0, :-1] for m in (draft, target))).sum().item() for row in rows)
    assert losses == pytest.approx([total / (sum(map(len, rows)) - len(rows))] * 6, rel=1e-5)


def test_metrics_and_predictions_see_the_drafts_logits_and_the_written_tokens(target, written, tmp_path):
    def compute_metrics(seen):
        right = seen.predictions[:, :-1].argmax(-1) == seen.label_ids[:, 1:]
        return {"agreement": right[seen.label_ids[:, 1:] != -100].mean()}

    draft = tiny_model(layers=1, seed=1)
    given = {"train_dataset": written, "eval_dataset": written, "compute_metrics": compute_metrics}
    trainer = DraftTrainer(draft, arguments(tmp_path), target=target, **given)
    agreement = evaluate_draft(target, draft, written, progress=False).agreement
    assert trainer.evaluate()["eval_agreement"] == pytest.approx(agreement)
    predicted = trainer.predict(written)
    assert predicted.predictions.shape == (len(written), 28, VOCABULARY)
    assert (predicted.label_ids[:, :4] == -100).all() and predicted.metrics["test_loss"] > 0


def test_rows_of_lists_and_a_padding_token_of_minus_one_train_too(target, tmp_path):
    draft = tiny_model(layers=1, seed=1)
    draft.config.pad_token_id = -1
    rows = [{"input_ids": [5] * n, "written": [True] * n, "distil": True} for n in (3, 7, 5, 4)]
    assert DraftTrainer(draft, arguments(tmp_path), target=target, train_dataset=rows).train().training_loss > 0


def test_the_result_is_a_plain_model_that_assists_generate(target, written, tmp_path):
    draft = tiny_model(layers=1, seed=1)
    trainer = DraftTrainer(draft, arguments(tmp_path), target=target, loss="tvd_pp", train_dataset=written)
    trainer.train()
    trainer.save_model(str(tmp_path / "draft"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    plain = target.generate(prompt(5), max_new_tokens=16, do_sample=False)
    assert torch.equal(target.generate(prompt(5), max_new_tokens=16, do_sample=False, assistant_model=again), plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_trimmed_draft_trains_too(loss, target, written, tmp_path):
    draft = trim(tiny_model(layers=1, seed=1), written, 40)
    both = ConcatDataset([written, packed_text(prompt(200)[0], 20)])
    trainer = DraftTrainer(draft, arguments(tmp_path, max_steps=2), target=target, loss=loss, train_dataset=both)
    assert trainer.train().training_loss < 50
    assert all(parameter.isfinite().all() for parameter in draft.parameters())


def test_vocabularies_padded_differently_are_compared_on_what_they_share(target, written, tmp_path):
    target = tiny_model(layers=1, vocab_size=128)
    draft = tiny_model(layers=1, vocab_size=192, seed=1)
    trainer = DraftTrainer(draft, arguments(tmp_path), target=target, loss="kl", train_dataset=written)
    batch = collate([written[0]])
    with torch.no_grad():
        q, p = (model(batch["input_ids"]).logits[0, :-1, :128] for model in (draft, target))
        expected = LOSSES["kl"](q, p)[batch["written"][0, 1:]].mean()
        torch.testing.assert_close(trainer.compute_loss(draft, batch), expected)


def test_mistakes_are_named_in_one_line(target, tmp_path):
    draft = tiny_model(layers=1)
    with pytest.raises(ValueError, match="one of kl, rkl, jsd, ce, tvd, tvd_pp, lk, got 'l2'"):
        DraftTrainer(draft, arguments(tmp_path), target=target, loss="l2")
    with pytest.raises(ValueError, match=f"vocabulary of 2000 tokens is not the target's of {VOCABULARY}"):
        DraftTrainer(tiny_model(vocab_size=2000), arguments(tmp_path), target=target)
    with pytest.raises(ValueError, match="loss 'tvd' compares with a target"):
        DraftTrainer(draft, arguments(tmp_path))
    with pytest.raises(ValueError, match=r"float32 or bfloat16 to train, got float16: call draft.float\(\) first"):
        DraftTrainer(tiny_model(layers=1).half(), arguments(tmp_path), target=target)
    with pytest.raises(ValueError, match="loss= names alone: leave label_smoothing_factor out"):
        DraftTrainer(draft, arguments(tmp_path, label_smoothing_factor=0.1), target=target)
    with pytest.raises(ValueError, match="leave compute_loss_func out"):
        DraftTrainer(draft, arguments(tmp_path), target=target, compute_loss_func=print)
