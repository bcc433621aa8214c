"""The README's language-model examples, run one after the other as it says."""

import re
from pathlib import Path

import pytest

from draftdiff.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_language_model_examples_run_as_they_are(tmp_path, monkeypatch, capsys):
    section = README.split("## Language models")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 7
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README", "exec"), names)
    assert 0 < names["ours"] <= names["best"] <= 1
    assert "target forwards" in capsys.readouterr().out
    assert (tmp_path / "trimmed-draft" / "token_map.json").is_file() and (tmp_path / "token_map.pt").is_file()


@pytest.mark.parametrize("line", re.findall(r"^draftdiff [^\n#]+", README, re.MULTILINE))
def test_every_command_line_is_understood_up_to_its_model(line, capsys):
    words = line.split()
    assert main([*words[1 : 3 if words[1] == "llm" else 2], "--help"]) == 0
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= options
