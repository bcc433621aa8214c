"""What is written is whole or absent, and what was there before stays until then."""

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from draftdiff.errors import NotWritten, UserError, user_errors
from draftdiff.files import new_folder, prepare_file, prepare_folder, replacing, replacing_folder

WRITERS = (replacing, new_folder, replacing_folder)


def write(target: Path, text: str) -> None:
    """To a file, or to a file in a folder, whichever the name stands for."""
    (target / "content" if target.is_dir() else target).write_text(text)


def read(target: Path) -> str:
    return (target / "content" if target.is_dir() else target).read_text()


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_appears_at_the_end_with_usual_permissions(writer, tmp_path):
    target = tmp_path / "result.txt"
    with writer(target) as partial:
        write(partial, "whole")
        assert not target.exists()
    assert read(target) == "whole" and list(tmp_path.iterdir()) == [target]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == (0o777 if target.is_dir() else 0o666) & ~umask


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_what_was_there_and_tells_its_error(writer, error, tmp_path):
    target = tmp_path / "result"
    if writer is replacing:
        target.write_text("old")
    elif writer is replacing_folder:
        target.mkdir()
        write(target, "old")
    before = list(tmp_path.iterdir())
    with pytest.raises(type(error)) as told, writer(target) as partial:  # noqa: PT012
        write(partial, "half")
        raise error
    if isinstance(error, OSError):
        told_name = (told.value.errno, told.value.strerror, told.value.filename)
        assert told_name == (error.errno, error.strerror, str(target))
    assert list(tmp_path.iterdir()) == before
    assert not before or read(target) == "old"


@pytest.mark.parametrize("writer", [replacing, replacing_folder])
def test_a_rename_that_fails_leaves_what_was_there(writer, tmp_path, monkeypatch):
    target = tmp_path / "result"
    with writer(target) as partial:
        write(partial, "old")

    def full(*_args):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(OSError, match="Disk quota exceeded"), writer(target) as partial:  # noqa: PT012
        write(partial, "new")
        if writer is replacing:
            monkeypatch.setattr(os, "replace", full)
        else:
            rename = Path.rename
            monkeypatch.setattr(Path, "rename", lambda a, b: full() if a.name == "new" else rename(a, b))
    assert read(target) == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("writer", WRITERS)
def test_content_is_on_the_disk_before_it_has_its_name(writer, tmp_path, monkeypatch):
    target, synced = tmp_path / "result", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(target.exists()), fsync(descriptor)))
    with writer(target) as partial:
        write(partial, "whole")
    assert synced[0] is False and synced[-1] is True  # the name itself is forced to the disk last


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_cannot_sync_folders_is_written_all_the_same(writer, tmp_path, monkeypatch):
    fsync = os.fsync

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with writer(tmp_path / "result") as partial:
        write(partial, "whole")
        if partial.is_dir():
            (partial / "link").symlink_to("nowhere")
    assert read(tmp_path / "result") == "whole"


