"""The names of transformers that draftdiff.llm relies on, on the installed version: what is gone is named here."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.generation import PrefixConstrainedLogitsProcessor, logits_process

from draftdiff.hosts import transformers as host
from draftdiff.hosts.transformers_quirks import QUIRKS, learned_positions, other_arguments, quirk, quirks_of_model
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_hybrid, tiny_model

GONE = f"transformers {transformers.__version__} has no"

PRIVATE = {
    "GenerationMixin._assisted_decoding": lambda: GenerationMixin._assisted_decoding,
    "GenerationMixin._get_candidate_generator": lambda: GenerationMixin._get_candidate_generator,
    "PretrainedConfig._attn_implementation": lambda: AutoConfig.for_model("llama")._attn_implementation,
    "PretrainedConfig._attn_implementation_internal": lambda: (
        AutoConfig.for_model("llama")._attn_implementation_internal
    ),
    "AttentionInterface._global_mapping": lambda: AttentionInterface._global_mapping["sdpa"],
    "AttentionMaskInterface._global_mapping": lambda: AttentionMaskInterface._global_mapping["sdpa"],
    "modeling_llama.ALL_ATTENTION_FUNCTIONS": lambda: (
        transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface
    ),
    "modeling_llama.eager_attention_forward": lambda: transformers.models.llama.modeling_llama.eager_attention_forward,
    "PrefixConstrainedLogitsProcessor._prefix_allowed_tokens_fn": lambda: (
        PrefixConstrainedLogitsProcessor(len, 1)._prefix_allowed_tokens_fn
    ),
    "DynamicLayer.is_initialized": lambda: DynamicLayer().is_initialized,
    "DynamicSlidingWindowLayer.cumulative_length": lambda: (
        DynamicSlidingWindowLayer(sliding_window=4).cumulative_length
    ),
    "cache_utils.DummyLayer or a host before it": lambda: (
        Version(transformers.__version__) < Version("5.24") or transformers.cache_utils.DummyLayer
    ),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_is_there(name):
    try:
        PRIVATE[name]()
    except (AttributeError, KeyError):
        pytest.fail(f"{GONE} {name}: see draftdiff/hosts/transformers.py")


KNOWN = {
    "model": lambda name: name in CONFIG_MAPPING,
    "layer": lambda name: name in ALLOWED_LAYER_TYPES,
    "config": lambda name: hasattr(AutoConfig.for_model("falcon"), name),
    "module": lambda name: True,  # asked of models below
    "processor": lambda name: hasattr(logits_process, name),
    "setting": lambda name: hasattr(GenerationConfig(), name),
    "argument": lambda name: True,  # older and newer hosts hand over others
}


@pytest.mark.parametrize("row", QUIRKS, ids=lambda row: f"{row.of} {row.name}")
def test_a_row_of_the_table_is_about_something_that_there_is(row):
    assert KNOWN[row.of](row.name), f"{GONE} {row.of} {row.name}: see draftdiff/hosts/transformers_quirks.py"
    assert row.why or row.effect not in ("refused", "chains", "one row") or row.of == "setting"


def test_no_name_has_two_rows():
    assert len({(row.of, row.name) for row in QUIRKS}) == len(QUIRKS)


def test_a_quirk_ends_with_the_version_that_mended_it():
    mended = Version(transformers.__version__) >= Version("5.15")
    assert (quirk("layer", "conv") is None) == mended == hasattr(DynamicCache, "activate_past_recording")
    assert [row.name for row in quirks_of_model(tiny_hybrid("lfm2"), "refused")] == ([] if mended else ["conv"])
    assert quirk("model", "bloom", "refused") is None and quirk("model", "bloom", "refused", "chains") is not None


def test_a_cache_goes_in_and_comes_out_under_the_name_that_the_model_has_for_it():
    model, ids = tiny_model(), prompt(6)
    name, cache = host.cache_argument(model), DynamicCache()
    assert getattr(model(ids, **{name: cache}), name) is cache and cache.get_seq_length() == 6
    assert getattr(host.generate_output(ids, cache), name) is cache


def test_the_last_logits_come_alone():
    model = tiny_model()
    assert host.takes_positions(model)
    assert model(prompt(6), **host.last_logits_only(model)).logits.shape == (1, 1, VOCABULARY)


def test_recurrent_layers_of_a_cache_are_told_from_attention():
    for kind in ("qwen3_next", "lfm2"):
        model, cache = tiny_hybrid(kind), DynamicCache(config=tiny_hybrid(kind).config)
        with torch.no_grad():
            model(prompt(6), **{host.cache_argument(model): cache})
        assert [host.is_recurrent(layer) for layer in cache.layers] == [True, False] * 2
        assert not any(host.borrows_keys(layer) for layer in cache.layers)


class Seen(Exception):
    pass


def handed_over(model, ids, **options):
    """What generate gives a callable: (its config, other arguments), and what the walk finds."""

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, wanted=(), **given):
        found = {name: host.given_to_generate(model, name) for name in ("streamer", "assistant_model")}
        raise Seen(generation_config, given, found)

    with pytest.raises(Seen) as seen:
        model.generate(ids, custom_generate=decode, max_new_tokens=4, **options)
    return seen.value.args


class Silent:
    def put(self, tokens):
        pass


def test_a_callable_learns_of_streamer_and_assistant_by_the_walk_alone():
    """When this fails because `given` holds them, the host has begun to pass them on, and the walk can go."""
    model, streamer, assistant = tiny_model(), Silent(), tiny_model(seed=1)
    _, given, found = handed_over(model, prompt(6), streamer=streamer, assistant_model=assistant)
    assert found == {"streamer": streamer, "assistant_model": assistant}
    assert "streamer" not in given and "assistant_model" not in given
    assert handed_over(model, prompt(6))[2] == {"streamer": None, "assistant_model": None}
    assert host.given_to_generate(model, "streamer") is None


def test_end_and_padding_tokens_are_those_of_the_call():
    config, given, _ = handed_over(tiny_model(), prompt(6), eos_token_id=[5, 7], pad_token_id=3)
    assert host.end_tokens(config) == [5, 7] and int(host.padding_token(config)) == 3
    assert other_arguments(tiny_model(), given) == []
    assert host.end_tokens(handed_over(tiny_model(), prompt(6))[0]) == []


def test_a_users_function_of_allowed_tokens_is_found_again():
    assert host.allowed_tokens(PrefixConstrainedLogitsProcessor(max, 1)) is max


def test_a_name_is_in_no_registry_once_forgotten():
    AttentionInterface.register("draftdiff_test", print)
    AttentionMaskInterface.register("draftdiff_test", print)
    for _ in range(2):
        host.forget_attention("draftdiff_test")
        assert "draftdiff_test" not in AttentionInterface() and "draftdiff_test" not in AttentionMaskInterface()


def test_the_attention_of_a_config_is_set_unchecked():
    config = tiny_model().config
    assert host.attention_name(config) == "sdpa"
    host.set_attention_name(config, "anything")
    assert host.attention_name(config) == "anything"


def other(kind, **sizes):
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def test_models_that_look_attention_up_are_told_from_those_that_do_not():
    assert host.dispatches_attention(tiny_model())
    assert host.dispatches_attention(other("gpt2", n_embd=32, n_layer=1, n_head=2))
    assert not host.dispatches_attention(other("bloom", hidden_size=32, n_layer=1, n_head=2))
    module = tiny_model().model.layers[0].self_attn
    assert host.attention_of(module, "eager") is transformers.models.llama.modeling_llama.eager_attention_forward
    assert host.attention_of(module, "sdpa") is AttentionInterface._global_mapping["sdpa"]


TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48, "rotary_dim": 8},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 48,
    },
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 48,
        "is_decoder": True,
    },
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_positions_is_found(kind):
    model = other(kind, **TABLES[kind])
    assert learned_positions(model) == 48
    with torch.no_grad():
        model(prompt(48))
        with pytest.raises((IndexError, RuntimeError)):
            model(prompt(1), position_ids=torch.tensor([[52]]))


def test_computed_positions_have_no_end():
    assert learned_positions(tiny_model()) is None
