"""Further grids in a sequence: references, images to edit, keyframes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.core.grid import LatentGrid
from draftdiff.video.layouts import layout_for, layout_name, register_layout
from draftdiff.video.layouts.grids import last_of, rasters
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, bound_arguments, output_of

SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=0, dense_layers=0, min_tokens=0)
FULL = DraftAttentionConfig(selection="full", dense_steps=0, dense_layers=0, min_tokens=0)


def others_of(case):
    model = case.build()
    layout, arguments = layout_for(model), bound_arguments(model, case.inputs(model, case.grid, 1))
    return layout.others(model, arguments) if layout.others else []


WEIGHED = ("ltx2_strengths",)  # which are attended exactly
WITH_REFERENCES = [
    case for case in MODEL_CASES if case.name not in WEIGHED and any(grid.tokens >= 64 for _, grid in others_of(case))
]


def density_of(case):
    model = draftdiff.enable(case.build(), SPARSE)
    output_of(model, case.inputs(model, case.grid, 1))
    return draftdiff.report(model).transformers[0].mean_density


def test_models_that_edit_have_such_cases():
    assert len(WITH_REFERENCES) >= 2


@pytest.mark.parametrize("case", WITH_REFERENCES, ids=str)
def test_pairs_of_a_reference_are_skipped_too(case):
    model = case.build()
    as_text = dataclasses.replace(layout_for(model), others=None)
    density = density_of(case)
    undo = register_layout(layout_name(model), as_text)
    try:
        assert density < density_of(case) - 0.05
    finally:
        undo()


def places(*grids, start=0.0):
    parts = []
    for grid in grids:
        part = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))
        part[:, 0] += start
        parts.append(part)
        start += grid[0]
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("positions", "stacked", "found"),
    [
        (places((1, 3, 4)), False, [(0, (1, 3, 4))]),
        (places((1, 3, 4), (1, 2, 5)), False, [(0, (1, 3, 4)), (12, (1, 2, 5))]),
        (places((1, 3, 4), (1, 3, 4)), False, [(0, (1, 3, 4)), (12, (1, 3, 4))]),
        (places((4, 3, 4)), True, [(0, (4, 3, 4))]),
        (places((2, 3, 4), (2, 3, 5)), True, [(0, (2, 3, 4)), (24, (2, 3, 5))]),
        (torch.cat([places((2, 3, 4), start=9), places((3, 3, 4))]), True, [(0, (2, 3, 4)), (24, (3, 3, 4))]),
        (torch.cat([places((1, 3, 4)), places((1, 3, 4))]), False, [(0, (1, 3, 4)), (12, (1, 3, 4))]),
        (torch.cat([places((1, 3, 4))[:-1], places((1, 3, 4), start=5)]), False, [(11, (1, 3, 4))]),
        (torch.zeros(0, 3), True, []),
    ],
)
def test_grids_are_read_off_positions(positions, stacked, found):
    assert [(start, grid.shape) for start, grid in rasters(positions, stacked)] == found


def test_a_sequence_that_does_not_end_with_a_grid_has_none_to_make():
    assert last_of([(3, LatentGrid(1, 2, 2))], 7) == LatentGrid(1, 2, 2)
    assert last_of([(3, LatentGrid(1, 2, 2))], 8) is None
    assert last_of([(3, LatentGrid(1, 1, 1))], 4) is None
    assert last_of([], 4) is None


@pytest.mark.parametrize("name", ["flux_kontext", "flux3_references", "bria_fibo2"])
def test_a_reference_that_fills_no_tile_is_attended_exactly(name):
    case = next((case for case in MODEL_CASES if case.name == name), None)
    if case is None:
        pytest.skip("this version of diffusers has no such model")
    model = case.build()
    inputs = case.inputs(model, case.grid, 1)
    tokens = math.prod(case.grid)
    if name == "flux_kontext":
        inputs |= {
            "hidden_states": inputs["hidden_states"][:, : tokens + 6],
            "img_ids": inputs["img_ids"][: tokens + 6],
        }
        inputs["img_ids"][tokens:] = places((1, 2, 3), start=1.0)
    elif name == "flux3_references":
        inputs |= {key: inputs[key][..., :18, :] for key in ("image_cond_hidden_states", "image_cond_ids")}
    else:
        inputs["context_latents"] = [inputs["context_latents"][0][..., :4, :6]]
    dense = rounded(lambda: output_of(model, inputs))
    draftdiff.enable(model, FULL)
    dense.check(output_of(model, inputs))
    draftdiff.enable(model, SPARSE)
    sparse = output_of(model, inputs)
    told = draftdiff.report(model).transformers[0]
    assert not told.reasons and told.mean_density < 0.6
    assert float((sparse - dense.out).abs().max()) > 1e-3