def test_a_write_that_made_nothing_is_an_error(tmp_path):
    with pytest.raises(NotWritten, match=r"nothing\.txt"), replacing(tmp_path / "nothing.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_writers_of_one_file_do_not_meet(tmp_path):
    target, both = tmp_path / "result", threading.Barrier(2)

    def work(text: str) -> None:
        with replacing(target) as partial:
            both.wait(10)
            partial.write_text(text)
            both.wait(10)
            assert partial.read_text() == text

    threads = [threading.Thread(target=work, args=(text * 1000,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in ("a" * 1000, "b" * 1000) and list(tmp_path.iterdir()) == [target]


def test_a_name_as_long_as_the_disk_allows_can_be_written(tmp_path):
    target = tmp_path / ("x" * 255)
    with replacing(target) as partial:
        partial.write_text("whole")
    assert target.read_text() == "whole"


def test_a_new_folder_makes_its_parents_and_takes_nothings_place(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as partial:
        write(partial, "mine")
    with pytest.raises(FileExistsError, match="exists: choose a new folder"), new_folder(target):
        pass
    other = tmp_path / "other"
    with pytest.raises(OSError, match="other"), new_folder(other) as partial:  # noqa: PT012
        write(partial, "late")
        other.mkdir()
        write(other, "first")
    assert read(target) == "mine" and read(other) == "first"


def test_what_cannot_be_written_is_told_beforehand(tmp_path):
    (tmp_path / "file.png").touch()
    with pytest.raises(UserError, match=r"must end in \.png or \.jpg"):
        prepare_file(tmp_path / "x.txt", (".png", ".jpg"))
    with pytest.raises(UserError, match=r"y\.png' cannot be written: "):
        prepare_folder(tmp_path / "file.png" / "y.png")
    (tmp_path / "y.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        prepare_file(tmp_path / "y.png", (".png",))
    prepare_file(tmp_path / "X.PNG", (".png",))
    with pytest.raises(UserError, match="cannot be written: "):
        prepare_folder(Path("/proc"))
    assert {path.name for path in tmp_path.iterdir()} == {"y.png", "file.png"}
    prepare_file(tmp_path / "new" / "folder" / "x.png", (".png",))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from draftdiff import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as partial:
    (partial / "content" if partial.is_dir() else partial).write_text("half")
    if sys.argv[3] == "between":  # the two renames of a folder that takes another's place
        rename = Path.rename
        Path.rename = lambda a, b: os.kill(os.getpid(), 9) if a.name == "new" else rename(a, b)
    else:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("writer", "moment"), [(replacing, "within"), (replacing_folder, "within"), (replacing_folder, "between")]
)
def test_the_next_write_removes_what_a_killed_process_left(writer, moment, tmp_path):
    target = tmp_path / "result"
    with writer(target) as partial:
        write(partial, "old")
    subprocess.run([sys.executable, "-c", KILLED, writer.__name__, str(target), moment], check=False)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".draftdiff.")]) == 1
    time.sleep(1.1)
    with replacing(tmp_path / "other") as partial:
        write(partial, "new")
    assert read(target) == "old" and set(tmp_path.iterdir()) == {target, tmp_path / "other"}


def test_a_write_leaves_alone_what_others_are_writing_and_what_is_not_its_own(tmp_path):
    (tmp_path / ".draftdiff.open").mkdir()
    (tmp_path / ".draftdiff.open").chmod(0o777)
    (tmp_path / "linked").mkdir()
    (tmp_path / ".draftdiff.link").symlink_to(tmp_path / "linked")
    for name in ("linked", ".draftdiff.open"):
        write(tmp_path / name, "kept")
    with replacing(tmp_path / "slow") as slow:
        write(slow, "slow")
        for folder in tmp_path.glob(".draftdiff.*"):
            os.utime(folder, (0, 0))
        with replacing(tmp_path / "quick") as quick:
            write(quick, "quick")
    assert read(tmp_path / "slow") == "slow" and read(tmp_path / "quick") == "quick"
    assert read(tmp_path / ".draftdiff.open") == read(tmp_path / ".draftdiff.link") == "kept"


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("enforce fail at inline_container", errno.EIO),
    ],
)
def test_what_a_library_raises_for_a_full_disk_names_the_file(said, number, tmp_path):
    with pytest.raises(NotWritten) as told, replacing(tmp_path / "x"):
        raise RuntimeError(said)
    assert told.value.errno == number and told.value.filename == str(tmp_path / "x")


def test_other_errors_within_a_write_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), replacing(tmp_path / "x"):
        raise RuntimeError("a bug")
    with pytest.raises(FileNotFoundError, match="source"), replacing(tmp_path / "x"):
        (tmp_path / "source").read_text()


def test_errors_of_a_check_are_the_users_and_others_are_not():
    with pytest.raises(UserError, match="invalid literal"), user_errors():
        int("x")
    with pytest.raises(UserError, match=r"none\.txt"), user_errors(OSError):
        Path("none.txt").read_text()
    with pytest.raises(ValueError, match="invalid literal") as told, user_errors(OSError):
        int("x")
    assert type(told.value) is ValueError


def test_files_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import draftdiff.files\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'draftdiff'}"


def test_a_new_folder_makes_the_folders_above_it(tmp_path):
    with new_folder(tmp_path / "a" / "b" / "new") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "a" / "b" / "new" / "file").read_text() == "whole"
