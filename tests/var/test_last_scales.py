"""Draft attention at the last scales: all kept is dense attention, and the pipelines take it."""

import pytest
import torch
import torch.nn.functional as F

from draftdiff.var.last_scales import LastScales, attend_scale
from tests.oracle import attention
from tests.var import tiny, tiny_infinity


def inputs(history: int, grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    q, k, v = (torch.randn(2, 3, history + tokens, 16, generator=generator) for _ in range(3))
    return 2 * q[:, :, history:], k, v


@pytest.mark.parametrize("history", [0, 5, 130])
@pytest.mark.parametrize("grid", [(16, 16), (9, 13)])
def test_everything_kept_is_dense_attention(history, grid):
    q, k, v = inputs(history, grid)
    expected = attention(q, k, v, torch.zeros(q.shape[2], k.shape[2]), 0.3, torch.float32)
    expected.check(attend_scale(q, k, v, grid, 1.0, 0.3))


def test_less_is_nearer_to_dense_the_more_is_kept_and_the_history_is_never_lost():
    grid, history = (24, 24), 40
    q, k, v = inputs(history, grid)
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    errors = [float((attend_scale(q, k, v, grid, density, 0.25) - dense).norm()) for density in (0.1, 0.3, 0.7)]
    assert errors[0] > errors[1] > errors[2] > 1e-3
    k[:, :, :history] *= 20  # the history now gets nearly all attention, so what is skipped no longer matters
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    assert float((attend_scale(q, k, v, grid, 0.1, 0.25) - dense).norm()) < 0.1 * errors[0]


def test_only_scales_with_enough_tokens_are_sparse():
    scales = LastScales(0.5, 30, [(1, 1), (4, 6), (5, 6), (8, 8)])
    assert [scales.grid(tokens) for tokens in (1, 24, 30, 64, 50)] == [None, None, (5, 6), (8, 8), None]


@pytest.mark.parametrize("kind", ["var", "code", "infinity", "scale_kv"])
def test_a_pipeline_with_all_kept_makes_its_dense_picture_and_another_with_less(kind):
    if kind == "infinity":
        pipe, call = tiny_infinity.infinity_pipeline(), {"prompt": "a red circle", "size": "0.06M"}
    else:
        pipe, call = tiny.var_pipeline((1, 2, 4, 8, 16)), {"class_labels": [1, 2]}
    if kind == "code":
        pipe.enable_collaborative(tiny.transformer(7, num_layers=1, patch_nums=(1, 2, 4, 8, 16)), 4)
    if kind == "scale_kv":
        pipe.enable_scale_kv(0.5)

    def latents():
        return pipe(**call, generator=torch.Generator().manual_seed(1), output_type="latent").images

    dense = latents()
    pipe.enable_draft_attention(1.0, min_tokens=64)
    assert torch.equal(latents(), dense)
    pipe.enable_draft_attention(0.25, min_tokens=64)
    assert not torch.equal(latents(), dense)
    pipe.disable_draft_attention()
    assert torch.equal(latents(), dense)


@pytest.mark.parametrize("arguments", [{"density": 0}, {"density": 1.5}, {"min_tokens": 0}])
def test_a_value_that_cannot_be_is_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        tiny.var_pipeline().enable_draft_attention(**arguments)
