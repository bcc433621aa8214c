"""The last scales without their unconditional half: what is drawn, what is held, and that it comes off."""

from contextlib import contextmanager

import pytest
import torch

from tests.var import tiny, tiny_infinity


def var():
    return tiny.var_pipeline(num_layers=3), {"class_labels": [1, 2], "guidance_scale": 2.0}


def infinity():
    return tiny_infinity.infinity_pipeline(), {"prompt": ["a red circle", "the green square"], "size": "0.06M"}


def pair():
    pipe, call = var()
    pipe.enable_collaborative(tiny.transformer(7), 3)
    return pipe, call


def run(pipe, **call):
    """Latents, logits of each scale, and the rows and bytes of the cache after each."""
    logits, rows, held = [], [], []

    def look(_pipe, _scale, _step, tensors):
        cache = tensors["cache"]
        logits.append(tensors["logits"])
        rows.append({len(key) for key in cache.keys.values()})
        held.append(cache.nbytes)
        return {}

    looking = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["cache", "logits"]}
    generator = torch.Generator().manual_seed(0)
    latents = pipe(**call, **looking, generator=generator, output_type="latent").images
    return latents, logits, rows, held


@contextmanager
def seen_rows(model, found):
    handle = model.register_forward_hook(lambda _model, _given, out: found.append(len(out[0])))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("make", [var, infinity, pair])
@pytest.mark.parametrize("last", [1, 2, 4, 99])
def test_late_scales_are_the_conditional_half_alone_and_early_ones_as_before(make, last):
    pipe, call = make()
    plain, logits, rows, _ = run(pipe, **call)
    scales = len(logits)
    unguided = min(last, scales - 1)
    pipe.enable_unguided_scales(last)
    found = []
    with seen_rows(pipe.transformer if make is not pair else pipe.refiner, found):
        late, late_logits, late_rows, _ = run(pipe, **call)
    assert rows == [{4}] * scales
    assert late_rows == [{4}] * (scales - unguided) + [{2}] * unguided
    assert found == [4 if scale < scales - unguided else 2 for scale in range(scales)][-len(found) :]
    for scale in range(scales - unguided):
        assert torch.equal(logits[scale], late_logits[scale])
    assert late_logits[-1].shape == logits[-1].shape and not torch.equal(plain, late)
    pipe.disable_unguided_scales()
    assert torch.equal(plain, run(pipe, **call)[0])


@pytest.mark.parametrize("make", [var, infinity])
def test_a_late_scale_has_the_logits_of_guidance_that_is_off(make):
    """At scales whose history was drawn with guidance, the conditional half sees just that history."""
    pipe, call = make()
    pipe.enable_unguided_scales(1)
    _, late, _, _ = run(pipe, **call)
    pipe.disable_unguided_scales()
    found = []
    forward = pipe.transformer.forward

    def keep(*given, **options):
        out = forward(*given, **options)
        found.append(out[0].float())
        return out

    pipe.transformer.forward = keep
    run(pipe, **call)
    expected = pipe.scheduler.guide(found[-1].chunk(2)[0], len(found) - 1, None)
    torch.testing.assert_close(late[-1], expected, atol=1e-5, rtol=1e-5)


def test_with_budgets_half_of_what_they_hold_is_let_go():
    pipe, call = infinity()
    pipe.enable_scale_kv(0.2)
    _, _, _, held = run(pipe, **call)
    pipe.enable_unguided_scales(1)
    _, _, rows, late = run(pipe, **call)
    assert late[:-1] == held[:-1] and late[-1] == held[-1] // 2 and rows[-1] == {2}


def test_without_guidance_there_is_nothing_to_leave_out():
    pipe, call = var()
    call["guidance_scale"] = 0
    plain = run(pipe, **call)[0]
    pipe.enable_unguided_scales(3)
    assert torch.equal(plain, run(pipe, **call)[0])


@pytest.mark.parametrize("scales", [0, -1, 1.5, True, "two", None])
def test_a_number_of_scales_that_cannot_be_is_named(scales):
    pipe, _ = var()
    with pytest.raises(ValueError, match=f"unguided scales must be a whole number from 1 on, got {scales!r}"):
        pipe.enable_unguided_scales(scales)
