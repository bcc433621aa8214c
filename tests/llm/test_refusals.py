"""What the loop cannot do is said in one line before it decodes."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import Chain, KBest, ModelDrafter, Sampled, report, speculative
from tests.llm.generation import both
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model


def quantized(target):
    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers = []
    return cache


def tiny_t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


BAD = {
    "no drafter": (lambda t, d: {"drafter": None}, "needs drafter="),
    "a model": (lambda t, d: {"drafter": d}, "needs drafter=..., .* got LlamaForCausalLM"),
    "a class": (lambda t, d: {"drafter": ModelDrafter}, "needs drafter=..., .* got ModelDrafter"),
    "an encoder-decoder draft": (lambda t, d: {"drafter": ModelDrafter(tiny_t5())}, "a draft must be a decoder-only"),
    "another way": (lambda t, d: {"prompt_lookup_num_tokens": 3}, "of its own, got prompt_lookup_num_tokens, too"),
    "an assistant": (lambda t, d: {"assistant_model": d}, "in place of an assistant_model"),
    "beams": (lambda t, d: {"num_beams": 2}, "num_beams=2"),
    "no cache": (lambda t, d: {"use_cache": False}, "use_cache=False"),
    "attentions": (lambda t, d: {"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    "static cache": (
        lambda t, d: {cache_argument(t): StaticCache(config=t.config, max_cache_len=64)},
        "dynamic cache, got StaticCache",
    ),
    "quantized cache": (lambda t, d: {cache_argument(t): quantized(t)}, "got QuantizedCache"),
    "other vocabulary": (
        lambda t, d: {"drafter": ModelDrafter(tiny_model(vocab_size=VOCABULARY + 1024))},
        f"vocabulary of {VOCABULARY + 1024} tokens is not the target's of {VOCABULARY}",
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
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty for one row only"),
        ({"streamer": Silent()}, "streams one row only"),
    ],
)
def test_what_tells_rows_apart_is_refused_in_a_batch(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(
            prompt(6, batch=2), custom_generate=speculative, drafter=ModelDrafter(pair[1]), max_new_tokens=4, **options
        )


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
    model = tiny_t5()
    with pytest.raises(ValueError, match="decoder-only"):
        model.generate(prompt(6), max_new_tokens=4, custom_generate=speculative, drafter=ModelDrafter(pair[1]))


def test_encoders_are_refused(pair):
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="reads text both ways: set is_decoder=True in its config"):
        both(model, ModelDrafter(pair[1]), prompt(6))


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
