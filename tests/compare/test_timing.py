"""Where the time of a call goes, and Amdahl's law."""

import math

import pytest

from draftdiff.compare.timing import ATTENTION_PARTS, Timing, amdahl, breakdown


def test_the_parts_add_up_to_the_call():
    parts = {"draft": 0.5, "select": 0.25, "kernel": 2.0, "sparse forward": 7.0, "dense forward": 1.0}
    split = breakdown(10.0, parts)
    assert list(split) == [*ATTENTION_PARTS, "rest of transformer", "rest of pipeline"]
    assert split["rest of transformer"] == 5.25 and split["rest of pipeline"] == 2.0 and split["dense attention"] == 0
    assert sum(split.values()) == 10.0 and Timing(10.0, parts).attention == 2.75


def test_a_call_without_clocks_is_all_rest():
    assert breakdown(3.0, {}) == {
        **dict.fromkeys(ATTENTION_PARTS, 0.0),
        "rest of transformer": 0,
        "rest of pipeline": 3,
    }


def test_clocks_that_run_a_little_over_leave_nothing_negative():
    assert min(breakdown(1.0, {"kernel": 0.7, "sparse forward": 0.6}).values()) == 0


@pytest.mark.parametrize(("share", "speedup", "whole"), [(0.5, 2, 4 / 3), (0.5, math.inf, 2), (0, 9, 1), (1, 4, 4)])
def test_the_whole_gains_what_amdahl_says(share, speedup, whole):
    assert amdahl(share, speedup) == pytest.approx(whole)
