"""A model that copies before it is trained."""

import pytest
import torch

from draftdiff.llm.train.copying import copying_model


@pytest.mark.parametrize(
    ("width", "layers", "length", "share"), [(128, 4, 24, 0.8), (128, 2, 150, 0.6), (64, 2, 24, 0.5)]
)
def test_what_was_said_is_said_again_from_the_start(width, layers, length, share):
    torch.manual_seed(0)
    model = copying_model(width, layers, 2 * width, 512, 512).eval()
    once = torch.stack([torch.randperm(511)[:length] + 1 for _ in range(8)])
    ids = torch.cat([once, once], 1)
    with torch.no_grad():
        guessed = model(ids[:, :-1]).logits[:, length:].argmax(-1)
    assert (guessed == ids[:, length + 1 :]).float().mean() > share


def test_the_circuit_leaves_half_the_heads_and_all_gradients_alone():
    torch.manual_seed(0)
    model = copying_model(128, 2, 64, 100, 64)
    ids = torch.randint(1, 100, (2, 20))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight[64:].std() > 0.01
