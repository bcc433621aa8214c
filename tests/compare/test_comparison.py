"""What all comparisons share: a table, a dictionary, a folder; and pages read them, never the reverse."""

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import draftdiff.compare
from draftdiff.compare.comparison import Comparison, check_folder
from draftdiff.compare.html import document
from draftdiff.errors import UserError


@dataclass
class Lengths(Comparison[str]):
    made_by = "draftdiff measure"
    columns = (("name", "name", str, "its <name>"), ("length", "length", "{:d}".format, "letters"))

    results: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    extra: Any = None

    def row(self, result: str) -> dict[str, Any]:
        return {"name": result, "length": len(result)}

    def content(self) -> dict[str, Any]:
        return {"extra": self.extra, "rows": self.rows()}

    def summary(self) -> list[str]:
        return ["so much for lengths"]

    def notes(self) -> list[str]:
        return ["short & sweet"]


LENGTHS = Lengths(["one", "three"], {"device": "a <CPU>"})


def test_the_table_ends_with_what_is_to_be_said():
    assert LENGTHS.baseline == "one"
    assert LENGTHS.table().splitlines() == [
        "name   length",
        "-------------",
        "one         3",
        "three       5",
        "so much for lengths",
        "short & sweet",
    ]


def test_the_folder_is_known_again_by_its_command(tmp_path):
    folder = LENGTHS.write(tmp_path / "out", lambda _comparison, partial: (partial / "page").write_text("first"))
    written = json.loads((folder / "results.json").read_text())
    assert written == {"made_by": "draftdiff measure", **LENGTHS.content(), "about": LENGTHS.about}
    check_folder(folder, "draftdiff measure")
    with pytest.raises(UserError, match="holds other files; name a new or an empty one"):
        check_folder(folder, "draftdiff compare")
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_folder(folder / "page", "draftdiff measure")
    LENGTHS.write(folder, lambda *_: None)
    assert [file.name for file in folder.iterdir()] == ["results.json"]


def test_values_that_json_lacks_become_text_and_nan_is_refused(tmp_path):
    folder = Lengths(["one"], extra=Path("a/b")).write(tmp_path / "out", lambda *_: None)
    assert json.loads((folder / "results.json").read_text())["extra"] == "a/b"
    with pytest.raises(ValueError, match="not JSON compliant"):
        Lengths(["one"], extra=float("nan")).write(folder, lambda *_: None)
    assert json.loads((folder / "results.json").read_text())["extra"] == "a/b"


def test_a_page_has_the_frame_of_all_pages():
    text = document(LENGTHS, "Lengths & more", "<b>5</b> letters", ["<h2>Middle</h2>"], {"device": "a <CPU>"})
    parts = ["<title>draftdiff measure: Lengths &amp; more</title>", "<h1>Lengths &amp; more</h1>", "<b>5</b> letters"]
    parts += ["its &lt;name&gt;", "short &amp; sweet", "<h2>Middle</h2>", "How it was run", "a &lt;CPU&gt;"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_no_comparison_imports_its_page():
    folder = Path(draftdiff.compare.__file__).parent
    shown = {path.stem for path in folder.glob("*_page.py")} | {"html", "charts"}
    for path in folder.glob("*.py"):
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        used = {name.rpartition(".")[2] for name in names if name and name.startswith("draftdiff.compare.")} & shown
        assert path.stem in shown or not used, path
