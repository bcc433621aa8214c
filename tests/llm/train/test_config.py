"""Configs of new drafts: the number of parameters asked for, the target's family and vocabulary, width before depth."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftdiff.llm.train.config import count_parameters, draft_config
from tests.llm.tiny_models import FAMILIES, tiny_model

REAL = [("llama", 50e6), ("llama", 115e6), ("llama", 1e9), ("qwen2", 150e6), ("qwen3", 200e6), ("gemma2", 120e6)]


@pytest.mark.parametrize(
    ("family", "params"), [*REAL, ("phi3", 120e6), ("gpt_neox", 60e6), ("gpt2", 60e6), ("mixtral", 300e6)]
)
def test_the_number_of_parameters_is_within_a_tenth_of_the_request(family, params):
    target = AutoConfig.for_model(family)
    config = draft_config(target, params)
    assert abs(count_parameters(config) / params - 1) <= 0.1
    assert type(config) is type(target) and config.vocab_size == target.vocab_size
    assert config.hidden_size % config.num_attention_heads == 0


UNUSUAL = {
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 48, "num_experts": 8},
    "deepseek_v2": {"moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16}
    | {"q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "nemotron": {"num_key_value_heads": None},
    "phi3": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12},
        "original_max_position_embeddings": 64,
        "pad_token_id": 0,
    },
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_experts_factors_of_long_contexts_and_key_heads_left_unsaid_make_drafts_that_run(family):
    width = 96 if family == "phi3" else 64  # heads of 24, which its rope factors fit
    sizes = {"hidden_size": width, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    target = AutoConfig.for_model(family, vocab_size=100, **sizes, **UNUSUAL[family])
    params = 9e4
    draft = AutoModelForCausalLM.from_config(draft_config(target, params))
    assert abs(draft.num_parameters() / params - 1) <= 0.1
    assert draft(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 100)


def test_a_draft_is_in_float32_and_not_quantized_whatever_the_target_is(tmp_path):
    target = tiny_model().config
    target.dtype, target.quantization_config = torch.bfloat16, {"quant_method": "gptq", "bits": 4}
    draft = AutoModelForCausalLM.from_config(draft_config(target, 3e4))
    assert draft.dtype == torch.float32
    draft.save_pretrained(tmp_path / "draft")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert (again.num_parameters(), again.dtype) == (draft.num_parameters(), torch.float32)
    assert (target.dtype, target.quantization_config["bits"]) == (torch.bfloat16, 4)


def test_counting_allocates_nothing_and_counts_tied_weights_once():
    model = tiny_model(layers=2)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    model.config.tie_word_embeddings = True
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_a_draft_that_runs(family):
    target = tiny_model(family).config
    params = count_parameters(target) // 2
    draft = AutoModelForCausalLM.from_config(draft_config(target, params))
    assert abs(draft.num_parameters() / params - 1) <= 0.1
    assert draft(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, target.vocab_size)


def test_width_comes_before_depth_and_stays_under_a_quarter_of_the_targets():
    target = AutoConfig.for_model("llama", num_key_value_heads=8)
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (draft_config(target, p) for p in (50e6, 80e6, 200e6))]
    assert [layers for layers, _ in shapes] == sorted(layers for layers, _ in shapes)
    assert shapes[0][0] == 1 and shapes[-1] == (9, 1024)
    large = draft_config(target, 115e6)
    assert (large.head_dim, large.num_attention_heads, large.num_key_value_heads) == (128, 8, 2)


def test_a_number_out_of_range_is_named_with_the_range():
    target = AutoConfig.for_model("llama")
    with pytest.raises(
        ValueError, match=r"params must be from 4,\d\d\d,\d\d\d, .*32,000, to 6,738,415,616.* got 1,000$"
    ):
        draft_config(target, 1000)
    with pytest.raises(ValueError, match="got 9,000,000,000"):
        draft_config(target, 9e9)


def test_a_family_without_the_widths_to_set_is_named():
    with pytest.raises(ValueError, match="must have intermediate_size or n_inner; bloom has neither"):
        draft_config(AutoConfig.for_model("bloom"))
    with pytest.raises(ValueError, match="one intermediate_size for all layers; gemma3n_text has one for each"):
        draft_config(AutoConfig.for_model("gemma3n_text"))
