"""The observer changes nothing, sees what the attention really is, and is gone afterwards."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from draftdiff.llm.observe import AttentionCall, observing
from tests.llm.attention import attend
from tests.llm.tiny_models import FAMILIES, prompt, tiny_model

FAMILIES_AND_ATTENTIONS = [(family, None) for family in FAMILIES] + [("llama", "eager"), ("gemma3_text", "eager")]


def names():
    return set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)


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
    assert names() == before and model.config._attn_implementation == own
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
    assert (written_out - plain).abs().max() <= 1e-4 * plain.abs().max()
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
    assert names() == before and model.config._attn_implementation == "sdpa"


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
    assert names() == before
