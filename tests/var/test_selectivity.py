"""Calibration: which layers spread their attention, by the definition and on a model made so."""

import pytest
import torch

from draftdiff.var.selectivity import Selectivity
from tests.var import tiny
from tests.var.watching import seeded, watched


def test_calibration_finds_the_layer_that_spreads_its_attention(infinity):
    with torch.no_grad():
        for block, scale in zip(infinity.transformer.blocks, (4.0, -3.0, 4.0, 4.0)):
            block.attn1.log_scale.fill_(scale)  # the second layer looks at everything alike
    found = infinity.calibrate_scale_kv(["a red circle", "a green square"], size="0.25M", generator=seeded())
    assert found.index.shape == (4, 10)
    assert found.index[:, 0].isnan().all() and found.index[:, 1:].isfinite().all()
    wide = found.wide_layers(0.25)
    assert all(wide[scale] == (1,) for scale in range(3, 10))  # before, all history is among the strongest
    infinity.enable_scale_kv(0.1, wide_layers={str(scale): list(layers) for scale, layers in wide.items()})
    _, seen = watched(infinity, "a red circle", size="0.25M")
    assert max(range(4), key=lambda layer: seen[-2][1][layer]) == 1


def test_selectivity_is_the_product_of_the_means_it_is_defined_by():
    pipe = tiny.var_pipeline(num_layers=1)
    found = pipe.calibrate_scale_kv([1], guidance_scale=0, generator=seeded())
    attention, block = [], pipe.transformer.blocks[0].attn
    original = torch.nn.functional.scaled_dot_product_attention

    def keep(q, k, v, scale):
        attention.append((q @ k.transpose(-1, -2) * scale).softmax(-1))
        return original(q, k, v, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
        pipe(1, guidance_scale=0, generator=seeded(), output_type="latent")
    assert block.heads == 2
    for scale, weights in enumerate(attention[:6]):
        new = weights.shape[2]
        if scale:
            past = weights[..., :-new].sort(descending=True).values[..., :16].sum(-1)
            expected = weights[..., -new:].sum(-1).mean() * past.mean()
            assert float(found.index[0, scale]) == pytest.approx(float(expected), rel=1e-4)


def test_pairs_with_the_lowest_z_score_are_wide():
    index = torch.tensor([[torch.nan, 1.0, 5.0], [torch.nan, 2.0, 1.0], [torch.nan, 3.0, 6.0]], dtype=torch.float64)
    assert Selectivity(index).wide_layers(0.34) == {0: (), 1: (0,), 2: (1,)}
    with pytest.raises(ValueError, match="share of wide layers must be at least 0 and below 1, got 1"):
        Selectivity(index).wide_layers(1)


def test_calibration_needs_prompts_and_one_model(infinity):
    with pytest.raises(ValueError, match="calibration needs at least one prompt"):
        infinity.calibrate_scale_kv([])
    pipe = tiny.var_pipeline()
    pipe.enable_collaborative(tiny.transformer(7), 2)
    with pytest.raises(ValueError, match="calibrate one model at a time"):
        pipe.calibrate_scale_kv([1])
