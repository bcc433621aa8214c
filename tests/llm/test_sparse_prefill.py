"""Vertical-slash attention against dense attention under the same mask."""

import pytest
import torch

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import KeptCache, SparsePrefill, SpecKVConfig, speckv
from draftdiff.llm.observe import observing
from draftdiff.llm.sparse_prefill import vertical_slash_attention
from tests.llm.attention import attend, causal
from tests.llm.tiny_models import prompt, tiny_model


@pytest.mark.parametrize("shape", [(1000, 100, 128), (1024, 64, 64), (777, 200, 192), (300, 37, 256)])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_vertical_slash_attention_is_dense_attention_under_its_mask(shape, backend):
    count, column_count, local = shape
    query, key, value = torch.randn(2, 4, count, 32), torch.randn(2, 2, count, 32), torch.randn(2, 2, count, 32)
    columns = torch.stack([torch.randperm(count - 50)[:column_count].sort().values for _ in range(4)])
    columns = columns.view(2, 2, column_count)
    position = torch.arange(count)
    band = (position // 64 * 64 - (local - 64))[:, None] <= position
    is_column = torch.zeros(2, 4, 1, count, dtype=torch.bool)
    is_column.scatter_(3, columns.repeat_interleave(2, dim=1)[:, :, None], True)
    mask = (band | is_column) & causal(count, count)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.repeat_interleave(2, dim=1) for x in (key, value)), attn_mask=mask, scale=0.2
    )
    got = vertical_slash_attention(query, key, value, columns, local=local, scale=0.2, backend=backend)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_the_gpus_kernel_agrees(triton_interpreter):
    query, key, value = torch.randn(1, 2, 200, 32), torch.randn(1, 1, 200, 32), torch.randn(1, 1, 200, 32)
    columns = torch.randperm(150)[:37].sort().values.view(1, 1, 37)
    given = {"local": 64, "scale": 0.2}
    expected = vertical_slash_attention(query, key, value, columns, backend="torch", **given)
    got = vertical_slash_attention(query, key, value, columns, backend="triton", **given)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_sparse_prefill_is_a_prefill_under_that_mask():
    """The cache of later layers holds what came out of the attention of earlier ones."""
    model, ids = tiny_model("qwen3"), prompt(400)
    given = {"capacity": 40, "window": 6, "lookahead": 4}
    some = SparsePrefill(columns=100, local=128, backend="torch")
    sparse, info = speckv(model, model, ids, SpecKVConfig(**given, sparse_prefill=some), return_indices=True)
    dense, _ = speckv(model, model, ids, SpecKVConfig(**given))
    # The columns are the best of the same ranking, so a capacity of columns and window shows which they are.
    wide = SpecKVConfig(window=6, lookahead=4, capacity=106, sparse_prefill=some)
    columns = speckv(model, model, ids, wide, return_indices=True)[1].indices
    all_columns = {layer: kept[..., :-6] for layer, kept in columns.items()}
    position = torch.arange(404)

    def masked(call):
        is_column = torch.zeros(1, 2, 1, 404, dtype=torch.bool)
        is_column.scatter_(3, all_columns[call.layer][:, :, None], True)
        band = position >= (position // 64 * 64 - 64)[:, None]
        return attend(call, ((is_column | band) & causal(404, 404)).repeat_interleave(2, dim=1))

    reference = KeptCache(model.config)
    with observing(model, masked):
        model(torch.cat([ids, info.lookahead], dim=1), **{cache_argument(model): reference})
    for number, layer in sparse.kept_layers.items():
        where = info.indices[number][..., None].expand(-1, -1, -1, 16)
        torch.testing.assert_close(layer.values, reference.layers[number].values.gather(2, where), rtol=0, atol=1e-4)
    assert torch.equal(sparse.layers[0].values, dense.layers[0].values)
    assert (sparse.layers[2].values - dense.layers[2].values).abs().max() > 1e-2


def test_a_prompt_that_fits_into_columns_and_band_is_read_densely():
    model, ids = tiny_model("qwen3"), prompt(100)
    given = {"capacity": 40, "window": 6, "lookahead": 4}
    fitting = SpecKVConfig(**given, sparse_prefill=SparsePrefill(columns=40, local=64))
    for ours, dense in zip(
        speckv(model, model, ids, fitting)[0].layers, speckv(model, model, ids, SpecKVConfig(**given))[0].layers
    ):
        assert torch.equal(ours.keys, dense.keys)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"columns": 0}, "columns must be at least 1, got 0"), ({"local": 100}, "multiple of 64, got 100")],
)
def test_sparse_settings_out_of_range_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        SparsePrefill(**given)
