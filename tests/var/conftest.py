"""An Infinity of four layers that the tests of a file share."""

import pytest

from tests.var import tiny_infinity


@pytest.fixture(scope="module")
def _infinity():
    return tiny_infinity.infinity_pipeline(num_layers=4)


@pytest.fixture
def infinity(_infinity):
    yield _infinity
    _infinity.disable_scale_kv()
