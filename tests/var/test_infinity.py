"""Infinity's parts: sizes of the released models, schedules, the cached loop, bits and names."""

import math
from itertools import pairwise

import pytest
import torch

from draftdiff.var.autoencoder_bsq import AutoencoderBSQ, codes_of
from draftdiff.var.cache import KVCache
from draftdiff.var.sampling import DRAWS
from draftdiff.var.scheduler_infinity import InfinityScheduler
from draftdiff.var.schedules import SCHEDULES, SIZES, reference_grid, scales_for, scales_for_pixels
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel, rotate, rotations
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import PATCH_NUMS_512, VQModel
from tests.rounding import rounded
from tests.var import tiny, tiny_infinity

SCALES = SCHEDULES[1.5][:6]


def millions(model) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)


def test_the_released_configurations_have_the_released_numbers_of_parameters():
    with torch.device("meta"):
        assert millions(InfinityTransformer2DModel()) == pytest.approx(2205, abs=0.5)
        assert millions(InfinityTransformer2DModel(40, 28, 128, bits=56)) == pytest.approx(8376, abs=0.5)
        for depth, expected in ((16, 310.3), (20, 600.9), (24, 1033.4), (30, 2010.0)):
            assert millions(VARTransformer2DModel(depth, depth)) == pytest.approx(expected, abs=0.11)
        large = VARTransformer2DModel(36, 36, shared_adaln=True, patch_nums=PATCH_NUMS_512)
        assert millions(large) == pytest.approx(2353.9, abs=0.11)
        assert millions(VQModel()) == 108.9
        assert millions(AutoencoderBSQ()) == 110.1
        assert millions(AutoencoderBSQ((128, 256, 512, 512), latent_channels=14)) == 81.6


@pytest.mark.parametrize(
    ("depth", "dim", "heads"), [(12, 768, 8), (16, 1152, 12), (24, 1536, 16), (32, 2080, 20), (40, 2688, 24)]
)
def test_every_training_size_can_be_built(depth, dim, heads):
    with torch.device("meta"):
        model = InfinityTransformer2DModel(depth, heads, dim // heads)
    assert model.proj_out.in_features == dim and model.blocks[0].ff.linear_in.out_features == round(dim / 64) * 256


def test_schedules_grow_and_keep_their_aspect_ratio():
    assert len(SCHEDULES) == 15
    for ratio, scales in SCHEDULES.items():
        assert len(scales) == 13 and scales[0] == (1, 1)
        for before, after in pairwise(scales):
            assert after[0] >= before[0] and after[1] >= before[1] and after != before
        for count in SIZES.values():
            assert scales[count - 1][0] / scales[count - 1][1] == pytest.approx(ratio, abs=0.011)
            assert reference_grid(scales[:count]) == scales[-1]


def test_a_size_in_pixels_finds_its_schedule():
    assert scales_for_pixels(1024, 1024) == scales_for(1.0, "1M")
    assert scales_for_pixels(336, 224) == scales_for(1.5, "0.06M")
    assert scales_for_pixels(224, 336) == scales_for(0.666, "0.06M")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scales_for(1.1, "1M"), r"unknown aspect ratio \(height / width\) 1.1; known are 0.333, 0.4"),
        (lambda: scales_for(1.0, "2M"), "size must be one of 0.06M, 0.25M, 0.60M, 1M, got '2M'"),
        (lambda: scales_for_pixels(1000, 1000), r"no schedule ends at 1000x1000 pixels; near it: 256x256, 512x512"),
        (lambda: scales_for_pixels(-1, 5), "height and width must be positive"),
        (lambda: reference_grid(((1, 1), (5, 7))), "begin none of Infinity's schedules: 1x1 5x7"),
    ],
)
def test_sizes_that_do_not_exist_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rotation_turns_pairs_by_their_place_in_the_reference_grid():
    scale, reference, head_dim = (3, 2), (6, 8), 8
    cosine, sine = rotations(scale, reference, head_dim, torch.device("cpu"))
    x = torch.randn(1, 1, 6, head_dim)
    turned = torch.view_as_complex(rotate(x, cosine, sine).unflatten(-1, (-1, 2)).contiguous())[0, 0]
    original = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())[0, 0]
    for row in range(3):
        for column in range(2):
            y, x_place = row * 2, column * 4
            angles = [y * 1.0, y * 10000**-0.5, x_place * 1.0, x_place * 10000**-0.5]
            expected = original[row * 2 + column] * torch.exp(1j * torch.tensor(angles))
            torch.testing.assert_close(turned[row * 2 + column], expected)


