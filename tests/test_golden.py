"""Parity with the original implementations, case by case of the data in DRAFTDIFF_GOLDEN (default tests/golden)."""

import os

import pytest
import torch

from draftdiff.core.draft import draft_map, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import select_upstream, with_text
from draftdiff.video.attention import draft_attention
from draftdiff.video.config import DraftAttentionConfig
from tests import golden_cases
from tests.golden_infinity import check_infinity
from tests.golden_scale_kv import check_scale_kv
from tests.golden_var import check_code, check_var

KINDS = golden_cases.kinds()
DRAFT_CASES = [name for name, kind in KINDS.items() if kind.startswith("draft attention")]
IMAGE_CHECKS = {"VAR ": check_var, "CoDe": check_code, "Infinity": check_infinity, "ScaleKV": check_scale_kv}


def test_there_are_golden_cases():
    assert KINDS, f"no golden case in {golden_cases.FOLDER}"
    if "DRAFTDIFF_GOLDEN" not in os.environ:
        for start in ("draft attention", *IMAGE_CHECKS):
            assert any(kind.startswith(start) for kind in KINDS.values()), f"no case of {start}"


@pytest.mark.parametrize("name", [name for name in KINDS if name not in DRAFT_CASES])
def test_image_generation_is_the_originals(name):
    checks = [check for start, check in IMAGE_CHECKS.items() if KINDS[name].startswith(start)]
    assert len(checks) == 1, f"{name} is of an unknown kind: {KINDS[name]}"
    checks[0](golden_cases.load(name))


@pytest.fixture(params=DRAFT_CASES)
def case(request):
    loaded = golden_cases.load(request.param)
    info, tensors = loaded.info, loaded.tensors
    config = info["config"]
    grid = LatentGrid(config["frames"], config["latent_h"], config["latent_w"])
    tile = (1, config["pool_h"], config["pool_w"])
    tiling = tiling_for(grid, tile, config["block"], config["text_len"])
    # The originals fold the batch into the tokens.
    q, k, v = (tensors[name].float().unflatten(0, (config["batch_size"], -1)) for name in "qkv")
    tolerance = golden_cases.tolerances(info["tolerance"])
    return info, tensors, tiling, (q, k, v), tolerance


def test_the_token_order_is_the_originals(case):
    _, tensors, tiling, _, _ = case
    assert torch.equal(tiling.order, tensors["reorder_idx"].long())
    assert torch.equal(tiling.restore, tensors["restore_idx"].long())


def test_the_draft_map_is_the_originals(case):
    _, tensors, tiling, (q, k, _), tolerance = case
    probabilities = draft_map(pool(q, tiling), pool(k, tiling))
    expected = tensors["draft_map"].view_as(probabilities)
    torch.testing.assert_close(probabilities, expected, atol=tolerance["draft_map"], rtol=0)


def test_the_masks_are_the_originals(case):
    info, tensors, tiling, (q, k, _), _ = case
    probabilities = draft_map(pool(q, tiling), pool(k, tiling))
    for sparsity in info["call"]["sparsities"]:
        name = str(sparsity).replace(".", "p")
        keep = select_upstream(probabilities, torch.full((q.shape[2],), 1 - sparsity, dtype=torch.float64))
        assert torch.equal(keep, tensors[f"keep_mask_{name}"].view_as(keep))
        block_mask = with_text(keep, tiling)
        # One copy per sequence: an item's tokens, then its padding text.
        sequences = tensors[f"block_mask_{name}"].unflatten(0, (len(block_mask), -1))
        assert torch.equal(block_mask[:, None].expand_as(sequences), sequences)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_output_is_the_originals(case, backend):
    info, tensors, tiling, (q, k, v), tolerance = case
    settings = info["config"]
    # Padding text forms a sequence of its own in the original: no other query reads it, and its rows mean nothing.
    valid = settings["visual_len"] + settings["valid_text_len"]
    text_mask = None
    if settings["text_len"]:
        text_mask = (torch.arange(settings["text_len"]) < settings["valid_text_len"]).expand(len(q), -1)
    for sparsity in info["call"]["sparsities"]:
        config = DraftAttentionConfig(
            sparsity=sparsity,
            selection="upstream",
            tile=tiling.tile,
            block_size=settings["block"],
            tail=False,
            backend=backend,
        )
        out = draft_attention(q, k, v, grid=tiling.grid, config=config, text_mask=text_mask)
        expected = tensors[f"out_{str(sparsity).replace('.', 'p')}"].view_as(out)
        torch.testing.assert_close(out[:, :valid], expected[:, :valid], atol=tolerance["out"], rtol=0)
