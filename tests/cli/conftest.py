"""A saved pipeline for the commands."""

import pytest

from tests.tiny_pipeline import tiny_wan_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_wan_pipeline().save_pretrained(folder)
    return str(folder)
