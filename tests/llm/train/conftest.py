"""A tiny target and what it wrote, which the tests of a file share."""

import pytest

from draftdiff.llm import generate_distillation_set
from tests.llm.tiny_models import prompt, tiny_model


@pytest.fixture(scope="module")
def target():
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def written(target):
    return generate_distillation_set(
        target, prompt(4, batch=24), max_new_tokens=24, temperatures=(0.0,), progress=False
    )
