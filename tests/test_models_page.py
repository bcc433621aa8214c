"""The lists of models in the README and in docs/models.md are those of the table. `python -m tests.test_models_page`
writes them."""

from __future__ import annotations

import re
from pathlib import Path

import draftdiff
from draftdiff.video.layouts import LAYOUTS, NOTHING_TO_WIN, supported_models
from draftdiff.video.layouts.image import IMAGE

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"


def with_lists(text: str, lists: dict[str, str]) -> str:
    """The text with each list between its marks."""
    for name, content in lists.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert mark and end, f"no marks of {name}"
        text = before + mark + content + end + after
    return text


def expected() -> dict[Path, str]:
    rows = [f"| {family} | `{name}` | {note} |\n" for family, name, note in supported_models()]
    reasons = [f"| `{name}` | {reason} |\n" for name, reason in NOTHING_TO_WIN.items()]
    kinds = {"Videos": [], "Images": []}
    for name, layout in LAYOUTS.items():
        kinds["Images" if name in IMAGE else "Videos"].append(layout.family)
    lists = {
        PAGE: {
            "table": "| family | class | note |\n| --- | --- | --- |\n" + "".join(rows),
            "nothing": "| class | why |\n| --- | --- |\n" + "".join(reasons),
        },
        README: {"models": "\n".join(f"{kind}: {', '.join(found)}.\n" for kind, found in kinds.items())},
    }
    return {file: with_lists(file.read_text(encoding="utf-8"), parts) for file, parts in lists.items()}


def test_the_lists_of_models_are_those_of_the_table():
    for file, text in expected().items():
        assert file.read_text(encoding="utf-8") == text, f"run python -m tests.test_models_page: {file.name} is old"


def test_the_example_of_a_model_of_ones_own_runs_as_it_is(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    try:
        exec(compile(example, "docs/models.md", "exec"), names)
        told = draftdiff.report(names["model"]).transformers[0]
        assert told.grid == (4, 16, 16) and told.mean_density < 0.3
        assert "MyTransformer3DModel: 1 sparse and 0 dense steps" in capsys.readouterr().out
    finally:
        names["undo"]()
    assert "MyTransformer3DModel" not in LAYOUTS


if __name__ == "__main__":
    for file, text in expected().items():
        file.write_text(text, encoding="utf-8")
