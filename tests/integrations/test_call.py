"""What all programs share of an attention call; the servers' own files run in `make test-servers`."""

from pathlib import Path

import pytest
import torch

import draftdiff
from draftdiff.core.grid import LatentGrid
from draftdiff.integrations.call import Done, Places, layer_of, sparse, unmasked, why_dense
from draftdiff.video.config import DraftAttentionConfig

GRID = LatentGrid(2, 16, 16)
CONFIG = DraftAttentionConfig(sparsity=0.75, backend="torch")


def qkv(tokens=GRID.tokens, heads=2):
    return torch.randn(3, 1, tokens, heads, 32).unbind()


def test_a_call_is_draft_attention_at_its_place():
    q, k, v = qkv(GRID.tokens + 9)
    done = sparse(q, k, v, CONFIG, Places(GRID, 5))
    assert isinstance(done, Done) and done.backend == "torch"
    assert torch.equal(done.out, draftdiff.draft_attention(q, k, v, grid=GRID, lead=5, config=CONFIG))
    assert 0.2 < float(done.stats[0]) < 0.35


def test_gradients_reach_all_three():
    given = [x.requires_grad_() for x in qkv()]
    sparse(*given, CONFIG, Places(GRID)).out.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in given)


def test_where_dense_is_faster_it_says_so():
    reason = sparse(*qkv(), DraftAttentionConfig(sparsity=0.5, backend="torch", dense_above=0.4), Places(GRID))
    assert reason == "dense attention is the faster one at density 0.5 with the backend torch"


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (lambda q, k, v: (q, k, v), {"min_tokens": 513}, "512 video tokens are fewer than min_tokens, here 513"),
        (lambda q, k, v: (q, k, v[:, 1:]), {}, "queries, keys and values of different kinds"),
        (lambda q, k, v: (q, k.half(), v), {}, "queries, keys and values of different kinds"),
        (lambda q, k, v: (q, k, v), {"min_tokens": 512}, None),
    ],
)
def test_what_speaks_against_a_sparse_call(change, config, reason):
    assert why_dense(*change(*qkv()), DraftAttentionConfig(**config), Places(GRID)) == reason


def test_a_call_without_a_mask_is_its_output_or_a_reason():
    q, k, v = qkv()
    assert torch.equal(
        unmasked(q, k, v, CONFIG, Places(GRID), 0.1), sparse(q, k, v, CONFIG, Places(GRID), scale=0.1).out
    )
    assert "fewer than min_tokens" in unmasked(q, k, v, DraftAttentionConfig(min_tokens=513), Places(GRID), 0.1)
    dense = DraftAttentionConfig(sparsity=0.5, backend="torch", dense_above=0.4)
    assert "dense attention is the faster one" in unmasked(q, k, v, dense, Places(GRID), 0.1)


@pytest.mark.parametrize(
    ("name", "number"),
    [("blocks.12.attn1.impl", 12), ("transformer.single_blocks.3", 3), ("attn1", None), ("block2.attn", None)],
)
def test_the_block_of_a_dotted_name(name, number):
    assert layer_of(name) == number


def test_servers_find_their_plugins_by_entry_points_of_the_package():
    root = Path(__file__).resolve().parents[2]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    for group, server in {"vllm_omni.general_plugins": "vllm_omni", "sglang.multimodal_gen.plugins": "sglang"}.items():
        assert f'[project.entry-points."{group}"]\ndraftdiff = "draftdiff.integrations.{server}:register"\n' in text
