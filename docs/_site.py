"""A hook of mkdocs: what pages link to in the rest of the repository becomes part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs"
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def _outside(page: Any, link: str) -> str | None:
    """What a page's link names outside docs/, from the repository's top; None for anything else."""
    found = (_DOCS / page.src_uri).parent.joinpath(link).resolve()
    is_ours = found.is_file() and found.is_relative_to(_ROOT) and not found.is_relative_to(_DOCS)
    return found.relative_to(_ROOT).as_posix() if is_ours else None


def on_files(files: Any, config: Any) -> Any:
    """Add every file that a page names by a path that leaves docs/."""
    links = ((page, link) for page in files.documentation_pages() for link, _ in _LINK.findall(page.content_string))
    for name in sorted({name for page, link in links if (name := _outside(page, link))}):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead those links there; one that leads nowhere stays, and strict builds end on it."""
    up = "../" * page.file.src_uri.count("/")

    def led(link: re.Match[str]) -> str:
        name = _outside(page.file, link[1])
        return f"]({up}repository/{name})" if name else link[0]

    return _LINK.sub(led, markdown)
