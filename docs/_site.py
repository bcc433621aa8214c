"""A hook of mkdocs: what pages link to in the rest of the repository becomes part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add every file that a page names by a path that leaves docs/."""
    named = {name for page in files.documentation_pages() for name, _ in _LINK.findall(page.content_string)}
    for name in sorted(named):
        if (_ROOT / name).is_file():
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead those links there; one that leads nowhere stays, and strict builds end on it."""
    return _LINK.sub(lambda link: f"](repository/{link[1]})" if (_ROOT / link[1]).is_file() else link[0], markdown)
