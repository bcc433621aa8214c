"""Every family for a moment, always the same; and for as long as one likes (`make fuzz`)."""

import os
import time

import pytest

from tests.fuzz.attention import ATTENTION
from tests.fuzz.decoding import DECODING
from tests.fuzz.engine import run_for, run_seed
from tests.fuzz.files import FILES

FAMILIES = [ATTENTION, DECODING, FILES]
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@each
def test_a_few_cases(family):
    assert run_seed(family, 0, 30).total() > 0


@pytest.mark.fuzz
@each
def test_cases_until_the_time_is_up(family):
    seconds = float(os.environ.get("FUZZ_SECONDS") or 120) / len(FAMILIES)
    run_for(family, seconds, int(os.environ.get("FUZZ_SEED") or time.time()))
