"""The class-conditional transformer: what one forward of many scales and many forwards of one scale have in common."""

import math

import pytest
import torch
import torch.nn.functional as F

from draftdiff.var.cache import KVCache
from draftdiff.var.layers import CosineAttention, Step
from tests.rounding import rounded
from tests.var import tiny


def inputs_and_labels(batch=3):
    generator = torch.Generator().manual_seed(3)
    tokens = sum(side**2 for side in tiny.PATCH_NUMS) - 1
    return torch.randn(batch, tokens, 4, generator=generator), torch.arange(batch)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_scales_through_a_cache_give_the_logits_of_one_forward(shared_adaln):
    model = tiny.transformer(shared_adaln=shared_adaln)
    inputs, labels = inputs_and_labels()
    with torch.no_grad():
        whole = rounded(lambda: model(inputs, labels).sample)
        cache, parts, start = KVCache(), [], 0
        for scale, side in enumerate(tiny.PATCH_NUMS):
            mine = inputs[:, start : start + side**2] if scale else None
            start += side**2 if scale else 0
            parts.append(model(mine, labels, first_scale=scale, cache=cache).sample)
    whole.check(torch.cat(parts, dim=1))
    assert cache.tokens() == inputs.shape[1] + 1


def test_attention_over_many_scales_is_the_masked_softmax_of_its_definition():
    layer = tiny.enliven(CosineAttention(24, 3), 0)
    layer.log_scale.data[0] = 5  # above the clamp
    x, lengths = torch.randn(2, 14, 24), [1, 4, 9]

    def definition():
        q, k, v = layer.to_qkv(x).view(2, 14, 3, 3, 8).permute(2, 0, 3, 1, 4)
        stretch = layer.log_scale.clamp(max=math.log(100)).exp()
        scores = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) * stretch[:, None, None]
        levels = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        weights = scores.masked_fill(levels[:, None] < levels, -torch.inf).softmax(-1)
        return layer.to_out((weights @ v).transpose(1, 2).flatten(2))

    rounded(definition).check(layer(x, Step(lengths)))


def test_no_logit_depends_on_a_later_scale():
    model = tiny.transformer()
    inputs, labels = inputs_and_labels()
    changed = inputs.clone()
    changed[:, model.starts[3] - 1 :] += 1  # from scale 3 on
    with torch.no_grad():
        before, after = model(inputs, labels).sample, model(changed, labels).sample
    assert torch.equal(before[:, : model.starts[3]], after[:, : model.starts[3]])
    assert not torch.allclose(before[:, model.starts[3] :], after[:, model.starts[3] :])


def test_the_head_can_be_kept_to_the_last_scale():
    model = tiny.transformer()
    inputs, labels = inputs_and_labels()
    with torch.no_grad():
        whole = rounded(lambda: model(inputs, labels).sample[:, model.starts[-2] :])
        whole.check(model(inputs, labels, logits_from=len(tiny.PATCH_NUMS) - 1).sample)


def test_a_number_of_tokens_between_scales_is_an_error():
    with pytest.raises(ValueError, match=r"from scale 0 the tokens must be one of \[0, 4, 13, 29, 65, 129\], got 7"):
        tiny.transformer()(torch.zeros(1, 6, 4), torch.tensor([0]))


def test_training_reaches_every_parameter():
    model = tiny.transformer(shared_adaln=True).train()
    inputs, labels = inputs_and_labels()
    model(inputs, labels).sample.square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny.transformer().train()
    inputs, labels = inputs_and_labels()
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            model.enable_gradient_checkpointing()
        model(inputs, labels).sample.square().mean().backward()
        gradients.append(model.blocks[0].attn.to_qkv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_cache_with_fp32_keys_costs_half_as_much_again_and_changes_nothing_in_half_precision(bf16_attention):
    model = tiny.transformer().to(torch.bfloat16)
    inputs, labels = inputs_and_labels()
    inputs = inputs.to(torch.bfloat16)
    caches = [KVCache(), KVCache(torch.float32)]
    logits = []
    with torch.no_grad():
        for cache in caches:
            model(inputs[:, : model.starts[-2] - 1], labels, cache=cache)
            logits.append(model(inputs[:, model.starts[-2] - 1 :], labels, first_scale=5, cache=cache).sample)
    assert torch.equal(*logits)
    assert caches[1].nbytes == 1.5 * caches[0].nbytes
