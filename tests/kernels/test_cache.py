"""The user's cache: files that are there whole or not at all, and that nobody else could have written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from draftdiff.kernels import autotune, cache

HERE = torch.device("cpu")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache._say_once.cache_clear()
    return tmp_path / "draftdiff"


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache.store("x", b"1") == (tmp_path / ".cache" / "draftdiff" / "x").resolve()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache.stored("x") is None
    assert cache.store("x", b"2") == (tmp_path / "other" / "draftdiff" / "x").resolve()


def test_a_file_is_found_again_alone(folder):
    assert cache.stored("kernel.so") is None
    path = cache.store("kernel.so", b"whole")
    assert path == cache.stored("kernel.so") == folder / "kernel.so"
    assert path.read_bytes() == b"whole" and list(folder.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(folder, monkeypatch, caplog):
    path = cache.store("known.json", b"old")

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert cache.store("known.json", b"new") is None
    assert path.read_bytes() == b"old" and list(folder.iterdir()) == [path]
    assert "No space left on device" in caplog.text


def test_several_processes_at_once_keep_whole_files(folder):
    code = (
        "import sys; from draftdiff.kernels import cache\n"
        "for i in range(50):\n"
        "    cache.store('x', sys.argv[1].encode() * 10_000)\n"
        "    content = cache.stored('x').read_bytes()\n"
        "    assert len(content) == 10_000 and len(set(content)) == 1\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert [path.name for path in folder.iterdir()] == ["x"]


@pytest.fixture
def tuned(folder, monkeypatch):
    """A GPU that is none: the second configuration is the fastest. What was measured since is forgotten by `tuned`."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launched = []
    monkeypatch.setattr(autotune, "_time", lambda _call, _device: (-len(launched), None))

    def tune(key="k"):
        autotune._known.cache_clear()
        launched.clear()
        best = autotune.fastest(key, ("a", "b"), launched.append, HERE, lambda _found: True)
        return best, len(launched)

    yield tune
    autotune._known.cache_clear()


def test_what_was_measured_is_not_measured_again(tuned, folder):
    assert tuned() == ("b", 2) and tuned() == ("b", 0)
    assert json.loads((folder / "triton-a-gpu.json").read_text()) == {"k": "b"}


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "5", "null", '{"k": []}', '{"k": {"b": 1}}', '{"k": "c"}', "\x00\xff", "[" * 100_000]
)
def test_a_table_that_another_program_wrote_is_measured_anew(content, tuned, folder):
    folder.mkdir()
    (folder / "triton-a-gpu.json").write_bytes(content.encode("latin-1"))
    assert tuned() == ("b", 2) and tuned() == ("b", 0)


def test_a_table_that_cannot_be_kept_does_not_end_the_run(tuned, folder, caplog):
    folder.write_text("a file where the folder should be")
    assert tuned() == ("b", 2) and tuned() == ("b", 2)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compiled kernels cannot be kept for the next run: ")


def test_what_another_process_measured_meanwhile_is_kept(tuned, folder):
    tuned("mine")
    known = autotune._known(HERE)
    (folder / "triton-a-gpu.json").write_text('{"theirs": "a"}')
    autotune._save(HERE, known)
    assert json.loads((folder / "triton-a-gpu.json").read_text()) == {"theirs": "a", "mine": "b"}
