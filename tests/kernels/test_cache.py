"""A file of the user's cache is there whole or not at all."""

from pathlib import Path

import pytest

from draftdiff.kernels.cache import cache_folder, new_file


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "draftdiff"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "draftdiff"


def test_a_file_appears_when_it_is_done_and_alone(tmp_path):
    path = tmp_path / "new" / "kernel.so"
    with new_file(path) as draft:
        draft.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "known.json"
    path.write_text("old")

    def fail():
        with new_file(path) as draft:
            draft.write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
