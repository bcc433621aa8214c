"""draftdiff: draft-guided sparse attention for diffusers video and image pipelines."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from draftdiff._version import __version__

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))  # in a checkout, kernels/ and pipelines/ sit beside this package

if TYPE_CHECKING:
    from draftdiff.video.attention import draft_attention
    from draftdiff.video.config import DraftAttentionConfig
    from draftdiff.video.patch import disable, enable, report

__all__ = ["DraftAttentionConfig", "__version__", "disable", "draft_attention", "enable", "report"]

_HOMES = {
    "DraftAttentionConfig": "draftdiff.video.config",
    "draft_attention": "draftdiff.video.attention",
    "enable": "draftdiff.video.patch",
    "disable": "draftdiff.video.patch",
    "report": "draftdiff.video.patch",
}


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import: a sibling such as draftdiff.llm must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'draftdiff' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
