"""The pictures of docs/ideas are drawn by the command that says so."""

import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'draftdiff[plots]')")
FIGURES = Path(__file__).resolve().parents[2] / "samples" / "figures"


def test_pictures_are_drawn_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    import ideas
    import ideas_style

    pages = {page.stem for page in ideas_style.IDEAS.glob("*.md")}
    assert pages == set(ideas.PICTURES)
    monkeypatch.setattr(ideas_style, "IDEAS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ideas.py", "budgets", "draft-training"])
    ideas.main()
    assert {file.name for file in tmp_path.iterdir()} == {"budgets.png", "draft-training.png"}
    with Image.open(tmp_path / "budgets.png") as image:
        assert image.width == 1380 and len(image.getcolors()) > 20
    monkeypatch.setattr(sys, "argv", ["ideas.py", "nothing"])
    with pytest.raises(SystemExit):
        ideas.main()
