"""Collaborative decoding: the invariants that need no original."""

import gc
import weakref
from functools import partial

import pytest
import torch

from draftdiff.var.cache import KVCache
from draftdiff.var.collaborative import CollaborativeDecoder
from draftdiff.var.decoding import ScaleDecoder
from draftdiff.var.vq_model import PATCH_NUMS_256, PATCH_NUMS_512
from tests.var import tiny


def latents(pipe, **call):
    arguments = {"class_labels": [1, 4], "generator": torch.Generator().manual_seed(2), "output_type": "latent"}
    return pipe(**arguments | call).images


@pytest.mark.parametrize("rng", ["fast", "upstream"])
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_a_model_that_refines_itself_is_plain_var_for_every_number_of_drafted_scales(rng, guidance_scale):
    pipe = tiny.var_pipeline()
    plain = latents(pipe, rng=rng, guidance_scale=guidance_scale)
    for drafted in range(1, len(tiny.PATCH_NUMS)):
        pipe.enable_collaborative(pipe.transformer, drafted)
        assert torch.equal(latents(pipe, rng=rng, guidance_scale=guidance_scale), plain)
    pipe.disable_collaborative()
    assert torch.equal(latents(pipe, rng=rng, guidance_scale=guidance_scale), plain)


@pytest.mark.parametrize("patch_nums", [PATCH_NUMS_256, PATCH_NUMS_512], ids=["256px", "512px"])
def test_every_schedule_works_with_a_model_of_another_depth_and_width(patch_nums):
    pipe = tiny.var_pipeline(patch_nums)
    refiner = tiny.transformer(7, patch_nums=patch_nums, num_layers=1, num_attention_heads=1, shared_adaln=True)
    plain = latents(pipe, class_labels=1)
    for drafted in (1, 6, 9):
        pipe.enable_collaborative(refiner, drafted)
        mixed = latents(pipe, class_labels=1)
        assert mixed.shape == plain.shape and not torch.equal(mixed, plain)


def test_the_drafted_scales_are_the_drafters_and_the_rest_continues_them():
    pipe, drafted = tiny.var_pipeline(), 4
    steps = {}

    def record(name):
        def callback(_pipe, scale, _step, tensors):
            steps[name, scale] = tensors["latents"]

        return callback

    latents(pipe, callback_on_step_end=record("plain"))
    pipe.enable_collaborative(tiny.transformer(7), drafted)
    latents(pipe, callback_on_step_end=record("both"))
    for scale in range(len(tiny.PATCH_NUMS)):
        assert torch.equal(steps["plain", scale], steps["both", scale]) == (scale < drafted)


def decoder_of(model):
    return ScaleDecoder(partial(model, class_labels=torch.tensor([1])), KVCache(), len(tiny.PATCH_NUMS))


def test_the_drafters_cache_is_gone_when_the_refiner_starts():
    drafter, refiner = tiny.transformer(0), tiny.transformer(7)
    decoder = CollaborativeDecoder(drafter, refiner, 3, decoder_of)
    held, seen = [], {}
    with torch.no_grad():
        for scale in range(3):
            decoder.logits(scale, None if scale == 0 else torch.randn(1, tiny.PATCH_NUMS[scale] ** 2, 4))
        held = [weakref.ref(t) for t in (*decoder.active.cache.keys.values(), *decoder.active.cache.values.values())]
        assert len(held) == 4

        def look(_module, _arguments):
            gc.collect()
            seen["alive"] = [ref for ref in held if ref() is not None]

        refiner.register_forward_pre_hook(look)
        decoder.logits(3, torch.randn(1, 16, 4))
    assert seen["alive"] == []
    assert decoder.active.cache.tokens() == 1 + 4 + 9 + 16


def test_the_last_scale_is_never_cached():
    made = []

    def recorded(model):
        made.append(decoder_of(model))
        return made[-1]

    decoder = CollaborativeDecoder(tiny.transformer(0), tiny.transformer(7), 5, recorded)
    with torch.no_grad():
        for scale, side in enumerate(tiny.PATCH_NUMS):
            decoder.logits(scale, torch.randn(1, side**2, 4) if scale else None)
    assert [each.cache.tokens() for each in made] == [0, 0]  # dropped, and never filled by a refiner of one scale


@pytest.mark.parametrize("drafted", [0, 6, -1, 2.5, True])
def test_a_number_of_drafted_scales_out_of_range_is_an_error(drafted):
    pipe = tiny.var_pipeline()
    with pytest.raises(ValueError, match=f"draft_scales must be a whole number from 1 to 5, got {drafted}"):
        pipe.enable_collaborative(tiny.transformer(7), drafted)
    assert pipe.refiner is None


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 64), ("num_classes", 9), ("in_channels", 8), ("patch_nums", (1, 2, 8))]
)
def test_models_that_do_not_share_codes_classes_and_scales_are_an_error(name, value):
    with pytest.raises(ValueError, match=f"drafter and refiner must have the same {name}, got .* and .*{value}"[:60]):
        tiny.var_pipeline().enable_collaborative(tiny.transformer(7, **{name: value}), 2)


def test_the_refiners_first_cache_holds_no_memory_but_its_own():
    pipe, sizes = tiny.var_pipeline(), []

    def look(_pipe, scale, _step, tensors):
        sizes.append((tensors["cache"].tokens(), tensors["cache"].nbytes))
        return {}

    pipe.enable_collaborative(tiny.transformer(7, num_layers=3, num_attention_heads=1), 4)
    latents(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["cache"])
    # Keys and values in fp32 of twice two pictures: two layers of two heads, then three of one, of 16 channels.
    expected = [tokens * 2 * 4 * 2 * 2 * 16 * (4 if scale < 4 else 3) for scale, (tokens, _) in enumerate(sizes)]
    assert [nbytes for _, nbytes in sizes] == expected
