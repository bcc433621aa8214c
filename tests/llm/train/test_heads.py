"""Training heads: the loss by hand, a frozen target, heads that get better, and acceptance by rank as it is reached."""

import pytest
import torch
from transformers import TrainingArguments

from draftdiff.errors import UserError
from draftdiff.llm import (
    HeadsTrainer,
    HydraDrafter,
    MedusaDrafter,
    StaticTree,
    packed_text,
    rank_acceptance,
    report,
)
from draftdiff.llm.heads.hydra import HydraHeads
from draftdiff.llm.train.data import DistillationSet, collate
from draftdiff.llm.train.losses import LOSSES
from tests.llm.generation import both
from tests.llm.tiny_heads import hydra, medusa
from tests.llm.tiny_models import prompt, tiny_model


def arguments(folder, **options):
    given = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "save_strategy": "no"} | options
    return TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, weight_decay=0.0, **given)


@pytest.mark.parametrize("loss", ["ce", "kl", "tvd"])
def test_the_loss_adds_each_heads_mean_over_the_positions_that_it_guesses(loss, target, written, tmp_path):
    heads = hydra(target, prefix=True).heads
    trainer = HeadsTrainer(heads, arguments(tmp_path), target=target, loss=loss, train_dataset=written)
    text = packed_text(prompt(20)[0], 10)  # plain text: learned by its tokens whatever the loss
    rows = [written[0], text[0], written[3]]
    sums, counts = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for row in rows:
            ids = row["input_ids"][None]
            output = target(ids, output_hidden_states=True)
            for head, q in enumerate(heads(output.hidden_states[-1], ids)):
                counted = row["written"][head + 2 :]
                q, labels, p = q[0, :-1], ids[0, head + 2 :], output.logits[0, head + 1 : -1]
                compares = row["distil"] and loss != "ce"
                each = LOSSES[loss](q, p) if compares else LOSSES["ce"](q, labels)
                sums[head] += each[counted].sum()
                counts[head] += counted.sum()
        found = trainer.compute_loss(heads, collate(rows))
    torch.testing.assert_close(found, (sums / counts).sum())


def test_accumulated_uneven_batches_take_the_step_of_one_and_evaluation_is_the_same_mean(target, tmp_path):
    rows = [prompt(n, seed=n)[0] for n in (4, 30)]
    uneven = DistillationSet(rows, [torch.ones(len(row), dtype=torch.bool) for row in rows])
    steps, losses = [], []
    for size, accumulated in ((2, 1), (1, 2)):
        heads = hydra(target).heads
        options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        given = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            per_device_eval_batch_size=size,
            **options,
        )
        trainer = HeadsTrainer(heads, given, target=target, train_dataset=uneven, eval_dataset=uneven)
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        steps.append(list(heads.parameters()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for whole, parts in zip(*steps):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"layers": 4, "prefix": True}, {"rank": 32, "own_output": False}], ids=["Hydra", "Hydra++", "small"]
)
def test_heads_get_better_and_the_target_stays(options, target, written, tmp_path):
    drafter = HydraDrafter.from_target(target, heads=2, **options)
    weights = {name: x.clone() for name, x in target.state_dict().items()}
    before = rank_acceptance(drafter.heads, target, written, ranks=1)
    given = arguments(tmp_path, max_steps=80, learning_rate=1e-2)
    HeadsTrainer(drafter.heads, given, target=target, train_dataset=written).train()
    after = rank_acceptance(drafter.heads, target, written, ranks=1)
    assert (after > before + 0.1).all()
    assert all(torch.equal(target.state_dict()[name], x) for name, x in weights.items())
    assert all(p.grad is None for p in target.parameters())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(target, written, tmp_path):
    def run(**options):
        torch.manual_seed(0)
        heads = HydraHeads.from_target(target, heads=2, rank=8)
        given = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        HeadsTrainer(heads, given, target=target, train_dataset=written).train(**options)
        return heads.state_dict()

    whole = run()
    for name, x in run(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).items():
        torch.testing.assert_close(whole[name], x)


@pytest.mark.parametrize("make", [hydra, medusa])
def test_acceptance_by_rank_is_what_greedy_speculation_reaches_on_the_targets_own_text(make, target):
    drafter = make(target, tree=StaticTree.from_widths((3,)))
    ids = prompt(4, batch=16)
    plain, fast = both(target, drafter, ids, max_new_tokens=24)
    assert torch.equal(plain, fast)
    rounds = report(drafter)
    written = torch.arange(28) >= 4
    dataset = DistillationSet(list(plain), [written] * 16)
    shares = rank_acceptance(drafter.heads, target, dataset, ranks=3)
    assert shares.shape == (3, 3) and ((shares >= 0) & (shares <= 1)).all()
    # Rounds begin at some of the positions only.
    assert rounds.acceptance[0] == pytest.approx(float(shares[0].sum()), abs=0.1)
    with pytest.raises(UserError, match="dataset must have written tokens 4 after the first of a row, got none"):
        rank_acceptance(drafter.heads, target, DistillationSet([plain[0, :4]], [torch.ones(4, dtype=torch.bool)]))


def test_mistakes_are_named_in_one_line(target, written, tmp_path):
    heads = MedusaDrafter.from_target(target, heads=1).heads
    with pytest.raises(UserError, match=r"\(64, 2, 96\), LlamaForCausalLM has \(64, 1, 96\)"):
        HeadsTrainer(heads, arguments(tmp_path), target=tiny_model(layers=1), train_dataset=written)
    with pytest.raises(UserError, match="float32 or bfloat16 to train, got float16"):
        HeadsTrainer(heads.half(), arguments(tmp_path), target=target, train_dataset=written)
