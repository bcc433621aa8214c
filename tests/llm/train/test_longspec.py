"""Training a LongSpec layer: the loss by hand, a layer that gets better, and far positions for any heads."""

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import (
    AnchorOffset,
    HeadsTrainer,
    LongSpecDrafter,
    LongSpecTrainer,
    report,
)
from draftdiff.llm.train.data import collate
from draftdiff.llm.train.losses import LOSSES
from tests.llm.generation import both
from tests.llm.tiny_heads import hydra, longspec
from tests.llm.tiny_models import prompt
from tests.llm.train.test_heads import arguments


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_loss_of_far_positions_is_that_of_layer_and_target_there(loss, target, written, tmp_path):
    drafter = longspec(target)
    trainer = LongSpecTrainer(drafter.head, arguments(tmp_path), target=target, loss=loss, train_dataset=written)
    torch.manual_seed(0)
    batch = AnchorOffset(reach=500)([written[0], written[1]])
    places, ids = batch["position_ids"], batch["input_ids"]
    assert int(places.max()) > 28
    with torch.no_grad():
        found = trainer.compute_loss(drafter.head, batch)  # in eval mode, so that the lag is 1
        output = target(ids, position_ids=places, attention_mask=torch.ones_like(ids), use_cache=True)
        layer = (getattr(output, "cache", None) or output.past_key_values).layers[-1]
        q = drafter.head.logits(drafter.head(ids, places, layer.keys, layer.values, 1))[:, :-1]
        each = LOSSES["ce"](q, ids[:, 1:]) if loss == "ce" else LOSSES[loss](q, output.logits[:, :-1])
    torch.testing.assert_close(found, each[batch["written"][:, 1:]].mean())


def test_a_layer_gets_better_and_the_target_stays(target, written, tmp_path):
    torch.manual_seed(0)
    drafter = LongSpecDrafter.from_target(target, window=8)
    weights = {name: x.clone() for name, x in target.state_dict().items()}
    ids = prompt(4, batch=24)

    def accepted():
        plain, fast = both(target, drafter, ids, max_new_tokens=24)
        assert torch.equal(plain, fast)
        return report(drafter).tokens_per_forward

    before = accepted()
    drafter.fit(target, written, arguments(tmp_path, max_steps=80, learning_rate=1e-2), most_lag=3)
    assert accepted() > before + 0.3
    assert all(torch.equal(target.state_dict()[name], x) for name, x in weights.items())


def test_hydra_heads_learn_at_far_positions_too(target, written, tmp_path):
    heads = hydra(target, prefix=True).heads
    collator = AnchorOffset(reach=500)
    trainer = HeadsTrainer(
        heads, arguments(tmp_path), target=target, loss="ce", train_dataset=written, data_collator=collator
    )
    torch.manual_seed(0)
    batch = collator([written[0], written[1]])
    with torch.no_grad():
        far, near = (trainer.compute_loss(heads, one) for one in (batch, collate([written[0], written[1]])))
        output = target(
            batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
        guesses = heads(output.hidden_states[-1], batch["input_ids"], None, batch["position_ids"])
        by_hand = 0
        for head, q in enumerate(guesses):
            counted = batch["written"][:, head + 2 :]
            by_hand += LOSSES["ce"](q[:, :-1], batch["input_ids"][:, head + 2 :])[counted].mean()
    torch.testing.assert_close(far, by_hand)
    assert float((far - near).abs()) > 1e-3
    trainer.train()


def test_a_lag_of_nothing_is_refused(target, written, tmp_path):
    with pytest.raises(UserError, match="most_lag must be at least 1, got 0"):
        LongSpecTrainer(longspec(target).head, arguments(tmp_path), target=target, most_lag=0, train_dataset=written)
