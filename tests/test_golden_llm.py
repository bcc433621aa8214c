"""Parity with the original drafters, case by case of the data in DRAFTDIFF_GOLDEN_LLM (default tests/golden_llm)."""

import os
from collections.abc import Callable

import pytest

from tests import golden_cases
from tests.golden_eagle import check_eagle
from tests.golden_falcon import check_falcon
from tests.golden_hydra import check_hydra
from tests.golden_longspec import check_longspec
from tests.golden_omnidraft import check_omnidraft
from tests.golden_pearl import check_pearl

KINDS = golden_cases.kinds(golden_cases.LLM_FOLDER)
# By the letters with which a case's method begins.
CHECKS: dict[str, Callable[[golden_cases.Case], None]] = {
    "hydra": check_hydra,
    "eagle": check_eagle,
    "pearl": check_pearl,
    "omnidraft": check_omnidraft,
    "longspec": check_longspec,
    "falcon": check_falcon,
}


def method(name):
    """The beginning of a case's method that is known here."""
    known = [start for start in CHECKS if KINDS[name].lower().startswith(start)]
    assert len(known) == 1, f"{name} is of an unknown method: {KINDS[name]}"
    return known[0]


def test_there_are_golden_cases():
    assert KINDS, f"no golden case in {golden_cases.LLM_FOLDER}"
    if "DRAFTDIFF_GOLDEN_LLM" not in os.environ:
        assert {method(name) for name in KINDS} == set(CHECKS)


@pytest.mark.parametrize("name", KINDS)
def test_drafting_is_the_originals(name):
    CHECKS[method(name)](golden_cases.load(name, golden_cases.LLM_FOLDER))
