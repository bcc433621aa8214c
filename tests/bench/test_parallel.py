"""One clip over several GPUs, on paper."""

import json

import pytest

from draftdiff.bench.parallel import Share
from draftdiff.cli import main
from tests.cli.one_line import fails_in_one_line


def test_alone_nothing_goes_over_links_and_sparse_is_as_much_cheaper_as_measured():
    alone = Share(75_600)
    assert alone.exchanged == alone.gathered == alone.pooled == alone.link_seconds() == 0
    assert 1000 * alone.dense_seconds == pytest.approx(198.6, rel=0.01)  # docs/gpu.md
    assert alone.dense_seconds / alone.sparse_seconds == pytest.approx(1 / (0.2 * 589 / 433 + 0.047))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_ring_sends_more_than_ulysses_from_three_processes_on(processes):
    by_heads = Share(75_600, ulysses=processes)
    by_keys = Share(75_600, ring=processes)
    assert by_keys.gathered / by_heads.exchanged == pytest.approx(processes / 2)
    assert by_keys.sparse_seconds > by_heads.sparse_seconds  # it pools the keys of all in every process


def test_the_command_prints_every_way_that_the_heads_allow(capsys):
    assert main(["bench", "parallel", "--tokens", "75600", "--processes", "1", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in rows] == ["1 x 1", "1 x 8", "2 x 4", "4 x 2", "8 x 1"]
    assert main(["bench", "parallel", "--tokens", "75600", "--processes", "8"]) == 0
    assert "8 x 1" in capsys.readouterr().out
    assert "--density" in fails_in_one_line(capsys, "bench", "parallel", "--density", "2")
