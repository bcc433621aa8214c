import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftdiff.llm.metrics import acceptance_rate, bytes_per_forward, mbsu
from tests.llm.tiny_models import tiny_model


def test_acceptance_is_one_minus_the_total_variation():
    p, q = torch.rand(2, 5, 7).softmax(-1)
    torch.testing.assert_close(acceptance_rate(p, q), 1 - (p - q).abs().sum(-1) / 2)


def test_a_free_draft_gains_all_its_tokens_per_forward():
    assert mbsu(3.0, 0.0, 5) == 3.0
    assert mbsu(3.0, 0.1, 5) == pytest.approx(2.0)


def test_the_embedding_is_read_only_where_it_is_also_the_output():
    model = tiny_model()
    everything = sum(p.numel() * 4 for p in model.parameters())
    assert not model.config.tie_word_embeddings
    assert bytes_per_forward(model) == everything - model.get_input_embeddings().weight.numel() * 4
    model.set_output_embeddings(model.get_output_embeddings())
    model.lm_head.weight = model.get_input_embeddings().weight
    assert bytes_per_forward(model) == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("mixtral", {"num_local_experts": 8}),
        ("qwen2_moe", {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    ],
)
def test_a_token_reads_the_experts_that_it_goes_to(kind, given):
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, num_experts_per_tok=2, **given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    total = sum(p.numel() * 4 for p in model.parameters()) - 96 * 64 * 4
    routed = sum(p.numel() * 4 for layer in model.model.layers for p in layer.mlp.experts.parameters())
    assert bytes_per_forward(model) == total - routed * 6 // 8
