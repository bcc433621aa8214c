"""The loop on every kind of model: windows, soft caps, linear attention, shared keys, places instead of positions."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)

from draftdiff.hosts.transformers import cache_argument
from draftdiff.hosts.transformers_quirks import quirks_of_model
from draftdiff.llm import Chain, ModelDrafter, NGramDrafter, NGramTable, report, speculative
from tests.llm.generation import SHAPES, both, family, relative
from tests.llm.tiny_models import FAMILIES, VOCABULARY, prompt, tiny_hybrid, tiny_model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_families_decode_as_without_drafts(name, shape):
    target = family(name)
    drafter = ModelDrafter(relative(target), SHAPES[shape])
    plain, fast = both(target, drafter, prompt(30), max_new_tokens=40)  # well past a window of 16
    assert torch.equal(plain, fast)
    assert report(drafter).tokens_per_forward > 1.2


@pytest.mark.parametrize("name", ["mistral sliding", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_hold_in_a_cache_that_does_not_know_of_them(name, shape):
    target = family(name)
    plain = target.generate(prompt(30), do_sample=False, max_new_tokens=40)
    given = {cache_argument(target): DynamicCache(), "drafter": ModelDrafter(relative(target), SHAPES[shape])}
    fast = target.generate(prompt(30), do_sample=False, max_new_tokens=40, custom_generate=speculative, **given)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_of_one_token_is_a_prompt(name, rows):
    target = family(name)
    ids = prompt(1, batch=rows)
    drafter = ModelDrafter(relative(target), SHAPES["best"])
    plain, fast = both(target, drafter, ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)
    assert torch.equal(plain, fast)


def test_eager_attention_takes_trees_too(pair):
    target = family("llama", attention="eager")
    plain, fast = both(target, ModelDrafter(pair[1], SHAPES["best"]), prompt(12))
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_models_with_linear_attention_take_chains(kind):
    if kind == "lfm2" and not hasattr(DynamicCache, "activate_past_recording"):
        with pytest.raises(ValueError, match="takes drafts from transformers 5"):
            both(tiny_hybrid(kind), ModelDrafter(tiny_model()), prompt(6))
        return
    target = tiny_hybrid(kind)
    draft = tiny_hybrid(kind)
    for weight in draft.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for small in (draft, tiny_model()):
        drafter = ModelDrafter(small, Chain(3))
        plain, fast = both(target, drafter, prompt(12))
        assert torch.equal(plain, fast)
        done = report(drafter)
        assert done.tokens_per_forward == pytest.approx(done.tokens / done.target_forwards)
    for shape, rows in (("best", 1), ("chain", 2)):
        with pytest.raises(ValueError, match="has linear-attention layers: draft chains, one row at a time"):
            both(target, ModelDrafter(tiny_model(), SHAPES[shape]), prompt(12, batch=rows))


def other_kind(kind, **sizes):
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.generation_config.pad_token_id = 0
    return model


GPT_NEO = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
}
BART = {
    "is_decoder": True,
    "is_encoder_decoder": False,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("kind", "sizes", "what"),
    [
        ("gpt_neo", GPT_NEO, "attends by place"),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "attends by place"),
        ("bart", BART, "attends by place"),
        (
            "llama4_text",
            LAYERS
            | {
                "head_dim": 16,
                "attention_chunk_size": 8,
                "num_local_experts": 2,
                "intermediate_size_mlp": 64,
                "no_rope_layers": [1, 1, 1, 0],
            },
            "has chunked attention",
        ),
    ],
)
def test_models_that_do_not_go_by_position_take_chains(kind, sizes, what):
    target = other_kind(kind, **sizes)
    plain, fast = both(target, ModelDrafter(target, Chain(3)), prompt(20))
    assert torch.equal(plain, fast)
    for shape, rows in (("best", 1), ("chain", 2)):
        with pytest.raises(ValueError, match=f"{what}.*: draft chains, one row at a time, unpadded"):
            both(target, ModelDrafter(tiny_model(), SHAPES[shape]), prompt(12, batch=rows))


can_be_made = pytest.mark.skipif(
    not hasattr(DynamicCache, "activate_past_recording"), reason="older hosts fetch a kernel to make the model"
)


@can_be_made
def test_models_that_forget_when_tokens_come_at_once_are_refused():
    mamba = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}
    target = other_kind("jamba", **LAYERS, **mamba, use_mamba_kernels=False)
    with pytest.raises(ValueError, match="JambaForCausalLM cannot take drafts"):
        both(target, ModelDrafter(tiny_model()), prompt(12))
    target = other_kind("recurrent_gemma", **LAYERS, attention_window_size=8, lru_width=64)
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM cannot take drafts"):
        both(target, ModelDrafter(tiny_model()), prompt(12))


@can_be_made
def test_models_without_attention_are_refused():
    target = other_kind("mamba", hidden_size=32, num_hidden_layers=2, state_size=8)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot take drafts: it has no attention"):
        both(target, ModelDrafter(tiny_model()), prompt(12))


def test_models_that_keep_no_past_in_the_cache_are_refused():
    target = other_kind("openai-gpt", n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="does not keep its past in a cache"):
        both(target, ModelDrafter(tiny_model()), prompt(12))


def test_layers_may_use_the_keys_of_others():
    sizes = {
        "head_dim": 16,
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "tie_word_embeddings": False,
    }
    target = other_kind("gemma3n_text", **LAYERS, **sizes)
    ids = prompt(20, batch=2)
    for given in ({"inputs": ids[:1]}, {"inputs": ids, "attention_mask": torch.ones_like(ids)}):
        plain = target.generate(**given, do_sample=False, max_new_tokens=24)
        assert len(plain[0, 20:].unique()) > 8
        for shape in SHAPES.values():
            options = {"do_sample": False, "max_new_tokens": 24, "custom_generate": speculative}
            fast = target.generate(**given, **options, drafter=ModelDrafter(target, shape))
            assert torch.equal(plain, fast)


def tiny_gemma3():
    """A model of pictures and text, as AutoModelForCausalLM makes it."""
    text = {"head_dim": 16, "vocab_size": VOCABULARY, "sliding_window": 16, **LAYERS}
    pictures = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=pictures | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("shape", ["chain", "best"])
def test_models_of_pictures_and_text_take_drafts_of_text(shape):
    target, ids = tiny_gemma3(), prompt(20, batch=2, vocab_size=80)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    drafter = ModelDrafter(family("gemma3_text"), SHAPES[shape])
    for given in ({}, {"token_type_ids": torch.zeros_like(ids[:1])}):
        plain, fast = both(target, drafter, ids[:1], eos_token_id=[], **given)
        assert torch.equal(plain, fast)
    plain, fast = both(target, drafter, ids, attention_mask=mask, eos_token_id=[])
    assert torch.equal(plain, fast)


TABLES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
}


@pytest.mark.parametrize("kind", TABLES)
def test_drafts_do_not_outrun_the_targets_table_of_positions(kind):
    """The text ends one token before its table does; drafts go on for longer."""
    target = other_kind(kind, **TABLES[kind])
    ids = prompt(50, batch=2)
    plain = target.generate(ids[:1], do_sample=False, max_new_tokens=14)
    table = NGramTable([[*plain[0].tolist(), *range(1, 9)]])
    for given in ({}, {"attention_mask": torch.ones_like(ids).index_fill_(1, torch.arange(5), 0)}):
        rows = ids[:1] if not given else ids
        whole = target.generate(rows, do_sample=False, max_new_tokens=14, **given)
        ends = whole[:, -1].tolist()
        for drafter in (NGramDrafter(table, depth=8), ModelDrafter(target, Chain(8)), ModelDrafter(tiny_model())):
            expected, fast = both(target, drafter, rows, max_new_tokens=14, **given)
            assert torch.equal(expected, fast)
            expected, fast = both(target, drafter, rows, max_new_tokens=500, eos_token_id=ends, **given)
            assert torch.equal(expected, fast)


FALCON_H1 = {"mamba_d_state": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
ZAMBA2 = {
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "n_mamba_heads": 4,
    "mamba_headdim": 32,
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "num_mem_blocks": 1,
    "adapter_rank": 8,
}


@can_be_made
def test_layers_with_states_and_attention_at_once_take_chains():
    target = other_kind("falcon_h1", **LAYERS, **FALCON_H1)
    if quirks_of_model(target, "refused"):
        with pytest.raises(ValueError, match="it takes drafts from transformers"):
            both(target, ModelDrafter(target), prompt(12))
        return
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=24)
    assert len(set(plain[0, 12:].tolist())) > 6
    known = NGramDrafter(NGramTable([plain[0].tolist()]), nodes=3, depth=3)
    replays = []
    for drafter in (ModelDrafter(tiny_model(), Chain(3)), known):
        plain, fast = both(target, drafter, prompt(12))
        assert torch.equal(plain, fast)
        replays.append(report(drafter).replays)
    assert replays[0] > 0 and report(known).tokens_per_forward > 1.5


@can_be_made
def test_models_whose_single_steps_differ_are_refused():
    """When this fails the host has been mended, and the quirk is to be bounded."""
    target = other_kind("zamba2", **LAYERS, **ZAMBA2)
    with pytest.raises(ValueError, match="Zamba2ForCausalLM cannot take drafts: it says something else to one token"):
        both(target, ModelDrafter(tiny_model()), prompt(12))
    ids, far = prompt(36), 0.0
    with torch.no_grad():
        whole, cache = target(ids, use_cache=False).logits, DynamicCache(config=target.config)
        target(ids[:, :12], **{cache_argument(target): cache}, use_cache=True)
        for place in range(12, 36):
            one = target(ids[:, place : place + 1], **{cache_argument(target): cache}, use_cache=True).logits
            far = max(far, float((one - whole[:, place]).abs().max()))
    assert far > 1e-2 * float(whole.abs().max())


@can_be_made
def test_models_with_a_cache_of_their_own_kind_are_refused():
    target = other_kind("minimax", **LAYERS, num_local_experts=2)
    with pytest.raises(ValueError, match="MiniMaxForCausalLM cannot take drafts: it has a cache of its own"):
        both(target, ModelDrafter(tiny_model()), prompt(12))
