"""The command as a whole: its exit codes, and who is told of what."""

import subprocess
import sys

import pytest
import torch

import draftdiff.doctor
from draftdiff.cli import main
from draftdiff.errors import UserError
from tests.cli.one_line import fails_in_one_line


def doctor_that_raises(monkeypatch, error: BaseException) -> None:
    def examine():
        raise error

    monkeypatch.setattr(draftdiff.doctor, "examine", examine)


@pytest.mark.parametrize("error", [ValueError("a value"), FileNotFoundError("a file"), KeyError("a key")])
def test_an_error_that_is_not_told_as_the_users_keeps_its_traceback(error, monkeypatch):
    doctor_that_raises(monkeypatch, error)
    with pytest.raises(type(error)) as told:
        main(["doctor"])
    assert told.value is error


def test_a_bug_in_our_own_code_ends_with_a_traceback_and_exit_code_1():
    code = (
        "import draftdiff.doctor; from draftdiff.cli import main\n"
        "exec('def examine():\\n    return max([])', draftdiff.doctor.__dict__)\n"
        "raise SystemExit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" in done.stderr and "in examine" in done.stderr and "draftdiff: error" not in done.stderr


def test_what_we_tell_the_user_is_one_line_whatever_the_message(monkeypatch, capsys):
    doctor_that_raises(monkeypatch, UserError("draftdiff: a message\n  of two lines"))
    assert fails_in_one_line(capsys, "doctor") == "draftdiff: error: a message of two lines"
    doctor_that_raises(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert fails_in_one_line(capsys, "doctor") == "draftdiff: error: CUDA out of memory"


def test_ctrl_c_is_130(monkeypatch, capsys):
    doctor_that_raises(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "draftdiff: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND (see draftdiff --help)"),
        (["paint"], "invalid choice: 'paint'"),
        (["doctor", "--loud"], "unrecognized arguments: --loud (see draftdiff --help)"),
        (["compare"], "the following arguments are required: --prompt (see draftdiff compare --help)"),
        (["image", "calibrate", "--share", "many"], "(see draftdiff image calibrate --help)"),
    ],
)
def test_a_command_line_that_cannot_be_read_says_where_help_is(argv, message, capsys):
    assert message in fails_in_one_line(capsys, *argv)


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from draftdiff.cli import main\n"
        "for command in ([], ['image'], ['llm'], ['doctor'], ['convert']): assert main([*command, '--help']) == 0\n"
        "print({'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert all(command in done.stdout for command in ("generate", "compare", "doctor"))
    done = subprocess.run([sys.executable, "-m", "draftdiff", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("draftdiff ")


def test_help_of_the_video_commands_needs_no_diffusers():
    code = (
        "import sys; from draftdiff.cli import main; assert main(['generate', '--help']) == 0\n"
        "print({'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()" and "--row-floor" in done.stdout
