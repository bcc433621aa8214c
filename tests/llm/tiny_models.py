"""The tiny language models that all tests of draftdiff.llm share: random weights, fp32, eos and pad tokens unused."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mistral sliding": {"model_type": "mistral", "sliding_window": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
}


def tiny_model(
    family="llama", *, layers=3, hidden=64, heads=4, key_heads=2, seed=0, vocab_size=VOCABULARY, attention=None
):
    """A random model of a family in FAMILIES, with grouped queries."""
    given = dict(FAMILIES[family])
    if family == "gemma3_text":
        given["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2) + ["sliding_attention"] * (
            layers % 2
        )
    config = AutoConfig.for_model(
        given.pop("model_type", family),
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.3,  # far from uniform predictions, so that a wrong key or position shows
        **given,
    )
    attention = attention or ("eager" if family == "gemma2" else "sdpa")  # its soft cap is not in sdpa
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_hybrid(kind="qwen3_next", seed=0):
    """A random model of which every other layer is linear attention ("qwen3_next") or a convolution ("lfm2")."""
    other, sizes = {
        "lfm2": ("conv", {}),
        "qwen3_next": (
            "linear_attention",
            {
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "head_dim": 16,
                "num_experts": 0,
                "mlp_only_layers": [0, 1, 2, 3],
            },
        ),
    }[kind]
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=[other, "full_attention"] * 2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **sizes,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    return model


def prompt(length, *, batch=1, seed=0, vocab_size=VOCABULARY):
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (batch, length), generator=generator)
