"""The observer changes nothing, sees what the attention really is, and is gone afterwards."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from draftdiff.llm import SparsePrefill, SpecKVConfig, speckv
from draftdiff.llm.observe import AttentionCall, observing
from tests.llm.attention import attend
from tests.llm.rounding import assert_rounded
from tests.llm.tiny_models import FAMILIES, VOCABULARY, prompt, tiny_model

FAMILIES_AND_ATTENTIONS = [(family, None) for family in FAMILIES] + [("llama", "eager"), ("gemma3_text", "eager")]


def names():
    """Of all attentions. Names that other threads used go later: compare what is added."""
    return {*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping}


def padded(length, *pads):
    mask = torch.ones(len(pads), length, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return prompt(length, batch=len(pads)), mask


@pytest.mark.parametrize(("family", "attention"), FAMILIES_AND_ATTENTIONS)
@pytest.mark.parametrize("pads", [(0,), (0, 5)])
@torch.no_grad()
def test_outputs_are_bit_identical_and_everything_is_restored(family, attention, pads):
    model = tiny_model(family, attention=attention)
    ids, mask = padded(40, *pads)
    given = {"attention_mask": mask} if any(pads) else {}
    before, own = names(), model.config._attn_implementation
    plain = model(ids, **given).logits
    seen = []
    with observing(model, lambda call: seen.append((call.layer, tuple(call.query.shape), tuple(call.key.shape)))):
        watched = model(ids, **given).logits
    assert torch.equal(watched, plain)
    head_dim = model.config.head_dim if hasattr(model.config, "head_dim") else 16
    shapes = (len(pads), 4, 40, head_dim), (len(pads), 2, 40, head_dim)
    assert seen == [(layer, *shapes) for layer in range(3)]
    assert names() <= before and model.config._attn_implementation == own
    assert torch.equal(model(ids, **given).logits, plain) and len(seen) == 3


@pytest.mark.parametrize(("family", "attention"), FAMILIES_AND_ATTENTIONS)
@torch.no_grad()
def test_attention_written_out_from_what_is_seen_is_the_models_own(family, attention):
    """Scale, soft cap, sliding window, padding and grouped queries; for a prompt and for tokens after it."""
    model = tiny_model(family, attention=attention)
    ids, mask = padded(40, 0, 7)

    def run():
        first = model(ids[:, :36], attention_mask=mask[:, :36], use_cache=True)
        cache = first.cache if "cache" in first else first.past_key_values
        name = "cache" if "cache" in first else "past_key_values"
        rest = [model(ids[:, 36 + i : 37 + i], attention_mask=mask[:, : 37 + i], **{name: cache}) for i in range(2)]
        return torch.cat([first.logits[mask[:, :36].bool()], *(out.logits[:, 0] for out in rest)])

    plain = run()
    with observing(model, lambda call: attend(call, call.readable(call.query.shape[2]))):
        written_out = run()
    assert_rounded(written_out, plain, model, ids)
    with observing(model, lambda call: attend(call, torch.ones_like(call.readable(call.query.shape[2])))):
        assert (run() - plain).abs().max() > 0.1 * plain.abs().max()  # the mask matters


def test_the_last_rows_of_the_mask_are_those_of_the_last_queries():
    calls = []
    model = tiny_model("mistral sliding")
    with torch.no_grad(), observing(model, calls.append):
        model(prompt(40))
        model(prompt(10))  # within the window: the host leaves the mask out
    position = torch.arange(40)
    expected = (position <= position[:, None]) & (position > position[:, None] - 16)
    assert torch.equal(calls[0].readable(5), expected[None, None, -5:])
    assert calls[-1].mask is None
    assert torch.equal(calls[-1].readable(4), expected[None, None, 6:10, :10])


def test_masks_of_the_flash_kind_are_spelt_out():
    """They come as padding [batch, keys] and a window, or as nothing."""
    key = torch.zeros(2, 1, 6, 4)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    call = AttentionCall(0, torch.nn.Identity(), key[:, :, -2:], key, key, 1.0, padding, sliding_window=3)
    assert call.readable(2)[0, 0].int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert call.readable(2)[1, 0].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    open_mask = AttentionCall(0, torch.nn.Identity(), key, key, key, 1.0, None, sliding_window=3)
    assert open_mask.readable(1).int().tolist() == [[[[0, 0, 0, 1, 1, 1]]]]
    with pytest.raises(ValueError, match="attention masks must be tensors, got object"):
        AttentionCall(0, torch.nn.Identity(), key, key, key, 1.0, object()).readable(1)


def test_an_exception_restores_everything():
    model, before = tiny_model(), names()

    def fail(call):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), observing(model, fail):
        model(prompt(8))
    assert names() <= before and model.config._attn_implementation == "sdpa"


def test_observers_may_be_nested_and_models_watched_side_by_side():
    model, other = tiny_model(), tiny_model("gemma2")
    seen = []
    with torch.no_grad(), observing(model, lambda call: seen.append("outer")):
        with observing(other, lambda call: seen.append("other")), observing(model, lambda call: seen.append("inner")):
            model(prompt(8))
            other(prompt(8))
        model(prompt(8))
    assert seen == ["inner", "outer"] * 3 + ["other"] * 3 + ["outer"] * 3
    assert model.config._attn_implementation == "sdpa" and other.config._attn_implementation == "eager"


def test_a_model_with_attention_of_its_own_kind_is_an_error():
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2, vocab_size=96)
    model, before = AutoModelForCausalLM.from_config(config), names()
    with pytest.raises(ValueError, match="AttentionInterface, BloomForCausalLM does not"), observing(model, print):
        pass
    assert names() <= before


def tiny_gpt_oss():
    """Attention with sinks, a score beyond all keys that takes part of the attention."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.tensor([4.0, -3.0, 2.0, 0.0])
    return model


