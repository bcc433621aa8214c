"""The command as a whole: its exit codes, and who is told of what."""

import re
import signal
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("error", "least"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.6 "
         "GiB of which 1.0 GiB is free. Including other memory, this process has 21.50 GiB memory in use."), 44.5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you "
         "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"), 4000),
        (MemoryError("Unable to allocate 5.00 GiB for an array with shape (10, 10) and data type float64"), 5.4),
    ],
)  # fmt: skip
def test_memory_that_does_not_suffice_is_one_line_with_the_size_that_is_needed(error, least, monkeypatch, capsys):
    doctor_that_raises(monkeypatch, error)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().err
    told = re.fullmatch(r"draftdiff: error: not enough memory: at least (\S+) GB .* are needed; .*\n", printed)
    assert told and least * 0.97 <= float(told[1]) <= least * 1.05 + 20


def test_memory_without_a_size_is_one_line_and_other_runtime_errors_are_bugs(monkeypatch, capsys):
    doctor_that_raises(monkeypatch, MemoryError("std::bad_alloc"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "draftdiff: error: not enough memory: std::bad_alloc\n"
    doctor_that_raises(monkeypatch, RuntimeError("tried to allocate 5 bytes"))
    with pytest.raises(RuntimeError):
        main(["doctor"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_full_disk_behind_standard_output_is_one_line(lines):
    code = (
        "import draftdiff.doctor as d; from draftdiff.cli import main\n"
        f"d.examine = lambda: {{'lines': ['x'] * {lines}}}\n"
        "raise SystemExit(main(['doctor', '--json']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"draftdiff: error: .*No space left on device\n", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_cleans_up_and_is_told(number):
    code = (
        "import draftdiff.doctor as d, signal, time\nfrom draftdiff.cli import main\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"  # the tests may run under nohup
        "def examine():\n"
        "    try: print('here', flush=True); time.sleep(60)\n"
        "    finally: print('cleaned', flush=True)\n"
        "d.examine = examine\nraise SystemExit(main(['doctor']))"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout.readline() == "here\n"
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert (out, running.returncode) == ("cleaned\n", 128 + number)
    assert err == f"draftdiff: ended by {number.name}\n"


ENDS = [(KeyboardInterrupt(), 130, "interrupted"), (SystemExit(143), 143, "ended by SIGTERM")]


@pytest.mark.parametrize(("end", "code", "said"), ENDS)
def test_an_end_of_which_a_library_makes_an_error_is_still_one(end, code, said, monkeypatch, capsys):
    def examine():
        try:
            raise end
        except BaseException as error:
            raise ModuleNotFoundError("Could not import module 'AutoModel'") from error

    monkeypatch.setattr(draftdiff.doctor, "examine", examine)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"draftdiff: {said}\n"


def test_a_command_leaves_the_handlers_of_signals_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


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
    assert done.stdout.splitlines()[-1] == "set()" and "--dense-end" in done.stdout
