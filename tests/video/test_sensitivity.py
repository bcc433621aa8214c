"""A recording changes no bit of the run, and tells layers, heads and steps that need much from those that do not."""

from dataclasses import replace

import pytest
import torch

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.errors import UserError
from draftdiff.hosts import diffusers as host
from draftdiff.video.patch import enable
from draftdiff.video.sensitivity import Sensitivity, recording
from tests.tiny_pipeline import TINY_CALL, tiny_wan_pipeline
from tests.video.model_cases import MODEL_CASES, OF_EACH_KIND, output_of

CONFIG = DraftAttentionConfig(selection="error", tile=(1, 4, 4), min_tokens=0)
LADDER = (0.1, 0.4, 1.0)


def latents_of(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt="a red circle", generator=generator, output_type="latent", **TINY_CALL).frames


@pytest.fixture(scope="module")
def pipeline():
    """The first head's values never leave the second layer."""
    pipeline = tiny_wan_pipeline()
    torch.nn.init.zeros_(pipeline.transformer.blocks[1].attn1.to_out[0].weight[:, :12])
    return pipeline


@pytest.fixture(scope="module")
def recorded(pipeline):
    stock = latents_of(pipeline)
    with recording(pipeline, CONFIG, LADDER, (0.0, 0.05), every=2) as found:
        run = latents_of(pipeline)
    return stock, run, found, latents_of(pipeline)


def test_the_recorded_run_is_the_dense_one_to_the_bit_and_nothing_is_left_behind(recorded, pipeline):
    stock, run, _, after = recorded
    assert torch.equal(stock, run) and torch.equal(stock, after)
    with pytest.raises(UserError, match="draftdiff is not enabled"):
        draftdiff.report(pipeline)


def test_a_head_that_needs_nothing_is_told_from_those_that_need_something(recorded):
    loss = recorded[2].loss(3)
    assert loss.shape == (2, 3, 3, 2, 2) and loss.dtype == torch.float64
    assert not loss[..., 1, 0].any()
    assert (loss[:, 0, :, 1, 1] > 0).all() and (loss[:, 0, :, 0] > 0).all()


def test_more_density_loses_less_and_all_of_it_next_to_nothing(recorded):
    loss = recorded[2].loss(3).sum((2, 3, 4))
    assert (loss[:, 0] > loss[:, 1]).all() and (loss[:, 1] > loss[:, 2]).all()
    assert loss[0, 2] < 1e-6 * loss[0, 0]  # with single tokens not all tiles are read whole


def test_every_second_forward_is_sampled_in_all_layers(recorded):
    found = recorded[2]
    assert found.steps == 3 and found.grid == (3, 8, 8)
    assert [(step, layer) for step, layer, _ in found.errors] == [(s, layer) for s in range(3) for layer in range(2)]
    sparse, dense = found.costs()
    assert sparse.shape == (2, 3) and (sparse > 0).all() and dense > 0


def test_the_pairs_of_a_density_are_those_that_its_calls_computed(recorded):
    pairs = torch.stack(recorded[2].pairs)
    assert pairs.shape == (6, 2, 3)
    # Of 12 tiles each, dealt out over 12 query tiles: a share is met but for one tile of all.
    torch.testing.assert_close(pairs[:, 0], torch.tensor(LADDER).double().expand(6, 3), rtol=0, atol=1 / 144)
    # Beside single tokens each query tile still reads its own, so that the least density is more than was asked for.
    assert (pairs[:, 1, 0] > pairs[:, 0, 0]).all()


def test_the_loss_is_the_error_after_the_output_projection():
    case = MODEL_CASES[0]
    model = case.build()
    before = output_of(model, inputs := case.inputs(model, case.grid, 1))
    attention = model.blocks[0].attn1
    joined = []
    attention.to_out[0].register_forward_pre_hook(lambda _, args: joined.append(args[0]))
    with recording(model, CONFIG, (0.2,), (0.0,), every=1) as found:
        assert torch.equal(output_of(model, inputs), before)
    enable(model, replace(CONFIG, sparsity=0.8, tokens=0, dense_steps=0, dense_layers=0))
    output_of(model, inputs)
    off = (joined[1] - joined[0]).double()
    weight, dim = attention.to_out[0].weight.double(), host.head_dim_of(attention)
    expected = [(off[..., h * dim :][..., :dim] @ weight[:, h * dim :][:, :dim].T).square().sum() for h in range(2)]
    torch.testing.assert_close(found.errors[0][2][0, 0].double(), torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_every_kind_of_model_can_be_recorded(case):
    model = case.build()
    inputs = case.inputs(model, case.grid, 2)
    before = output_of(model, inputs)
    with recording(model, CONFIG, (0.2, 1.0), (0.0,), every=1) as found:
        assert torch.equal(output_of(model, inputs), before)
    assert found.layers == case.layers
    loss = found.loss(1)[0].sum((1, 2, 3))
    assert loss[1] < 1e-6 * loss[0]


def test_a_run_too_small_to_be_sparse_is_told():
    pipeline = tiny_wan_pipeline()
    config = DraftAttentionConfig(min_tokens=10_000)
    with (
        pytest.warns(UserWarning, match="fewer than min_tokens"),
        pytest.raises(UserError, match="no attention call could be sparse: 192 video tokens are fewer than min_tokens"),
        recording(pipeline, config, LADDER, (0.0,)),
    ):
        latents_of(pipeline)


def test_another_enabled_pipeline_keeps_its_own_attention():
    other = enable(tiny_wan_pipeline(), DraftAttentionConfig(0.5, tile=(1, 4, 4), min_tokens=0))
    sparse = latents_of(other)
    pipeline = tiny_wan_pipeline()
    with recording(pipeline, CONFIG, LADDER, (0.0,)) as found:
        assert torch.equal(latents_of(other), sparse)
        latents_of(pipeline)
    assert found.errors


def test_a_stretch_without_a_sampled_call_has_the_nearest_ones_loss():
    found = Sensitivity((0.5,), (0.0,), layers=1, heads=1, steps=4)
    found.errors = [(0, 0, torch.full((1, 1, 1), 2.0)), (3, 0, torch.full((1, 1, 1), 8.0))]
    assert found.loss(4).flatten().tolist() == [2.0, 2.0, 8.0, 8.0]
    found.layers = 2
    with pytest.raises(UserError, match="attention layer 1 of the model was never sparse"):
        found.loss(4)