@torch.no_grad()
def test_sinks_take_their_share_of_the_attention():
    model, ids, masses = tiny_gpt_oss(), prompt(40), {}
    maps = model(ids, output_attentions=True).attentions
    with observing(model, lambda call: masses.update({call.layer: call.mass(8)})):
        model(ids)
    for layer, attention in enumerate(maps):
        expected = attention[:, :, -8:].sum(2).unflatten(1, (2, 2)).sum(2)
        assert float(expected.sum()) < 0.9 * 8 * 4  # of eight queries and four heads
        torch.testing.assert_close(masses[layer], expected, rtol=1e-4, atol=1e-5)


def test_reading_sparsely_with_sinks_is_refused():
    config = SpecKVConfig(capacity=20, window=6, lookahead=0, sparse_prefill=SparsePrefill(columns=16, local=64))
    with pytest.raises(ValueError, match="without attention sinks, GptOssAttention has them"):
        speckv(tiny_gpt_oss(), None, prompt(100), config)


def test_threads_that_observe_a_model_take_turns():
    model, ids, config = tiny_model(), prompt(60), SpecKVConfig(capacity=20, window=6, lookahead=0)
    before = names()

    def kept(_=None):
        return torch.stack(list(speckv(model, None, ids, config, return_indices=True)[1].indices.values()))

    expected = kept()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, expected) for one in pool.map(kept, range(24)))
    assert names() <= before


def test_another_threads_use_of_the_model_is_not_observed():
    model, ids, threads, before = tiny_model(), prompt(20), set(), names()
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    with ThreadPoolExecutor(1) as pool, observing(model, lambda call: threads.add(threading.get_ident())):
        model(ids)
        other = pool.submit(model.generate, ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(other.result(), plain)
    assert threads == {threading.get_ident()} and model.config._attn_implementation == "sdpa"
    (left,) = names() - before  # the other thread may have been about to look it up
    with observing(model, lambda call: None):
        model(ids)
    assert names() <= before
    with ThreadPoolExecutor(1) as pool, observing(model, lambda call: None):
        pool.submit(model, ids).result()
    assert len(names() - before) == 1 and left not in names()
    del model
    gc.collect()
    assert names() <= before  # it went with the model


def test_threads_with_a_model_each_do_not_disturb_each_other():
    ids, before = prompt(20), names()

    def observed(seed):
        model, layers = tiny_model(seed=seed), []
        for _ in range(20):
            with observing(model, lambda call: layers.append(call.layer)):
                model(ids)
        return layers

    with ThreadPoolExecutor(4) as pool:
        assert all(layers == [0, 1, 2] * 20 for layers in pool.map(observed, range(4)))
    assert names() <= before


def test_an_observed_model_can_be_copied():
    model = tiny_model()
    with observing(model, lambda call: None):
        model(prompt(6))
    again, seen = copy.deepcopy(model), []
    with observing(again, seen.append):
        again(prompt(6))
    assert len(seen) == 3
