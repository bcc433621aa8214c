"""Hydra heads: what each reads, the original's files, and files of our own."""

import json

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import HydraDrafter, StaticTree
from draftdiff.llm.heads.hydra import HydraHeads
from tests.llm.tiny_heads import hydra
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=2)


@pytest.mark.parametrize("prefix", [False, True])
@torch.no_grad()
def test_a_head_reads_the_tokens_up_to_the_one_it_guesses_and_nothing_later(target, prefix):
    heads = hydra(target, prefix=prefix).heads
    ids = prompt(12)
    hidden = torch.randn(1, 12, 64)
    before = heads(hidden, ids)
    place = 7
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % VOCABULARY
    for head, (was, now) in enumerate(zip(before, heads(hidden, other))):
        changed = (was != now).any(-1)[0].nonzero().flatten().tolist()
        assert changed == list(range(place - head - 1, place))  # position t reads tokens t + 1 to t + head + 1
    hidden[0, place] += 1
    for was, now in zip(before, heads(hidden, ids)):
        changed = (was != now).any(-1)[0].nonzero().flatten().tolist()
        assert changed == (list(range(place, was.shape[1])) if prefix else [place])


def test_new_heads_begin_as_the_targets_output_layer(target):
    heads = HydraHeads.from_target(target, heads=2, layers=3)
    hidden, ids = torch.randn(2, 5, 64), prompt(5, batch=2)
    for head, logits in enumerate(heads(hidden, ids)):
        torch.testing.assert_close(logits, target.lm_head(hidden[:, : 4 - head]))
    shared = HydraHeads.from_target(target, heads=2, rank=4, own_output=False)
    assert sum(p.numel() for p in shared.parameters()) < 4000 < 64 * VOCABULARY
    torch.testing.assert_close(shared(hidden, ids)[0], target.lm_head(hidden[:, :4]))
    gqa = HydraHeads.from_target(target, prefix=True)
    assert gqa.prefix.layers[0].self_attn.k_proj.weight.shape == (32, 64)


@pytest.mark.parametrize("options", [{"layers": 4, "prefix": True}, {"rank": 3, "own_output": False}], ids=str)
def test_saved_heads_are_loaded_with_their_tree(target, options, tmp_path):
    drafter = hydra(target, **options)
    drafter.save_pretrained(tmp_path / "heads")
    again = HydraDrafter.from_pretrained(tmp_path / "heads", target)
    assert again.tree.paths == drafter.tree.paths and again.heads.settings == drafter.heads.settings
    for name, weight in drafter.heads.state_dict().items():
        assert torch.equal(weight, again.heads.state_dict()[name])
    other = StaticTree([[0]])
    assert HydraDrafter.from_pretrained(tmp_path / "heads", target, other).tree is other
    with pytest.raises(FileExistsError):
        drafter.save_pretrained(tmp_path / "heads")


def published(heads, prefix):
    """(config, weights) as the original writes them."""
    first, lm = ("1", "1.") if prefix else ("0", "")
    weights = {"input_embed_fn.weight": torch.zeros(VOCABULARY, 64)}
    for name, x in heads.state_dict().items():
        part, head, rest = name.split(".", 2)
        if part == "first":
            name = f"hydra_mlp.{head}.{first}.{rest.replace('residual', 'res_connection')}"
        elif part == "further":
            for block in ("3", "5") if prefix else ("1", "2"):
                weights[f"hydra_mlp.{head}.{block}.{rest}"] = x
            continue
        elif part == "outputs":
            name = f"hydra_lm_head.{head}.{lm}{rest}"
        else:
            name = name.replace("prefix.", "prefix_embeding_layer.")
        weights[name] = x
    config = {"hydra_num_heads": 3, "hydra_num_layers": 3, "grounded_heads": True, "hidden_state_offset": 0}
    return config | {"hydra_head_arch": "prefix-mlp" if prefix else "mlp"}, weights


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "hydra_lm_head.pt")


@pytest.mark.parametrize("prefix", [False, True])
def test_the_originals_files_are_loaded_and_leave_the_targets_embedding_alone(target, prefix, tmp_path):
    heads = hydra(target, layers=3, prefix=prefix).heads
    embedding = target.get_input_embeddings().weight.clone()
    write(tmp_path, *published(heads, prefix))
    again = HydraDrafter.from_pretrained(tmp_path, target).heads
    ids, hidden = prompt(6), torch.randn(1, 6, 64)
    for ours, theirs in zip(heads(hidden, ids), again(hidden, ids)):
        assert torch.equal(ours, theirs)
    assert torch.equal(target.get_input_embeddings().weight, embedding)


def test_files_of_other_heads_and_damaged_ones_are_refused_in_one_line(target, tmp_path):
    config, weights = published(hydra(target, layers=3).heads, False)
    one = next(name for name in weights if name.startswith("hydra_mlp.0.2"))
    cases = (
        ({"hydra_head_arch": "eagle-attn"}, {}, "hydra_head_arch must be mlp or prefix-mlp, got 'eagle-attn'"),
        ({"grounded_heads": False}, {}, "grounded_heads must be True, got False"),
        ({"hydra_num_heads": 2}, {}, "unknown weight first.2"),
        ({"hydra_num_heads": "many"}, {}, "heads must be a whole number from 1 on, got 'many'"),
        ({}, {one: torch.zeros(64, 64)}, "weights that are to be shared differ: further.0.linear.weight"),
        ({}, {"hydra_lm_head.1.weight": None}, "lacks weight outputs.1.weight"),
        ({}, {"hydra_mlp.1.0.linear.weight": torch.zeros(2, 2)}, "shape"),
    )
    for fields, changed, message in cases:
        changed = {name: x for name, x in (weights | changed).items() if x is not None}
        write(tmp_path, config | fields, changed)
        with pytest.raises(UserError, match=message) as caught:
            HydraDrafter.from_pretrained(tmp_path, target)
        assert "\n" not in str(caught.value)
    write(tmp_path, config, weights)
    with pytest.raises(UserError, match="hidden size of 64, LlamaForCausalLM has 32"):
        HydraDrafter.from_pretrained(tmp_path, tiny_model(layers=1, hidden=32))
    torch.save({"heads": HydraHeads}, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(UserError, match="could run code and is not loaded"):
        HydraDrafter.from_pretrained(tmp_path, target)
    (tmp_path / "hydra_lm_head.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"hydra_lm_head.pt or model.safetensors"):
        HydraDrafter.from_pretrained(tmp_path, target)
