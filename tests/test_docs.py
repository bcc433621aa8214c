"""The pages of docs/: their examples run, their command lines are understood, their links lead somewhere."""

import re
from pathlib import Path

import pytest

from draftdiff.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
PAGES["README"] = (ROOT / "README.md").read_text(encoding="utf-8")
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
    folder = ROOT if page == "README" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (folder / path).resolve() if path else ROOT / ("README.md" if page == "README" else f"docs/{page}.md")
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target
