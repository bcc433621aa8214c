"""Results of many cards on one page."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from draftdiff.bench import report
from draftdiff.bench.report import KINDS, gather, html, read
from draftdiff.cli import main

RESULTS = Path(__file__).resolve().parents[2] / "samples" / "results"
ROW = {"calibration": "by hand", "size": 64, "tokens_per_forward": {"median": 1.25, "min": 1.2, "max": 1.4}}
TRIM = {"device": "NVIDIA <b>X</b>", "rows": [ROW]}


def stored(path, payload) -> Path:
    path.write_text(json.dumps(payload))
    return path


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_result_of_the_repository_is_known_by_what_it_holds(file, tmp_path):
    renamed = tmp_path / "sent.json"
    renamed.write_bytes(file.read_bytes())
    assert read(renamed).kind in KINDS


def test_what_every_benchmark_writes_is_known():
    modules = {kind.columns.rpartition(".")[0] for kind in KINDS}
    bench = Path(report.__file__).parent
    written = {f"bench.{file.stem}" for file in bench.glob("*.py") if "\nCOLUMNS: " in file.read_text(encoding="utf-8")}
    assert written - {"bench.parallel"} <= modules, "which is on paper and writes no file"


@pytest.mark.parametrize("module", ["check", "compile_ahead", "last_scales", "sparse_prefill"])
def test_a_row_of_a_benchmark_is_known_by_its_columns(module, tmp_path):
    columns = import_module(f"draftdiff.bench.{module}").COLUMNS
    file = stored(tmp_path / "sent.json", {"rows": [dict.fromkeys(key for _, key, *_ in columns)]})
    assert read(file).kind.columns == f"bench.{module}.COLUMNS"


def test_files_are_told_apart_from_each_other():
    kinds = {file.stem: read(file).kind.title for file in RESULTS.glob("*.json")}
    assert not report.gather([RESULTS])[1], "refused"
    assert kinds["cpu-demo"] != kinds["cpu-image-compare"] != kinds["llm-compare"]
    assert kinds["cpu-quality"] == kinds["cpu-schedules-8-steps"] == "Rules and schedules"
    assert kinds["cpu-kernels"] == kinds["nvidia-h200-kernels-wrong"] == "Attention kernels"


def test_a_page_has_devices_figures_and_how_they_were_made(tmp_path, capsys):
    other = TRIM | {"device": "Other card", "command": "python trim.py --rounds 2"}
    folder = tmp_path / "sent" / "by user"
    folder.mkdir(parents=True)
    stored(folder / "b.json", other)
    page = tmp_path / "page.html"
    assert main(["bench", "report", str(stored(tmp_path / "a.json", TRIM)), str(folder.parent), "-o", str(page)]) == 0
    text = page.read_text()
    assert "NVIDIA &lt;b&gt;X&lt;/b&gt;" in text and "<b>X</b>" not in text
    assert "Other card" in text and "python trim.py --rounds 2" in text
    assert "1.250<small>(1.200-1.400)" in text and "2 results of 2 devices" in capsys.readouterr().out


def test_wrong_rows_and_an_end_before_time_are_said(monkeypatch):
    monkeypatch.setattr(report, "_picture", lambda result: [])
    (result,), refused = gather([RESULTS / "nvidia-h200-kernels-wrong.json"])
    assert not refused and "15 of 40 rows failed their check" in html([result]) and "Not complete" in html([result])


def test_a_picture_of_the_bench_is_inside_the_page():
    pytest.importorskip("matplotlib")
    result = read(RESULTS / "llm-speculation.json")
    result.sections = report._picture(result)
    assert html([result]).count("data:image/png;base64,") == 1


def test_other_files_are_refused_in_a_line_each_and_the_rest_is_written(tmp_path, capsys):
    good = stored(tmp_path / "a.json", TRIM)
    damaged = TRIM | {"rows": [ROW | {"tokens_per_forward": {"median": "soon"}}]}
    bad = {
        "broken.json": "{",
        "other.json": '{"rows": [{"name": "of another program"}]}',
        "list.json": "[1, 2]",
        "same.json": good.read_text(),
        "damaged.json": json.dumps(damaged),
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    page = tmp_path / "page.html"
    assert main(["bench", "report", str(good), *(str(tmp_path / name) for name in bad), "-o", str(page)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "refused" in line]
    assert [next(name for name in bad if name in line) for line in lines] == list(bad)
    reasons = ("cannot be read as JSON", "is no result", "is no result", "is the same as", "is damaged")
    assert all(reason in line for reason, line in zip(reasons, lines))
    assert "by hand" in page.read_text()


@pytest.mark.parametrize(
    ("name", "output", "told"),
    [
        ("none.json", "page.html", "there is no result to report"),
        ("nowhere.json", "page.html", "is not there"),
        ("none.json", "page.pdf", "must end in .html"),
    ],
)
def test_what_cannot_be_reported_leaves_nothing(name, output, told, tmp_path, capsys):
    stored(tmp_path / "none.json", {})
    assert main(["bench", "report", str(tmp_path / name), "-o", str(tmp_path / output)]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / output).exists()
