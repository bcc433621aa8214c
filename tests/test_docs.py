"""The pages of docs/: their examples run, their command lines are understood, their links lead somewhere."""

import re
from pathlib import Path

import pytest

from draftdiff.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FILES = {page.relative_to(DOCS).with_suffix("").as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
FILES["README"] = ROOT / "README.md"
PAGES = {name: page.read_text(encoding="utf-8") for name, page in FILES.items()}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
COMMANDS = {
    line: name for name, text in PAGES.items() for line in re.findall(r"^draftdiff [^\n#]+", text, re.MULTILINE)
}


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_the_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """Blocks marked `py` instead need a GPU, a download or another program."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(BLOCKS[page]):
        exec(compile(block, f"{page}, example {number + 1}", "exec"), names)
    if "undo" in names:
        names["undo"]()
    if page == "llm":
        assert 0 < names["ours"] <= names["best"] <= 1


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_is_understood_up_to_its_model(line, capsys):
    words = line.split()
    with_part = words[1] in ("llm", "bench", "comfyui")
    assert main([*words[1 : 3 if with_part else 2], "--help"]) == 0
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (FILES[page].parent / path).resolve() if path else FILES[page]
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_every_page_has_its_place_in_the_site():
    """A page of nobody's menu would be found by search alone."""
    menu = set(re.findall(r"([\w/-]+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]))
    assert menu == set(PAGES) - {"README"}


def test_every_idea_has_its_picture_and_every_picture_its_idea():
    ideas = {page.stem for page in (DOCS / "ideas").glob("*.md")}
    drawn = {file.stem: file for file in (DOCS / "ideas").glob("*.png")}
    assert ideas == set(drawn) and max(file.stat().st_size for file in drawn.values()) < 60_000
    for name in ideas:
        assert f"]({name}.png)" in PAGES[f"ideas/{name}"] and BLOCKS[f"ideas/{name}"]
