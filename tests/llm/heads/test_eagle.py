"""The EAGLE-3 head: both layouts of its files, what may be left out of them, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from draftdiff.errors import UserError
from draftdiff.llm import EagleDrafter
from draftdiff.llm.heads.eagle import EagleHead, default_layers
from tests.llm.tiny_heads import eagle_head
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=7)


def stored(head):
    """(config, weights) of a head as SafeAILab publishes it."""
    config = {
        name: getattr(head.config, name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    }
    config |= {"num_hidden_layers": 1, "draft_vocab_size": len(head.d2t), "rope_theta": 10000.0, "rope_scaling": None}
    weights = {name.replace("layers.0.", "midlayer."): x for name, x in head.state_dict().items()}
    return config | {"vocab_size": VOCABULARY, "model_type": "llama"}, weights


def write(folder, config, weights, safe=True):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if safe:
        save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def says(head):
    ids = prompt(6)
    states = torch.randn(1, 6, head.fc.in_features, generator=torch.Generator().manual_seed(3))
    return head(ids, None, torch.arange(6)[None], states=head.project(states)).logits


def test_both_layouts_give_the_same_head(target, tmp_path):
    head = eagle_head(target, vocabulary=40, layers=default_layers(7))
    config, weights = stored(head)
    assert torch.equal(says(EagleHead.from_pretrained(write(tmp_path / "a", config, weights), target)), says(head))
    again = EagleHead.from_pretrained(write(tmp_path / "b", config, weights, safe=False), target)
    assert torch.equal(says(again), says(head)) and not again.training
    layer = {name: x for name, x in config.items() if name != "draft_vocab_size"}
    speculators = {"speculators_model_type": "eagle3", "draft_vocab_size": 40, "transformer_layer_config": layer}
    plain = {name.replace("midlayer.", "layers.0."): x for name, x in weights.items()}
    plain |= {"verifier_norm.weight": torch.ones(64), "verifier_lm_head.weight": torch.ones(40, 64)}
    third = EagleHead.from_pretrained(write(tmp_path / "c", speculators, plain), target)
    assert torch.equal(says(third), says(head)) and third.settings.target_layers == (2, 3, 4)


def test_speculators_may_name_layers_norms_and_an_embedding_of_the_heads_own(target, tmp_path):
    head = eagle_head(target, layers=(0, 5))
    config, weights = stored(head)
    weights = {name.replace("midlayer.", "layers.0."): x for name, x in weights.items()}
    speculators = {"speculators_model_type": "eagle3", "transformer_layer_config": config}
    speculators |= {"eagle_aux_hidden_state_layer_ids": [5, 0]}
    plain = EagleHead.from_pretrained(write(tmp_path / "a", speculators, weights), target)
    assert plain.settings.target_layers == (0, 5) and torch.equal(says(plain), says(head))
    embedded = weights | {"embed_tokens.weight": target.get_input_embeddings().weight.detach()}
    assert torch.equal(
        says(EagleHead.from_pretrained(write(tmp_path / "b", speculators, embedded), target)), says(head)
    )
    first = EagleHead.from_pretrained(
        write(tmp_path / "c", speculators | {"norm_before_residual": True}, weights), target
    )
    layer, ids, states = first.layers[0], prompt(1), torch.randn(1, 1, 64)
    with torch.no_grad():
        normed = layer.hidden_norm(states)
        read = torch.cat([layer.input_layernorm(target.get_input_embeddings()(ids)), normed], dim=-1)
        group = layer.self_attn.v_proj(read).unflatten(-1, (-1, first.config.head_dim))
        mid = normed + layer.self_attn.o_proj(group.flatten(2))  # a token that sees itself alone
        expected = mid + layer.mlp(layer.post_attention_layernorm(mid))
        found = first(ids, None, torch.zeros(1, 1, dtype=torch.int64), states=states)
    torch.testing.assert_close(found.hidden_states[0], expected)
    normed_first = weights | {"input_norm.weight": 2 * torch.ones(128)}
    norm = EagleHead.from_pretrained(
        write(tmp_path / "d", speculators | {"norm_before_fc": True}, normed_first), target
    )
    states = torch.randn(2, 128)
    scaled = 2 * states / (states.pow(2).mean(-1, keepdim=True) + norm.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(norm.project(states), norm.fc(scaled))


def test_with_the_whole_vocabulary_the_map_may_be_left_out(target, tmp_path):
    config, weights = stored(eagle_head(target, layers=default_layers(7)))
    without = {name: x for name, x in weights.items() if name not in ("d2t", "t2d")}
    del config["draft_vocab_size"]
    head = EagleHead.from_pretrained(write(tmp_path / "a", config, without), target)
    assert says(head).isfinite().all() and head.t2d.all()


def test_the_layers_that_are_read_by_default():
    assert default_layers(32) == (2, 16, 29) and default_layers(8) == (2, 4, 5)
    assert default_layers(6) == (2, 3)  # coinciding ones count once, as in the original


def test_other_files_and_damage_are_refused_in_one_line(target, tmp_path):
    head = eagle_head(target, vocabulary=40, layers=default_layers(7))
    config, weights = stored(head)
    d2t = weights["d2t"].clone()
    d2t[3] -= 1  # a token twice
    far = weights["d2t"] + 1
    wide = {"transformer_layer_config": config | {"model_type": "qwen3"}, "speculators_model_type": "eagle3"}
    cases = (
        (config, {"d2t": d2t}, "d2t and t2d do not name the same 40 tokens of a vocabulary of 96"),
        (config, {"d2t": far}, "d2t and t2d do not name the same 40"),
        (config, {"d2t": None}, "lacks weight d2t"),
        (config | {"draft_vocab_size": 41}, {}, r"weight d2t of shape \[40\], its config wants \[41\]"),
        (config | {"draft_vocab_size": 1000}, {}, "draft_vocab_size must be from 1 to 96"),
        (config | {"hidden_size": 32}, {}, "hidden size of 32, LlamaForCausalLM has 64"),
        (
            config | {"eagle_aux_hidden_state_layer_ids": [2, 7, 4]},
            {},
            "from 0 to 6, the layers of Llama.* got .2, 4, 7",
        ),
        ({"speculators_model_type": "dflash"}, {}, "speculators_model_type must be 'eagle3', got 'dflash'"),
        (wide, {}, "layers must be of a llama, got 'qwen3'"),
        ({}, {}, "lacks hidden_size"),
    )
    for number, (fields, changed, message) in enumerate(cases):
        changed = {name: x for name, x in (weights | changed).items() if x is not None}
        with pytest.raises(UserError, match=message) as caught:
            EagleDrafter.from_pretrained(write(tmp_path / str(number), fields, changed), target)
        assert "\n" not in str(caught.value)
    assert isinstance(target, LlamaForCausalLM)
