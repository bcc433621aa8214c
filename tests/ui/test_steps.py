"""Any pipeline's own progress bar tells its steps, however the pipeline uses it."""

import pytest

from draftdiff.ui.steps import Cancelled, watched


class Pipeline:
    """Uses its bar in all the ways that diffusers' pipelines do."""

    def progress_bar(self, iterable=None, total=None):
        pytest.fail("its own bar was used")

    def updates(self):
        with self.progress_bar(total=4) as bar:
            for _ in range(4):
                bar.set_postfix(step=1)
                bar.update()

    def iterates(self):
        for _ in self.progress_bar([1, 2, 3, 4]):
            pass


@pytest.mark.parametrize("way", ["updates", "iterates"])
def test_steps_are_told_and_stop_when_asked_to(way):
    pipeline, told = Pipeline(), []
    with watched(pipeline, "run", told.append, lambda: False):
        getattr(pipeline, way)()
    assert [(now.step, now.steps) for now in told] == [(0, 0), (1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    with pytest.raises(Cancelled), watched(pipeline, "run", told.append, lambda: len(told) == 3):
        getattr(pipeline, way)()
    assert [now.step for now in told] == [0, 1, 2]
    assert "progress_bar" not in vars(pipeline)


def test_a_run_that_was_cancelled_before_it_began_does_not_begin():
    with pytest.raises(Cancelled), watched(Pipeline(), "run", lambda _: None, lambda: True):
        pytest.fail("it began")
