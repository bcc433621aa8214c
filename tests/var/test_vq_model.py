"""The VQ model of VAR: what its residual quantiser adds up to, and that it learns."""

import pytest
import torch

from draftdiff.var.quantizer import MultiScaleQuantizer, resize_area
from tests.rounding import rounded
from tests.var import tiny


def test_the_convolutions_are_shared_as_in_the_released_models():
    quantizer = MultiScaleQuantizer(8, 4, range(1, 11))
    assert [quantizer.phi_index(scale, 10) for scale in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_the_latents_of_all_scales_are_the_quantised_picture():
    model = tiny.vq_model()
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        features = model.quant_conv(model.encoder(picture))
        by_scale = rounded(lambda: model.quantize.latents_by_scale(model.encode(picture))[-1])
        by_scale.check(model.quantize(features).latents)


@pytest.mark.parametrize("cosine", [False, True])
def test_each_scale_takes_the_nearest_code_of_what_is_left(cosine):
    model = tiny.vq_model(cosine=cosine)
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        features = model.quant_conv(model.encoder(picture))
        indices = model.encode(picture)
        latents = torch.zeros_like(features)
        codes = model.quantize.embedding.weight
        for scale, side in enumerate(tiny.PATCH_NUMS):
            left = resize_area(features - latents, side).flatten(2).transpose(1, 2)

            def distances(left=left):
                if cosine:
                    return -torch.nn.functional.cosine_similarity(left[:, :, None], codes, dim=-1)
                return (left[:, :, None] - codes).square().sum(-1)

            chosen = distances().gather(-1, indices[scale][..., None])[..., 0]
            rounded(lambda: distances().min(-1).values).check(chosen)
            latents = latents + model.quantize.contribution(codes[indices[scale]], scale)


def test_teacher_inputs_are_the_latents_so_far_at_the_next_size():
    model = tiny.vq_model()
    indices = model.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    with torch.no_grad():
        inputs = model.quantize.teacher_inputs(indices)
        latents = model.quantize.latents_by_scale(indices)
    assert inputs.shape == (2, sum(side**2 for side in tiny.PATCH_NUMS) - 1, 4)
    torch.testing.assert_close(inputs[:, -64:], latents[-2].flatten(2).transpose(1, 2))


def test_a_picture_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="features must be 8 x 8, got"):
        tiny.vq_model().encode(torch.zeros(1, 3, 32, 32))


def test_revived_codes_come_into_use_and_the_others_stay():
    model = tiny.vq_model(num_vq_embeddings=64)
    with torch.no_grad():
        model.quantize.embedding.weight[8:] += 100  # nearest to nothing
        before = model.quantize.embedding.weight.clone()
        features = model.quant_conv(model.encoder(torch.rand(8, 3, 16, 16) * 2 - 1))
    used = torch.cat(model.quantize(features).indices, dim=1).unique()
    assert used.max() < 8
    unused = torch.ones(64, dtype=torch.bool).index_fill(0, used, False)
    model.quantize.revive(features, unused)
    assert torch.equal(model.quantize.embedding.weight[used], before[used])
    assert torch.cat(model.quantize(features).indices, dim=1).unique().numel() > 32


def test_training_reduces_the_reconstruction_error():
    model = tiny.vq_model().train()
    picture = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, scale_factor=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    errors = []
    for _ in range(30):
        output = model(picture)
        error = (output.sample - picture).square().mean()
        (error + output.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("num_phi", [0, 1, 4])
def test_a_scale_adds_a_share_of_its_smoothed_codes_and_the_rest_as_they_are(share, num_phi):
    quantizer = tiny.vq_model(num_phi=num_phi, phi_share=share).quantize
    assert len(quantizer.phi) == (num_phi or len(tiny.PATCH_NUMS))
    codes = torch.randn(2, 9, 4)
    whole = torch.nn.functional.interpolate(codes.transpose(1, 2).unflatten(2, (3, 3)), size=8, mode="bicubic")
    phi = quantizer.phi[{0: 2, 1: 0, 4: 1}[num_phi]]  # scale 2 of 6: its own, the only one, the second of four
    expected = (1 - share) * whole + share * phi(whole)
    torch.testing.assert_close(quantizer.contribution(codes, 2), expected)


def test_without_a_share_there_are_no_convolutions_and_codes_are_only_enlarged():
    quantizer = tiny.vq_model(phi_share=0.0).quantize
    assert len(quantizer.phi) == 0
    codes = torch.randn(2, 9, 4)
    whole = torch.nn.functional.interpolate(codes.transpose(1, 2).unflatten(2, (3, 3)), size=8, mode="bicubic")
    assert torch.equal(quantizer.contribution(codes, 2), whole)
