"""Medusa heads: their formula, the original's files, and files of our own."""

import json

import pytest
import torch
import torch.nn.functional as F

from draftdiff.errors import UserError
from draftdiff.llm import HydraDrafter, MedusaDrafter
from tests.llm.tiny_heads import medusa
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=2)


@torch.no_grad()
def test_the_originals_files_are_loaded_whatever_number_of_heads_the_config_says(target, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights, layers = {}, 2
    for head in range(3):
        linear = {"weight": torch.randn(64, 64, generator=generator), "bias": torch.randn(64, generator=generator)}
        for block in range(layers):  # one block under several names
            weights |= {f"{head}.{block}.linear.{name}": x for name, x in linear.items()}
        weights[f"{head}.{layers}.weight"] = torch.randn(VOCABULARY, 64, generator=generator)
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 5, "medusa_num_layers": layers}))
    torch.save(weights, tmp_path / "medusa_lm_head.pt")
    heads = MedusaDrafter.from_pretrained(tmp_path, target).heads
    hidden = torch.randn(2, 7, 64)
    found = heads(hidden, prompt(7, batch=2))
    assert len(found) == 3
    for head, logits in enumerate(found):
        x = hidden[:, : 6 - head]
        for _ in range(layers):
            x = x + F.silu(x @ weights[f"{head}.0.linear.weight"].T + weights[f"{head}.0.linear.bias"])
        torch.testing.assert_close(logits, x @ weights[f"{head}.{layers}.weight"].T)


def test_saved_heads_are_loaded_with_their_tree_and_not_as_others(target, tmp_path):
    drafter = medusa(target)
    drafter.save_pretrained(tmp_path / "heads")
    again = MedusaDrafter.from_pretrained(tmp_path / "heads", target)
    assert again.tree.paths == drafter.tree.paths
    for name, weight in drafter.heads.state_dict().items():
        assert torch.equal(weight, again.heads.state_dict()[name])
    with pytest.raises(UserError, match="holds heads of 'medusa', not of 'hydra'"):
        HydraDrafter.from_pretrained(tmp_path / "heads", target)
