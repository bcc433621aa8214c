"""The page of seeds: every module and test that it names is there, and every seed is named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "seeds.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:draftdiff|kernels|pipelines|samples|tests)/[^`*]+)`", PAGE)))
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "arxiv.org" in line]
# Of the documents that draftdiff began with.
SEEDS = [
    *("2505.14708", "2411.17787", "2505.19602", "2404.02905", "2412.04431", "2506.08373", "2502.18779", "2411.11055"),
    *("2403.00858", "2506.22694", "2407.12021", "2402.05109", "2412.12639", "2502.17421", "2408.11850", "2507.02659"),
    *("2402.01622", "2408.06318", "2507.11527", "2204.12750"),
]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_that_is_named_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_has_a_row_with_a_module_a_test_and_what_stays_a_claim(seed):
    (row,) = [row for row in ROWS if f"arxiv.org/abs/{seed}" in row]
    _, _, modules, tests, reproduced, claim, _ = row.split("|")
    assert "`" in modules and "`tests/" in tests
    assert len(reproduced.split()) > 3 and ":" in claim
    own = [ROOT / path for path in re.findall(r"`([^`]+)`", modules + tests)]
    files = [file for path in own for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert any(seed in file.read_text(encoding="utf-8") for file in files if file.exists()), "no file cites it"
