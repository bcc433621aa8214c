"""Runs of many clips: names, what is there already, and processes that share the work."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from draftdiff.errors import UserError
from draftdiff.models import clips


def made(clip: clips.Clip) -> None:
    clip.output.write_bytes(b"a clip")
    clip.write_sidecar({"seconds": 1.0})


def test_every_prompt_and_seed_makes_a_clip_with_a_name_of_its_own(tmp_path):
    planned = clips.plan(["A cat, asleep!", "¿Qué?", "..."], [3, 4], tmp_path, ".mp4", {})
    names = [clip.output.name for clip in planned]
    assert names[:3] == ["001-a-cat-asleep-3.mp4", "001-a-cat-asleep-4.mp4", "002-qué-3.mp4"]
    assert names[4] == "003-clip-3.mp4" and len(set(names)) == 6
    with pytest.raises(UserError, match=r"^2 clips need a folder: .* got '.*one.mp4'"):
        clips.plan(["a"], [1, 2], tmp_path / "one.mp4", None, {})


def test_a_clip_is_made_only_if_its_file_tells_of_the_same_settings(tmp_path):
    clip = clips.Clip("a", 1, tmp_path / "a.mp4", {"options": {"steps": 3, "tile": (1, 8, 8)}})
    assert not clip.is_made()
    made(clip)
    assert clip.is_made() and clips.settings_in(clip.sidecar)["options"] == {"steps": 3, "tile": [1, 8, 8]}
    assert not clips.Clip("a", 1, clip.output, {"options": {"steps": 4}}).is_made()
    clip.output.unlink()
    assert not clip.is_made()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}', "not json"])
def test_a_file_that_is_not_a_clips_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"^--from '.*x.json' is not a file that draftdiff generate wrote"):
        clips.settings_in(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"^--from '.*none.json' cannot be read: No such file"):
        clips.settings_in(tmp_path / "none.json")


def test_prompts_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# of today\na cat\n\n  a dog  \n")
    assert clips.prompts_in(file) == ["a cat", "a dog"]
    file.write_text("# none\n")
    with pytest.raises(UserError, match="holds no prompt"):
        clips.prompts_in(file)


def worker(folder: str, name: str, stop_at: int | None) -> None:
    """Makes clips, each slowly, and notes them; perhaps killed in the middle of one."""
    planned = clips.plan([f"prompt {n}" for n in range(8)], [0], Path(folder), ".mp4", {})
    done = 0
    for clip, there in clips.shared_out(planned):
        if there:
            continue
        time.sleep(0.1)
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        made(clip)
        with Path(folder, f"{name}.log").open("a") as log:
            log.write(clip.output.name + "\n")
        done += 1


def test_processes_share_the_clips_and_take_over_what_a_killed_one_leaves(tmp_path):
    start = multiprocessing.get_context("spawn").Process
    workers = [start(target=worker, args=(str(tmp_path), f"w{n}", 1 if n == 0 else None)) for n in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
    assert [process.exitcode for process in workers] == [-signal.SIGKILL, 0, 0]
    noted = [line for log in tmp_path.glob("*.log") for line in log.read_text().split()]
    assert sorted(noted) == sorted(set(noted)) == [f"00{n + 1}-prompt-{n}-0.mp4" for n in range(8)]
    assert not list(tmp_path.glob(".draftdiff*"))
    assert all(json.loads(file.read_text())["seconds"] == 1.0 for file in tmp_path.glob("*.json"))


def test_a_second_run_finds_all_clips_there(tmp_path):
    planned = clips.plan(["a", "b"], [0], tmp_path, ".mp4", {})
    assert [there for clip, there in clips.shared_out(planned) if there or made(clip) is None] == [False, False]
    assert [there for _, there in clips.shared_out(planned)] == [True, True]
