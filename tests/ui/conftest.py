"""A session over a tiny pipeline: a run takes a second."""

import pytest

from draftdiff.errors import UserError
from draftdiff.models.video import Model
from draftdiff.ui.session import Asked, Session
from draftdiff.ui.sessions import Sessions
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


@pytest.fixture
def sessions(session):
    """The tiny pipeline, one of other sizes, and what cannot be loaded."""

    def other():
        return Session(Model("other", tiny_wan_pipeline(), {**TINY_CALL, "num_frames": 5}, 8), BASE)

    def broken():
        raise UserError("model 'broken' cannot be loaded: no such file")

    return Sessions({"tiny": lambda: session, "other": other, "broken": broken})


@pytest.fixture(scope="session")
def asked():
    return Asked("a red circle moves right", seed=3, sparsity=0.5)
