"""Fixtures of the decoding tests."""

import pytest

from tests.llm.generation import family, relative


@pytest.fixture(name="pair", scope="module")
def _pair():
    target = family("llama")
    return target, relative(target)
