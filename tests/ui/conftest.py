"""A session over a tiny pipeline: a run takes a second."""

import pytest

from draftdiff.models.video import Model
from draftdiff.ui.session import Asked, Session
from draftdiff.video.config import DraftAttentionConfig
from tests.tiny_pipeline import TINY_CALL, tiny_wan_pipeline

BASE = DraftAttentionConfig(min_tokens=0, dense_steps=1, backend="torch")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_wan_pipeline()


def new_session(pipeline):
    return Session(Model("tiny", pipeline, TINY_CALL, 8), BASE)


@pytest.fixture
def session(pipeline):
    return new_session(pipeline)


@pytest.fixture(scope="session")
def asked():
    return Asked("a red circle moves right", seed=3, sparsity=0.5)
