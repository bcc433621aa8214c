"""SpecKV against its definition written out, and decoding on its cache against a full cache under a mask."""

import copy
import gc
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import ModelDrafter, SparsePrefill, SpecKVConfig, SpecPCConfig, speckv, specpc, speculative
from draftdiff.llm.kept_cache import KeptLayer
from draftdiff.llm.observe import observing
from tests.llm.attention import attend, causal
from tests.llm.rounding import assert_rounded
from tests.llm.tiny_models import FAMILIES, VOCABULARY, prompt, tiny_model

EVICTABLE = [family for family in FAMILIES if family != "mistral sliding"]
SMALL = SpecKVConfig(capacity=20, window=6, lookahead=4, kernel=3)


def tokens(model, ids, cache=None, count=10, **given):
    if cache is not None:
        given[cache_argument(model)] = copy.deepcopy(cache)
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=[], **given)
    return out[:, ids.shape[1] :].tolist()


def best(pooled, scores, count):
    return sorted(sorted(range(len(pooled)), key=lambda i: (-pooled[i], -scores[i], i))[:count])


def expected_indices(model, ids, ahead, config):
    """By layer what each key head of a single prompt keeps, from the host's own attention maps and plain loops."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.cat([ids, ahead], dim=1), output_attentions=True).attentions
    held, chosen = ids.shape[1] - 1, []
    candidates = held - config.window
    for attention in maps:
        groups = attention[0].unflatten(0, (model.config.num_key_value_heads, -1))
        heads = []
        for head in groups:
            votes = head[:, -(config.window + ahead.shape[1] + 1) :].flatten(0, 1)
            scores = votes.amax(0) if config.reduce == "max" else votes.mean(0)
            reach = config.kernel // 2
            pooled = []
            for i in range(candidates):
                around = scores[max(i - reach, 0) : min(i + reach + 1, candidates)]
                pooled.append(float(around.max() if config.pool == "max" else around.sum() / config.kernel))
            heads.append(best(pooled, scores.tolist(), config.capacity - config.window) + list(range(candidates, held)))
        chosen.append(heads)
    return chosen


@pytest.mark.parametrize("family", EVICTABLE)
@pytest.mark.parametrize(("pool", "reduce"), [("max", "max"), ("average", "mean")])
def test_each_key_head_keeps_what_window_and_lookahead_look_at(family, pool, reduce):
    model, ids = tiny_model(family), prompt(60)
    config = SpecKVConfig(capacity=20, window=6, lookahead=4, kernel=3, pool=pool, reduce=reduce)
    cache, info = speckv(model, model, ids, config, return_indices=True)
    assert info.lookahead.tolist() == tokens(model, ids, count=4)
    expected = expected_indices(model, ids, info.lookahead, config)
    assert set(info.indices) == set(cache.kept_layers)
    for layer, kept in info.indices.items():
        assert kept.shape == (1, 2, 20) and kept[0].tolist() == expected[layer]


def test_a_soft_cap_bounds_the_votes():
    model, ids = tiny_model("gemma2", layers=4), prompt(60)
    _, loose = speckv(model, model, ids, SMALL, return_indices=True)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.05  # nearly uniform
    _, info = speckv(model, model, ids, SMALL, return_indices=True)
    expected = expected_indices(model, ids, info.lookahead, SMALL)
    for layer, kept in info.indices.items():
        assert kept[0].tolist() == expected[layer] != loose.indices[layer][0].tolist()


@pytest.mark.parametrize("family", EVICTABLE)
def test_with_room_for_all_decoding_is_as_without(family):
    model, ids = tiny_model(family), prompt(50)
    for capacity in (49, 50, 1000):
        cache, info = speckv(model, model, ids, SpecKVConfig(capacity=capacity, window=6, lookahead=4))
        assert (info.logical, info.physical, cache.get_seq_length()) == (49, 49, 49)
        assert tokens(model, ids, cache) == tokens(model, ids)


@pytest.mark.parametrize("family", EVICTABLE)
@torch.no_grad()
def test_decoding_is_that_of_a_full_cache_where_dropped_keys_are_masked(family):
    model, ids = tiny_model(family), prompt(60)
    cache, info = speckv(model, tiny_model(family, layers=2, seed=1), ids, SMALL, return_indices=True)
    full = DynamicCache(config=model.config)
    model(ids[:, :-1], **{cache_argument(model): full})

    def masked(call):
        if call.layer not in info.indices:
            return None
        allowed = causal(call.query.shape[2], call.key.shape[2]).expand(1, 2, -1, -1).clone()
        allowed[..., :59] = False
        for head in range(2):
            allowed[0, head, :, info.indices[call.layer][0, head]] = True
        return attend(call, allowed.repeat_interleave(2, dim=1))

    dropping = False
    for step in (ids[:, -1:], prompt(1, seed=1), prompt(3, seed=2), prompt(1, seed=3)):
        evicted = model(step, **{cache_argument(model): cache}).logits
        unmasked = model(step, **{cache_argument(model): copy.deepcopy(full)}).logits
        with observing(model, masked):
            reference = model(step, **{cache_argument(model): full}).logits
        assert_rounded(evicted, reference, model, ids)
        dropping |= bool((unmasked - reference).abs().max() > 1e-3 * reference.abs().max())
    assert dropping  # else the masks prove nothing


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_padded_rows_keep_and_say_what_they_would_alone(family):
    """Rows of 60, 41 and 15 tokens: the last fits into the capacity, and its padding stays masked."""
    model, draft = tiny_model(family), tiny_model(family, layers=2, seed=1)
    rows = [prompt(60), prompt(41, seed=1), prompt(15, seed=2)]
    ids = torch.cat([torch.nn.functional.pad(row, (60 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (60 - row.shape[1], 0)) for row in rows])
    cache, info = speckv(model, draft, ids, SMALL, attention_mask=mask, return_indices=True)
    together = tokens(model, ids, cache, attention_mask=mask)
    for number, row in enumerate(rows):
        alone, one = speckv(model, draft, row, SMALL, return_indices=True)
        pad = 60 - row.shape[1]
        for layer, kept in info.indices.items():
            real = [[int(i) - pad for i in head if i >= pad] for head in kept[number]]
            assert real == one.indices[layer][0].tolist()
        assert info.lookahead[number].tolist() == one.lookahead[0].tolist() or one.lookahead.numel() == 0
        assert together[number] == tokens(model, row, alone)[0]
    assert all(kept.shape[-1] == 20 for kept in info.indices.values())


def test_what_follows_an_end_of_sequence_has_no_vote():
    model = tiny_model()
    ids = prompt(60)
    say = tokens(model, ids, count=8)[0]
    end = next(i for i in range(1, 8) if say[i] not in say[:i])
    model.generation_config.eos_token_id = say[end]
    both = torch.cat([ids, prompt(60, seed=1)])
    _, info = speckv(model, model, both, SpecKVConfig(capacity=20, window=6, lookahead=8), return_indices=True)
    _, short = speckv(model, model, ids, SpecKVConfig(capacity=20, window=6, lookahead=end + 1), return_indices=True)
    assert info.lookahead[0, : end + 1].tolist() == say[: end + 1] and info.lookahead.shape[1] > end + 1
    for layer, kept in info.indices.items():
        assert torch.equal(kept[0], short.indices[layer][0])


def test_one_full_layer_is_held_at_a_time():
    model, ids = tiny_model(layers=4), prompt(200)
    one = 200 + 4  # prompt and lookahead
    full = []

    def count(*_):
        # Whatever holds them: every tensor of keys or values of all tokens that is alive when a layer begins.
        alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-2:] == (one, 16)]
        full.append(len({x.untyped_storage().data_ptr() for x in alive if x.shape[:2] == (1, 2)}))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(count)
    cache, info = speckv(model, tiny_model(seed=1), ids, SMALL)
    assert full == [0, 0, 0, 0]
    token = 2 * 2 * 16 * 4  # keys and values of two heads of 16 numbers of four bytes
    assert info.kept_bytes == 4 * 20 * token == cache.nbytes
    assert info.full_bytes == 4 * 199 * token
    assert info.peak_bytes == (3 * 20 + one + 20) * token


def test_info_says_what_was_done_and_fits_into_json():
    _, info = speckv(tiny_model(), tiny_model(seed=1), prompt(60), SMALL, return_indices=True)
    made = json.loads(json.dumps(info.to_dict()))
    assert (made["capacity"], made["logical"], made["physical"], made["layers"]) == (20, 59, 20, 3)
    assert len(made["lookahead"][0]) == 4 and len(made["indices"]["2"][0][1]) == 20
    assert made["draft_seconds"] > 0 and made["prefill_seconds"] > 0
    assert speckv(tiny_model(), tiny_model(seed=1), prompt(60), SMALL)[1].indices == {}


def test_the_lookahead_is_as_long_as_what_will_be_generated_unless_said():
    model, ids = tiny_model(), prompt(60)
    config = SpecKVConfig(capacity=20, window=6)
    assert speckv(model, model, ids, config)[1].lookahead.shape == (1, 32)
    assert speckv(model, model, ids, config, max_new_tokens=5)[1].lookahead.shape == (1, 5)
    assert speckv(model, model, ids, SMALL, max_new_tokens=5)[1].lookahead.shape == (1, 4)
    alone = SpecKVConfig(capacity=20, window=6, lookahead=0)
    assert speckv(model, None, ids, alone)[1].lookahead.shape == (1, 0)


def test_a_prompt_of_one_token_gives_an_empty_cache():
    model, ids = tiny_model(), prompt(1)
    cache, info = speckv(model, model, ids)
    assert (info.logical, info.physical, info.peak_bytes, cache.get_seq_length()) == (0, 0, 0, 0)
    assert tokens(model, ids, cache) == tokens(model, ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capacity": 8, "window": 9}, "capacity must be at least the window of 9, got 8"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"lookahead": -1}, "lookahead must be at least 0, got -1"),
        ({"kernel": 4}, "kernel must be odd and positive, got 4"),
        ({"pool": "median"}, "pool must be one of max, average, got 'median'"),
        ({"reduce": "sum"}, "reduce must be one of max, mean, got 'sum'"),
    ],
)
def test_settings_out_of_range_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        SpecKVConfig(**given)


def failing(message, draft=None, ids=None, model=None, config=SMALL, **given):
    model = model or tiny_model()
    with pytest.raises(ValueError, match=message) as raised:
        speckv(model, draft or model, prompt(60) if ids is None else ids, config, **given)
    assert "\n" not in str(raised.value)


def test_a_users_mistakes_are_errors_of_one_line():
    failing("vocabulary of 2000 tokens is not the target's of 96", draft=tiny_model(vocab_size=2000))
    failing("the draft is on meta, the target on cpu", draft=tiny_model().to("meta"))
    failing("at least one token, got ids of shape", ids=prompt(0))
    failing("ids must be int64", ids=prompt(60)[0])
    failing("from 0 to 95, the vocabulary of LlamaForCausalLM, got 96", ids=torch.full((1, 60), 96))
    failing("attention_mask must be", attention_mask=torch.ones(1, 59))
    failing("padding, which is on the left", attention_mask=torch.ones(1, 60).index_fill(1, torch.tensor([59]), 0))
    failing("row 1 has none", ids=prompt(60, batch=2), attention_mask=torch.tensor([[1], [0]]).expand(2, 60))
    failing("a layer to evict from", model=tiny_model("mistral sliding"))
    both = tiny_model()
    both.config.is_encoder_decoder = True
    failing("decoder-only, got LlamaForCausalLM", model=both)
    with pytest.raises(ValueError, match="wrapper: take its _orig_mod"):
        speckv(torch.compile(tiny_model()), tiny_model(), prompt(60), SMALL)
    static = tiny_model()
    static.generation_config.cache_implementation = "static"
    failing("cache_implementation must be None .* got 'static'", model=static)
    sparse = SpecKVConfig(capacity=20, window=6, sparse_prefill=SparsePrefill())
    mask = torch.ones(1, 60).index_fill(1, torch.tensor([0]), 0)
    failing("prompts of one length", config=sparse, attention_mask=mask)
    failing("without a soft cap of the scores, got 50", config=sparse, model=tiny_model("gemma2"))
    with pytest.raises(ValueError, match="a lookahead of 4 tokens needs a draft model, got None"):
        speckv(tiny_model(), None, prompt(60), SMALL)


def test_latent_attention_is_evicted_from_where_its_cache_holds_keys_and_values():
    """Older hosts do, with another size for values than for keys; newer ones hold a compressed form."""
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
    )
    model, ids = AutoModelForCausalLM.from_config(config).eval(), prompt(60)
    model.generation_config.pad_token_id = 0
    plain = DynamicCache(config=config)
    with torch.no_grad():
        model(ids, **{cache_argument(model): plain})
    if plain.layers[0].keys.shape[1] == 1:
        failing("layer 0 holds 1 heads and attends to 4", model=model)
        return
    cache, _ = speckv(model, model, ids, SMALL)
    assert cache.layers[0].keys.shape == (1, 4, 20, 24) and cache.layers[0].values.shape == (1, 4, 20, 12)
    room, _ = speckv(model, model, ids, SpecKVConfig(capacity=60))
    assert tokens(model, ids, room) == tokens(model, ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_models_work_in_their_own(attention):
    model, ids, mask = tiny_model(attention=attention).bfloat16(), prompt(60, batch=2), torch.ones(2, 60)
    mask[1, :45] = 0
    cache, info = speckv(model, model, ids, SMALL, attention_mask=mask)
    assert cache.layers[0].keys.dtype == torch.bfloat16 and info.kept_bytes == 2 * 3 * 20 * 2 * 2 * 16 * 2
    assert all(len(row) == 10 for row in tokens(model, ids, cache, attention_mask=mask.long()))


def test_vocabularies_that_differ_by_padding_may_go_together():
    """As those of Qwen2.5 0.5B and 7B do. The draft may not propose what the target does not know."""
    model, draft = tiny_model(vocab_size=64), tiny_model(vocab_size=128, seed=1)
    with torch.no_grad():
        draft.lm_head.weight[64:] *= 100
    _, info = speckv(model, draft, prompt(60, vocab_size=64), SMALL)
    assert info.lookahead.max() < 64


def test_the_cache_holds_kept_layers_that_generation_appends_to():
    model, ids = tiny_model(), prompt(60)
    cache, _ = speckv(model, model, ids, SMALL)
    model.generate(ids, max_new_tokens=10, do_sample=False, **{cache_argument(model): cache})
    assert all(isinstance(layer, KeptLayer) for layer in cache.layers)
    # 59 of the prompt stand for 20; its last token and nine of the ten new ones were read
    assert [layer.physical_length for layer in cache.layers] == [30] * 3 and cache.get_seq_length() == 69


@pytest.mark.parametrize("family", EVICTABLE)
@pytest.mark.parametrize("drafting", ["itself", "another"])
def test_speculation_goes_on_from_an_evicted_cache_as_the_host_does(family, drafting):
    model, draft, ids = tiny_model(family), tiny_model(seed=1), prompt(60)
    cache, _ = speckv(model, draft, ids, SMALL)
    drafter = ModelDrafter(model if drafting == "itself" else draft)
    given = {"custom_generate": speculative, "drafter": drafter}
    assert tokens(model, ids, cache, count=20, **given) == tokens(model, ids, cache, count=20)
    assert tokens(model, ids, cache, count=20) != tokens(model, ids, count=20)  # lossy, so that this shows something


def test_speculation_goes_on_from_an_evicted_batch():
    model, ids, mask = tiny_model(), prompt(60, batch=3), torch.ones(3, 60, dtype=torch.long)
    mask[1, :25] = mask[2, :47] = 0
    cache, _ = speckv(model, tiny_model(seed=1), ids, SMALL, attention_mask=mask)
    given = {"custom_generate": speculative, "drafter": ModelDrafter(tiny_model(seed=1)), "attention_mask": mask}
    assert tokens(model, ids, cache, count=20, **given) == tokens(model, ids, cache, count=20, attention_mask=mask)


def test_a_lookahead_beyond_a_table_of_positions_is_named():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="has learned 64 positions, prompt and continuation take 92"):
        speckv(model, model, prompt(60), SpecKVConfig(capacity=20, window=6, lookahead=32))
    with pytest.raises(ValueError, match="has learned 64 positions, prompt and continuation take 101"):
        specpc(model, prompt(100), SpecPCConfig(capacity=30, window=6))


def test_the_drafts_own_settings_do_not_change_what_is_kept():
    model, draft, ids = tiny_model(), tiny_model(seed=1), prompt(60)

    def kept():
        info = speckv(model, draft, ids, SMALL, return_indices=True)[1]
        return [info.lookahead, *info.indices.values(), specpc(draft, ids, SpecPCConfig(20, window=6, lookahead=6))]

    expected = kept()
    for name, value in {"repetition_penalty": 3.0, "max_time": 0.0, "use_cache": False}.items():
        setattr(draft.generation_config, name, value)
    assert all(torch.equal(one, other) for one, other in zip(kept(), expected))


def test_the_draft_must_know_the_prompts_tokens():
    """Its vocabulary may be padded less than the target's."""
    model, draft = tiny_model(vocab_size=128), tiny_model(vocab_size=64)
    failing("from 0 to 63, the vocabulary of LlamaForCausalLM, got 64", model=model, draft=draft, ids=ids_with(64))
    assert speckv(model, draft, ids_with(63), SMALL)[1].physical == 20


def ids_with(token):
    return prompt(60, vocab_size=60).index_fill(1, torch.tensor([7]), token)


def test_the_draft_runs_only_where_something_is_evicted():
    model = tiny_model()
    for tokens_of_prompt, ahead in ((21, 0), (22, 4)):  # the last one is not in the cache
        _, info = speckv(model, model, prompt(tokens_of_prompt), SMALL)
        assert info.lookahead.shape == (1, ahead) and info.physical == 20


def test_models_that_attend_twice_a_layer_are_refused():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("diffllama", **sizes, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone = SpecKVConfig(capacity=24, window=8, lookahead=0)
    older = "AttentionInterface, DiffLlamaForCausalLM does not"
    with pytest.raises(ValueError, match=f"each layer must attend once, layer 0 of DiffLlamaAttention does|{older}"):
        speckv(model, None, prompt(50), alone)
