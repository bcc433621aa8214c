"""The loop inside transformers' generate: everything that plain decoding takes, with drafts."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)

from draftdiff.llm import Chain, KBest, ModelDrafter, Sampled, report, speculative
from draftdiff.llm.decoder import cache_argument
from draftdiff.llm.tree import ROOT, Tree
from draftdiff.pipelines.mini_llm import load_mini_llm
from tests.llm.tiny_models import FAMILIES, VOCABULARY, prompt, tiny_hybrid, tiny_model

SHAPES = {"chain": Chain(4), "best": KBest(4, 3, 20), "sampled": Sampled((3, 2, 1))}


def relative(model, noise=0.02):
    """A draft that often agrees: the model with noise on its weights."""
    draft = tiny_model(next(name for name in FAMILIES if name == model.family))
    generator = torch.Generator().manual_seed(1)
    for weight in draft.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator)
    return draft


def family(name, **options):
    model = tiny_model(name, **options)
    model.family = name
    return model


@pytest.fixture(name="pair", scope="module")
def _pair():
    target = family("llama")
    return target, relative(target)


def both(target, drafter, ids, **options):
    """(plain, speculative) output of generate."""
    options = {"do_sample": False, "max_new_tokens": 24} | options
    plain = target.generate(ids, **options)
    return plain, target.generate(ids, custom_generate=speculative, drafter=drafter, **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_families_decode_as_without_drafts(name, shape):
    target = family(name)
    drafter = ModelDrafter(relative(target), SHAPES[shape])
    plain, fast = both(target, drafter, prompt(30), max_new_tokens=40)  # well past a window of 16
    assert torch.equal(plain, fast)
    assert report(drafter).tokens_per_forward > 1.2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_of_one_token_is_a_prompt(name, rows):
    target = family(name)
    ids = prompt(1, batch=rows)
    drafter = ModelDrafter(relative(target), SHAPES["best"])
    plain, fast = both(target, drafter, ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("name", ["llama", "mistral sliding", "gemma3_text"])
def test_rows_of_a_padded_batch_advance_on_their_own(name):
    target = family(name)
    ids = prompt(30, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :27] = 0
    drafter = ModelDrafter(relative(target), SHAPES["best"])
    plain, fast = both(target, drafter, ids * mask, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(plain, fast)
    done = report(drafter)
    assert done.rounds < done.tokens and done.target_forwards < done.rounds


def test_eager_attention_takes_trees_too(pair):
    target = family("llama", attention="eager")
    plain, fast = both(target, ModelDrafter(pair[1], SHAPES["best"]), prompt(12))
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_ends_at_the_end_token_in_the_middle_of_a_tree(pair, shape):
    target, draft = pair
    ids = prompt(12, batch=2)
    plain = target.generate(ids, do_sample=False, max_new_tokens=30)
    end = int(plain[0, 12 + 9])
    plain, fast = both(target, ModelDrafter(draft, SHAPES[shape]), ids, max_new_tokens=30, eos_token_id=end)
    assert torch.equal(plain, fast)


class EndsWith(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -len(self.tokens) :] == self.tokens).all(-1)


@pytest.mark.parametrize("sampler", ["with_replacement", "without_replacement", "greedy"])
def test_a_token_that_the_draft_does_not_have_may_be_forced(pair, sampler):
    target = tiny_model(vocab_size=128)
    draft = tiny_model(vocab_size=64)
    verifier = "greedy" if sampler == "greedy" else "rrs"
    drafter = ModelDrafter(draft, Sampled((3, 2, 1), sampler, verifier))
    options = {"do_sample": True, "forced_eos_token_id": 100, "max_new_tokens": 6}
    out = target.generate(prompt(6, vocab_size=64), custom_generate=speculative, drafter=drafter, **options)
    assert out[0, -1] == 100


@pytest.mark.parametrize("shape", SHAPES)
def test_the_target_may_write_tokens_that_the_draft_does_not_have(shape):
    target = tiny_model(vocab_size=128)
    plain, fast = both(target, ModelDrafter(tiny_model(vocab_size=64), SHAPES[shape]), prompt(6, vocab_size=128))
    assert plain.max() >= 64 and torch.equal(plain, fast)


def test_more_branches_than_tokens_are_all_of_them():
    small = tiny_model(vocab_size=8)
    plain, fast = both(small, ModelDrafter(small, Sampled((9, 1))), prompt(6, vocab_size=8))
    assert torch.equal(plain, fast)


def test_own_stopping_criteria_see_every_token(pair):
    target, draft = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=30)
    criteria = StoppingCriteriaList([EndsWith(plain[0, 20:22].tolist())])
    plain, fast = both(target, ModelDrafter(draft), prompt(12), stopping_criteria=criteria)
    assert torch.equal(plain, fast) and plain.shape[1] == 22


def test_the_text_may_grow_far_below_its_limit(pair):
    target, draft = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=600)
    criteria = StoppingCriteriaList([EndsWith(plain[0, 590:592].tolist())])
    plain, fast = both(
        target, ModelDrafter(draft, SHAPES["best"]), prompt(12), max_new_tokens=10**12, stopping_criteria=criteria
    )
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_token_too_many(pair, limit):
    target, draft = pair
    plain, fast = both(target, ModelDrafter(draft, Chain(4)), prompt(7), max_new_tokens=limit)
    assert torch.equal(plain, fast) and fast.shape[1] == 7 + limit


def test_logits_processors_see_the_tokens_of_their_branch(pair):
    target, draft = pair
    for shape in SHAPES.values():
        options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "eos_token_id": 5}
        plain, fast = both(target, ModelDrafter(draft, shape), prompt(12), max_new_tokens=40, **options)
        assert torch.equal(plain, fast)


def test_stop_strings_are_found_in_the_middle_of_a_tree():
    target, draft, tokenizer = load_mini_llm()
    ids = tokenizer("def __init__(self", return_tensors="pt").input_ids
    whole = target.generate(ids, do_sample=False, max_new_tokens=30)[0]
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [tokenizer.decode(whole[-9:-6])])])
    plain, fast = both(target, ModelDrafter(draft, SHAPES["best"]), ids, stopping_criteria=criteria, max_new_tokens=30)
    assert torch.equal(plain, fast) and fast.shape[1] < len(whole)


class Words:
    """The least of a tokenizer that a streamer needs."""

    def decode(self, ids, **kwargs):
        return " ".join(str(int(i)) for i in ids) + " "


def test_a_streamer_gets_every_token_and_the_end(pair):
    target, draft = pair
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=5)
    _, fast = both(target, ModelDrafter(draft), prompt(6), max_new_tokens=9)
    target.generate(
        prompt(6),
        do_sample=False,
        max_new_tokens=9,
        custom_generate=speculative,
        drafter=ModelDrafter(draft),
        streamer=streamer,
    )
    assert "".join(streamer).split() == [str(i) for i in fast[0, 6:].tolist()]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_cache_may_hold_a_part_of_the_prompt_already(name):
    target = family(name)
    ids = prompt(30)
    plain = target.generate(ids, do_sample=False, max_new_tokens=20)
    for held in (1, 20, 29):
        cache = DynamicCache(config=target.config)
        argument = cache_argument(target)
        target(ids[:, :held], **{argument: cache})
        drafter = ModelDrafter(relative(target), SHAPES["best"])
        options = {"do_sample": False, "max_new_tokens": 20, argument: cache}
        fast = target.generate(ids, custom_generate=speculative, drafter=drafter, **options)
        assert torch.equal(plain, fast)


def test_the_returned_cache_holds_all_but_the_last_token_and_goes_on(pair):
    target, draft = pair
    out = target.generate(
        prompt(12),
        do_sample=False,
        max_new_tokens=15,
        custom_generate=speculative,
        drafter=ModelDrafter(draft, SHAPES["best"]),
        return_dict_in_generate=True,
    )
    cache = getattr(out, cache_argument(target))
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    more = target.generate(out.sequences, do_sample=False, max_new_tokens=8, **{cache_argument(target): cache})
    assert torch.equal(more, target.generate(prompt(12), do_sample=False, max_new_tokens=23))


def test_the_cache_of_a_batch_has_gaps_and_is_not_returned(pair):
    options = {"return_dict_in_generate": True, "custom_generate": speculative, "drafter": ModelDrafter(pair[1])}
    out = pair[0].generate(prompt(12, batch=2), do_sample=False, max_new_tokens=9, **options)
    assert getattr(out, cache_argument(pair[0])) is None


def test_scores_and_logits_are_those_of_plain_decoding(pair):
    target, draft = pair
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, fast = both(target, ModelDrafter(draft, SHAPES["best"]), prompt(12), **options)
    for name in ("scores", "logits"):
        a, b = torch.cat(getattr(plain, name)), torch.cat(getattr(fast, name))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_prompt_in_chunks_is_the_same_prompt(pair):
    target, draft = pair
    plain = target.generate(prompt(30), do_sample=False, max_new_tokens=12)
    _, fast = both(target, ModelDrafter(draft), prompt(30), max_new_tokens=12, prefill_chunk_size=7)
    assert torch.equal(plain, fast)


def test_a_perfect_draft_is_always_accepted(pair):
    target, _ = pair
    drafter = ModelDrafter(target, Chain(4))
    both(target, drafter, prompt(12), max_new_tokens=25)
    done = report(drafter)
    assert done.acceptance == [1, 1, 1, 1]
    assert (done.tokens, done.target_forwards, done.tokens_per_forward) == (25, 5, 5)
    assert done.draft_forwards == 4 * 5
    assert done.mbsu == pytest.approx(5 / (4 + 1))
    for key in ("tokens_per_forward", "mbsu", "acceptance", "seconds"):
        assert key in done.to_dict()
    assert "25 tokens in 5 target forwards" in str(done)


def test_a_draft_of_the_end_token_counts_as_accepted(pair):
    target, _ = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=30)
    drafter = ModelDrafter(target, Chain(4))
    both(target, drafter, prompt(12), eos_token_id=int(plain[0, 12 + 2]))
    assert (report(drafter).tokens, report(drafter).acceptance) == (3, [1, 1, 1])


def test_an_unsure_draft_stops_early(pair):
    target, draft = pair
    fixed, adaptive = ModelDrafter(draft, Chain(8)), ModelDrafter(draft, Chain(8, confidence=0.5))
    for drafter in (fixed, adaptive):
        both(target, drafter, prompt(12), max_new_tokens=60)
    assert report(adaptive).draft_forwards < report(fixed).draft_forwards
    share = [report(d).tokens / report(d).drafted for d in (fixed, adaptive)]
    assert share[1] > share[0]


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


@pytest.mark.skipif(
    not hasattr(DynamicCache, "activate_past_recording"), reason="older hosts fetch a kernel to make the model"
)
def test_models_that_forget_when_tokens_come_at_once_are_refused():
    mamba = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}
    target = other_kind("jamba", **LAYERS, **mamba, use_mamba_kernels=False)
    with pytest.raises(ValueError, match="JambaForCausalLM cannot take drafts"):
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


class HiddenReader:
    """Proposes nothing; keeps what it is shown."""

    reads_hidden_states = True
    forwards = 0

    def begin(self, context):
        self.seen = []

    def cost(self, target):
        return 0.0

    def propose(self, context):
        if context.hidden is not None:
            self.seen += context.hidden[0]
        return [Tree([int(context.ids[0][0, -1])], [ROOT]) for _ in context.ids]


def test_a_drafter_may_read_the_targets_hidden_states(pair):
    target, _ = pair
    drafter = HiddenReader()
    _, fast = both(target, drafter, prompt(12), max_new_tokens=10)
    whole = target(fast, output_hidden_states=True).hidden_states[-1][0, 11:]
    torch.testing.assert_close(torch.stack(drafter.seen), whole[: len(drafter.seen)], atol=1e-5, rtol=1e-5)
    assert len(drafter.seen) >= 8


def quantized(target):
    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers = []
    return cache


BAD = {
    "no drafter": (lambda t, d: {"drafter": None}, "needs drafter="),
    "beams": (lambda t, d: {"num_beams": 2}, "num_beams=2"),
    "no cache": (lambda t, d: {"use_cache": False}, "use_cache=False"),
    "attentions": (lambda t, d: {"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    "static cache": (
        lambda t, d: {cache_argument(t): StaticCache(config=t.config, max_cache_len=64)},
        "dynamic cache, got StaticCache",
    ),
    "quantized cache": (lambda t, d: {cache_argument(t): quantized(t)}, "got QuantizedCache"),
    "other vocabulary": (
        lambda t, d: {"drafter": ModelDrafter(tiny_model(vocab_size=VOCABULARY + 1))},
        f"vocabulary of {VOCABULARY + 1} tokens is not the target's of {VOCABULARY}",
    ),
    "guidance": (lambda t, d: {"guidance_scale": 1.5}, "processors without state, got guidance_scale"),
    "positions": (lambda t, d: {"position_ids": torch.arange(6)[None] * 2}, "got other position_ids"),
    "padding behind": (
        lambda t, d: {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])},
        "the padding must be on the left",
    ),
    "a prompt without what is in the cache": (
        lambda t, d: {"attention_mask": torch.ones(1, 9, dtype=torch.long)},
        "got 6 tokens and a mask of 9",
    ),
    "other device": (lambda t, d: {"drafter": ModelDrafter(tiny_model().to("meta"))}, "the draft is on meta"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_said_in_one_line(pair, what):
    options, message = BAD[what]
    given = {"drafter": ModelDrafter(pair[1]), "max_new_tokens": 4, "do_sample": False} | options(*pair)
    with pytest.raises(ValueError, match=message) as caught:
        pair[0].generate(prompt(6), custom_generate=speculative, **given)
    assert "\n" not in str(caught.value)


class Silent:
    def put(self, tokens):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1, 2]}, "prefix_allowed_tokens_fn for one row only"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty for one row only"),
        ({"streamer": Silent()}, "streams one row only"),
    ],
)
def test_what_tells_rows_apart_is_refused_in_a_batch(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(
            prompt(6, batch=2), custom_generate=speculative, drafter=ModelDrafter(pair[1]), max_new_tokens=4, **options
        )


def test_allowed_tokens_are_asked_for_row_0_whatever_the_drafts(pair):
    target, draft = pair
    for shape in SHAPES.values():
        options = {"prefix_allowed_tokens_fn": lambda row, ids: [[5, 9, 11, 20, 33]][row]}
        plain, fast = both(target, ModelDrafter(draft, shape), prompt(12), **options)
        assert torch.equal(plain, fast)


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="the prompt is empty"):
        speculative(
            pair[0], torch.zeros(1, 0, dtype=torch.long), None, None, pair[0].generation_config, ModelDrafter(pair[1])
        )


def test_a_full_cache_leaves_nothing_to_decode_from(pair):
    target, draft = pair
    cache = DynamicCache(config=target.config)
    target(prompt(6), **{cache_argument(target): cache})
    with pytest.raises(ValueError, match="must be fewer than the prompt's 6"):
        both(target, ModelDrafter(draft), prompt(6), **{cache_argument(target): cache})


def test_encoder_decoder_models_are_refused(pair):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    with pytest.raises(ValueError, match="decoder-only"):
        model.generate(prompt(6), max_new_tokens=4, custom_generate=speculative, drafter=ModelDrafter(pair[1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(0), "length must be at least 1, got 0"),
        (lambda: KBest(nodes=3), "nodes must be at least width"),
        (lambda: Sampled(()), "branching must be positive"),
        (lambda: Sampled(confidence=1.0), r"confidence must be in \[0, 1\), got 1.0"),
        (lambda: Sampled(sampler="beam"), "sampler must be one of"),
        (lambda: Sampled(verifier="k_seq"), "verifier for sampler"),
    ],
)
def test_shapes_check_their_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_drafter_without_a_generation_has_no_report():
    with pytest.raises(ValueError, match="has not been used"):
        report(ModelDrafter(tiny_model()))


def test_the_hosts_own_assisted_decoding_goes_wrong_where_ours_does_not(pair):
    """With a cache that holds a part of the prompt the host feeds the whole prompt again (transformers 5.8 to 5.24).
    When this fails the host has been mended, and the README may say so."""
    target, draft = pair
    ids = prompt(30)
    plain = target.generate(ids, do_sample=False, max_new_tokens=12)

    def from_cache(**options):
        cache = DynamicCache(config=target.config)
        target(ids[:, :20], **{cache_argument(target): cache})
        return target.generate(ids, do_sample=False, max_new_tokens=12, **{cache_argument(target): cache}, **options)

    assert torch.equal(from_cache(), plain)
    assert torch.equal(from_cache(custom_generate=speculative, drafter=ModelDrafter(draft)), plain)
    unused = next(token for token in range(VOCABULARY) if token not in plain[0, 30:])
    assert not torch.equal(from_cache(prompt_lookup_num_tokens=3, eos_token_id=unused), plain)
