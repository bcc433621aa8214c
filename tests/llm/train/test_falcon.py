"""Glancing distillation: its schedule, what is replaced, the loss by hand, and layers that get better."""

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import FalconDrafter, FalconTrainer, StaticTree, report
from draftdiff.llm.train.data import collate
from draftdiff.llm.train.falcon import GLANCING, draw, glance, glance_share, glanced_positions, guess
from tests.llm.generation import both
from tests.llm.tiny_heads import falcon
from tests.llm.tiny_models import prompt
from tests.llm.train.test_heads import arguments


def test_fewer_are_replaced_as_time_goes_on():
    assert [glance_share(x / 20) for x in (0, 10, 19)] == pytest.approx([0.45, 0.275, 0.1175])
    assert glance_share(0.0, "none") == 0
    assert [glance_share(x / 4, "paper") for x in (0, 1, 4)] == pytest.approx([0.4, 0.3, 0.0])
    with pytest.raises(UserError, match="glancing must be one of code, paper, none, got 'both'"):
        glance_share(0.0, "both")


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_which_positions_are_replaced(k):
    counted = torch.zeros(60, dtype=torch.bool)
    counted[7:50] = True
    generator = torch.Generator().manual_seed(0)
    starts, lengths = set(), set()
    for _ in range(300):
        found = glanced_positions(counted, 12.9, k, "paper", generator)
        assert found == list(range(found[0], found[0] + 12)) and found[0] >= 7 and found[-1] < 50
        starts.add(found[0])
        found = glanced_positions(counted, 12.9, k, "code", generator)
        assert len(set(found)) == len(found) and set(found) <= set(range(7, 50))
        on_grid = [position for position in found if (position - 7) % k == 0]
        assert len(on_grid) == (12 if k < 3 else 12 // k)
        lengths.add(len(found))
    assert starts == set(range(7, 39))
    assert lengths == ({12} if k < 3 else lengths) and max(lengths) <= max(12, 12 // k * (k - 1))
    assert k != 4 or len(lengths) > 3
    assert glanced_positions(counted, 0.9, k) == []
    assert len(glanced_positions(counted[:9], 5.0, 1, "paper")) == 2  # there are no more


def test_replaced_inputs_are_those_that_should_have_been_guessed():
    ids, states = torch.arange(20).repeat(2, 1), torch.arange(20.0)[None, :, None].repeat(2, 1, 3)
    glance(ids, states, 1, [4, 6, 9], 2)
    assert ids[0].tolist() == list(range(20)) and ids[1, [4, 6, 9]].tolist() == [6, 8, 11]
    assert states[1, [4, 6, 9], 0].tolist() == [6.0, 8.0, 11.0] and int((ids[1] != torch.arange(20)).sum()) == 3


def test_tokens_are_drawn_by_their_law():
    torch.manual_seed(0)
    law = torch.tensor([0.5, 0.3, 0.2, 0.0])
    shares = torch.bincount(draw(law.log().expand(20000, -1)), minlength=4) / 20000
    assert shares[3] == 0
    torch.testing.assert_close(shares, law, atol=0.02, rtol=0)  # six times the deviation of a share


@torch.no_grad()
def test_the_loss_of_an_evaluation_by_hand(target, written, tmp_path):
    head = falcon(target, k=2).head
    trainer = FalconTrainer(head, arguments(tmp_path), target=target, train_dataset=written)
    batch = collate([written[0], written[5]])
    total, count = 0.0, 0
    for row in (written[0], written[5]):
        ids = row["input_ids"][None]
        output = target(ids, output_hidden_states=True)
        states = output.hidden_states[-1]
        guessed, logits = guess(head, head, ids[:, 1:], states[:, :-1])
        for i in range(ids.shape[1] - 3):
            if not row["written"][i + 3]:
                continue
            gap = (guessed[0, i] - states[0, i + 2]).abs()
            smooth = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
            p, cold_p = output.logits[0, i + 2].softmax(-1), (output.logits[0, i + 2] / 0.95).softmax(-1)
            soft = (p * (cold_p / ((logits[0, i] / 0.95).softmax(-1) + 1e-8)).log()).sum()
            hard = -logits[0, i].log_softmax(-1)[ids[0, i + 3]]
            total, count = total + smooth + 0.1 * (0.9 * soft + 0.1 * hard), count + 1
    torch.testing.assert_close(trainer.compute_loss(head, batch), total / count, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("glancing", GLANCING)
def test_a_layer_gets_better_and_the_target_stays(glancing, target, written, tmp_path):
    torch.manual_seed(0)
    drafter = FalconDrafter.from_target(target, tree=StaticTree.from_widths((1, 1, 1, 1)))
    weights = {name: x.clone() for name, x in target.state_dict().items()}

    def accepted():
        plain, fast = both(target, drafter, prompt(4, batch=24), max_new_tokens=24)
        assert torch.equal(plain, fast)
        return report(drafter).tokens_per_forward

    before = accepted()
    drafter.fit(target, written, arguments(tmp_path, max_steps=120, learning_rate=1e-2), glancing=glancing)
    assert accepted() > before + 0.2
    assert all(torch.equal(target.state_dict()[name], x) for name, x in weights.items())