def test_scales_through_a_cache_give_the_logits_of_one_forward():
    model = tiny_infinity.transformer()
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in SCALES)
    inputs = torch.randn(2, tokens - 1, 6, generator=generator)
    text = torch.randn(2, 5, 128, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    grid = reference_grid(SCALES)
    with torch.no_grad():
        whole = rounded(lambda: model(inputs, text, SCALES, grid, encoder_attention_mask=mask).sample)
        cache, parts, start = KVCache(), [], 0
        for number, (h, w) in enumerate(SCALES):
            mine = inputs[:, start : start + h * w] if number else None
            start += h * w if number else 0
            call = {"encoder_attention_mask": mask, "first_scale": number, "cache": cache}
            parts.append(model(mine, text, [(h, w)], grid, **call).sample)
        last = model(inputs, text, SCALES, grid, encoder_attention_mask=mask, logits_from=5).sample
    whole.check(torch.cat(parts, dim=1))
    whole.check(torch.cat([whole.out[:, : -15 * 10], last], dim=1))


def test_padding_of_a_prompt_changes_nothing():
    model = tiny_infinity.transformer()
    text = torch.randn(1, 3, 128)
    padded = torch.cat([text, torch.randn(1, 4, 128)], dim=1)
    mask = torch.tensor([[True] * 3 + [False] * 4])
    with torch.no_grad():
        short = rounded(lambda: model(None, text, [(1, 1)], (64, 64)).sample)
        short.check(model(None, padded, [(1, 1)], (64, 64), encoder_attention_mask=mask).sample)


def test_a_number_of_tokens_that_is_not_the_scales_is_an_error():
    with pytest.raises(ValueError, match="the scales have 5 tokens, got 4"):
        tiny_infinity.transformer()(torch.zeros(1, 3, 6), torch.zeros(1, 2, 128), [(1, 1), (2, 2)], (64, 64))


def test_training_reaches_every_parameter_but_the_learned_absence_of_a_prompt():
    model = tiny_infinity.transformer().train()
    model.enable_gradient_checkpointing()
    scales = SCALES[:3]
    inputs = torch.randn(1, sum(h * w for h, w in scales) - 1, 6)
    model(inputs, torch.randn(1, 3, 128), scales, reference_grid(scales)).sample.square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == ["uncond_embed"]


@pytest.mark.parametrize("patchify", [False, True])
def test_the_latents_are_the_sum_of_the_bits_codes(patchify):
    scheduler = InfinityScheduler(patchify=patchify)
    scales = SCALES[:4]
    latents = torch.zeros(2, 6, *scheduler.latent_size(scales[-1]))
    generator = torch.Generator().manual_seed(0)
    bits_per_token = 6 * scheduler.cells**2
    for number, (h, w) in enumerate(scales):
        inputs = scheduler.scale_model_input(latents, number, scales)
        assert inputs.shape == (2, h * w, bits_per_token)
        logits = torch.randn(2, h * w, bits_per_token, 2, generator=generator)
        step = scheduler.step(logits, number, latents, scales, generator=generator)
        added, latents = step.latents - latents, step.latents
    signs = (added > 0).long()  # the last scale is added without a resize
    if patchify:
        signs = torch.nn.functional.pixel_unshuffle(signs, 2)
    assert torch.equal(signs.flatten(2).transpose(1, 2), step.bits)
    torch.testing.assert_close(added.abs(), torch.full_like(added, 1 / math.sqrt(6)))


def test_bits_follow_their_probabilities_in_both_random_modes():
    scheduler = InfinityScheduler(top_p=0.97)
    logits = torch.zeros(1, 4096 * 4, 4, 2)
    logits[..., 1] = torch.tensor([0.0, 1.0, -1.0, 8.0])
    for kind in DRAWS.values():
        generator = kind(torch.Generator().manual_seed(0))
        bits = scheduler.step(logits, 0, torch.zeros(1, 4, 128, 128), ((128, 128),), generator=generator).bits
        share = bits.float().mean((0, 1))
        torch.testing.assert_close(share[:3], logits[0, 0, :3, 1].sigmoid(), atol=0.012, rtol=0)
        assert share[3] == 1  # its other side has less than 3 %


def test_guidance_one_is_off_and_temperature_divides():
    scheduler = InfinityScheduler()
    logits = torch.randn(2, 3, 12)
    torch.testing.assert_close(scheduler.guide(logits, 0, 1.0, 2.0), (logits[:1] / 2).unflatten(-1, (-1, 2)))
    guided = scheduler.guide(logits, 1, [0.0, 4.0], [9.0, 1.0])
    torch.testing.assert_close(guided, (4 * logits[:1] - 3 * logits[1:]).unflatten(-1, (-1, 2)))


def test_the_autoencoder_reconstructs_from_the_bits_it_gives():
    model = tiny_infinity.autoencoder()
    scales = scales_for(1.0, "0.06M")
    picture = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        bits = model.encode(picture, scales)
        features = model.encoder(picture)
        left = features.clone()
        for number, scale in enumerate(scales):
            small = torch.nn.functional.interpolate(left, scale, mode="bilinear")
            assert torch.equal(bits[number], small > 0)
            left -= torch.nn.functional.interpolate(codes_of(bits[number]), (16, 16), mode="bilinear")
        rounded(lambda: model.decoder(features - left)).check(model(picture, scales).sample)
    with pytest.raises(ValueError, match=r"the last scale must be \(16, 16\) here, got \(21, 14\)"):
        model.encode(picture, scales_for(1.5, "0.06M"))


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("nested", [False, True])
def test_an_original_transformer_loads_with_blocks_in_chunks_or_not(tmp_path, chunks, nested):
    model = tiny_infinity.transformer(num_layers=4)
    for block in model.blocks:  # key biases are zero in every released model; the format has no place for others
        block.attn1.to_qkv.bias.data.chunk(3)[1].zero_()
        block.attn2.to_kv.bias.data.chunk(2)[0].zero_()
    model.text_pool.to_kv.bias.data.chunk(2)[0].zero_()
    tensors = tiny.to_original(model)
    tensors["text_proj_for_sos.ca.mat_q"] = tensors["text_proj_for_sos.ca.mat_q"][None]
    for name in [name for name in tensors if name.endswith("scale_mul_1H11")]:
        tensors[name] = tensors[name].view(1, 1, -1, 1) if nested else tensors[name].view(1, -1, 1, 1)
    if chunks:
        for name in [name for name in tensors if name.startswith("blocks.")]:
            _, number, rest = name.split(".", 2)
            chunk, block = divmod(int(number), 4 // chunks)
            tensors[f"block_chunks.{chunk}.module.{block}.{rest}"] = tensors.pop(name)
    torch.save({"trainer": {"gpt_fsdp": tensors}} if nested else tensors, tmp_path / "infinity.pth")
    loaded = InfinityTransformer2DModel.from_single_file(tmp_path / "infinity.pth")
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    assert loaded.config.num_attention_heads == 2


@pytest.mark.parametrize("patchify", [False, True])
def test_an_original_autoencoder_loads_whole(tmp_path, patchify):
    model = tiny_infinity.autoencoder(patchify)
    tensors = tiny.to_original(model)
    tensors["quantizer.lfq.mask"] = tensors["quantize.lfq.mask"] = torch.zeros(6)
    assert "encoder.down.0.downsample.conv.conv.weight" in tensors
    assert "decoder.up.1.block.0.norm1.norm.bias" in tensors
    torch.save({"vae": tensors, "ema": {}}, tmp_path / "vae.pth")
    loaded = AutoencoderBSQ.from_single_file(tmp_path / "vae.pth", norm_num_groups=4)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
