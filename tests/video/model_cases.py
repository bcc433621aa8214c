"""Tiny random instances of every supported transformer class of diffusers, with inputs for a given token grid.

`MODEL_CASES` is the list that model tests are parametrized over; what is the mechanism's and not a model's runs on
`OF_EACH_KIND`, in which most are marked slow. Sizes are chosen to be awkward: odd grids, text lengths that fill no
tile, batch items whose text is padded differently.
"""

from __future__ import annotations

import diffusers
import pytest

from draftdiff.video.layouts import LAYOUTS, layout_for
from tests.video.cases.base import TEXT, TEXT_WIDTH, WIDTH, ModelCase, bound_arguments, output_of, tiny
from tests.video.cases.cog import COG_CASES
from tests.video.cases.dit import DIT_CASES
from tests.video.cases.editing import EDITING_CASES
from tests.video.cases.flex import FLEX_CASES
from tests.video.cases.flux_kin import FLUX_KIN_CASES
from tests.video.cases.hunyuan import HUNYUAN_CASES
from tests.video.cases.image import IMAGE_CASES, flux_ids
from tests.video.cases.ltx import LTX_CASES
from tests.video.cases.newer import NEWER_CASES
from tests.video.cases.other import VIDEO_CASES
from tests.video.cases.packed import PACKED_CASES
from tests.video.cases.wan import WAN, WAN_CASES, tiny_wan

MODEL_CASES = [
    *WAN_CASES,
    *HUNYUAN_CASES,
    *COG_CASES,
    *LTX_CASES,
    *VIDEO_CASES,
    *IMAGE_CASES,
    *NEWER_CASES,
    *FLUX_KIN_CASES,
    *EDITING_CASES,
    *PACKED_CASES,
    *DIT_CASES,
    *FLEX_CASES,
]


def _kind(case: ModelCase) -> tuple:
    """What of its row the shared mechanism tells apart."""
    row = layout_for(case.build())
    has = [getattr(row, name) is not None for name in ("lead", "others", "keys", "mask")]
    return (row.route, row.text, row.queries, row.one_stream, row.inputs, *has, case.per_item)


_FIRST = {_kind(case): case for case in reversed(MODEL_CASES)}.values()
OF_EACH_KIND = [pytest.param(case, marks=[] if case in _FIRST else pytest.mark.slow) for case in MODEL_CASES]

KNOWN = [name for name in LAYOUTS if hasattr(diffusers, name)]  # to the installed release
globals().update({name: getattr(diffusers, name) for name in KNOWN})

__all__ = [
    "MODEL_CASES",
    "OF_EACH_KIND",
    "TEXT",
    "TEXT_WIDTH",
    "WAN",
    "WIDTH",
    "ModelCase",
    "bound_arguments",
    "flux_ids",
    "output_of",
    "tiny",
    "tiny_wan",
    *KNOWN,
]
