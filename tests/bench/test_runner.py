"""The runner of the benchmarks: turns, reasons, results, and its command line."""

import gc
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from draftdiff.bench.runner import Absent, Routine, in_turns, run, timed
from draftdiff.cli import main

RESULTS = Path(__file__).resolve().parents[2] / "samples" / "results"
PARTS = [["kernels"], ["dit"], ["var"], ["var", "models"], ["var", "attention"], ["llm", "loop"], ["llm", "prefill"]]


def test_all_calls_take_turns_within_a_round_after_an_untimed_one():
    seen = []

    def maker(name):
        def make():
            seen.append(f"make {name}")
            return lambda: seen.append(name) or len(seen)

        return make

    samples, absent = in_turns({name: maker(name) for name in "ab"}, 2)
    assert seen == ["make a", "make b", "a", "b", "a", "b"]
    assert samples == {"a": [3, 5], "b": [4, 6]} and absent == {}


def test_nothing_is_collected_while_a_call_is_timed_and_collection_is_as_it_was_before():
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            assert timed(gc.isenabled, torch.device("cpu"))[0] is False
            with pytest.raises(KeyError):
                timed(lambda: {}["none"], torch.device("cpu"))
            assert gc.isenabled() is before
        finally:
            gc.enable()


def test_what_is_absent_or_too_large_is_left_out_with_its_reason_and_a_bug_is_raised():
    def raising(error):
        def make():
            raise error

        return make

    makers = {"here": lambda: lambda: 1.0, "absent": raising(Absent("not installed"))}
    makers["large"] = raising(torch.OutOfMemoryError("80 GiB"))
    samples, absent = in_turns(makers, 1)
    assert samples == {"here": [1.0]}
    assert absent == {"absent": "not installed", "large": "not enough memory on this device: 80 GiB"}
    with pytest.raises(KeyError):
        in_turns({"bug": raising(KeyError("x"))}, 1)


class Counting(Routine):
    name, file = "counting", "{device}-counting"

    def cases(self):
        return [1, 2, 3]

    def measure(self, case):
        if case == self.options.stop:
            raise KeyboardInterrupt
        if case == self.options.wrong:
            self.failures.append(f"{case} is wrong")
        return [{"case": case}]

    def table(self, payload):
        return [str(row["case"]) for row in payload["rows"]]


def options(folder, **given):
    known = {"device": "cpu", "output": folder, "threads": None, "rounds": 1, "json": False, "stop": 0, "wrong": 0}
    return Namespace(command_line="draftdiff bench counting", **(known | given))


def test_results_say_where_and_with_what_they_were_made(tmp_path, capsys):
    assert run(Counting(options(tmp_path))) == 0
    payload = json.loads((tmp_path / "cpu-counting.json").read_text())
    assert payload["complete"] and payload["rows"] == [{"case": 1}, {"case": 2}, {"case": 3}]
    assert len(payload["load_average"]) == 3 and payload["versions"]["torch"]
    assert payload["command"].endswith("draftdiff bench counting")
    assert capsys.readouterr().out == "1\n2\n3\n"


def test_a_failed_check_is_exit_code_1(tmp_path, capsys):
    assert run(Counting(options(tmp_path, wrong=2))) == 1
    assert "draftdiff: failed: 2 is wrong" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys):
    assert run(Counting(options(tmp_path, stop=3))) == 130
    payload = json.loads((tmp_path / "cpu-counting.json").read_text())
    assert not payload["complete"] and len(payload["rows"]) == 2
    assert "interrupted; 2 of 3 cases are in" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], *PARTS, ["llm"], ["llm", "speculation"]], ids=" ".join)
def test_help_needs_no_torch(words):
    heavy = {"torch", "diffusers", "transformers"}
    code = (
        "import sys; from draftdiff.cli import main\n"
        f"print(main(['bench', *{words}, '--help']), {heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"
    if not words:
        assert all(name in done.stdout for name in ("kernels", "dit", "var", "llm"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["kernels"], "cpu-kernels"),
        (["dit"], "cpu-dit"),
        (["var", "models"], "cpu-var"),
        (["llm", "speculation"], "llm-speculation"),
    ],
)
def test_the_committed_results_can_be_drawn_anew(words, name, tmp_path):
    pytest.importorskip("matplotlib")
    file = shutil.copy(RESULTS / f"{name}.json", tmp_path)
    assert main(["bench", *words, "--redraw", str(file)]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, monkeypatch):
    assert main(["bench", "dit", "--redraw", str(tmp_path / "none.json")]) == 2
    assert "none.json' cannot be read" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "dit", "--redraw", str(RESULTS / "cpu-dit.json")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'draftdiff[plots]'" in error and error.count("\n") == 1
