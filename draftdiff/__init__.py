"""draftdiff: draft-guided sparse attention for diffusers video and image pipelines."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftdiff._version import __version__

if TYPE_CHECKING:
    from draftdiff.compare.tune import tune
    from draftdiff.video.attention import draft_attention
    from draftdiff.video.config import DraftAttentionConfig
    from draftdiff.video.layouts import Layout, register_layout
    from draftdiff.video.patch import disable, enable, report

__all__ = [
    "DraftAttentionConfig",
    "Layout",
    "__version__",
    "disable",
    "draft_attention",
    "enable",
    "register_layout",
    "report",
    "tune",
]


def _map_folders_of_the_checkout() -> None:
    """In a checkout, kernels/ and pipelines/ stand beside this package: they become namespace packages inside it, as a
    build makes them, and nothing else of the checkout does."""
    checkout = Path(__file__).resolve().parent.parent
    for name in ("kernels", "pipelines"):
        folder = checkout / name
        if (checkout / "pyproject.toml").is_file() and folder.is_dir():
            spec = ModuleSpec(f"{__name__}.{name}", None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            sys.modules[spec.name] = globals()[name] = module_from_spec(spec)


_map_folders_of_the_checkout()

_HOMES = {
    "DraftAttentionConfig": "draftdiff.video.config",
    "draft_attention": "draftdiff.video.attention",
    "enable": "draftdiff.video.patch",
    "disable": "draftdiff.video.patch",
    "report": "draftdiff.video.patch",
    "Layout": "draftdiff.video.layouts",
    "register_layout": "draftdiff.video.layouts",
    "tune": "draftdiff.compare.tune",
}


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import: a sibling such as draftdiff.llm must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'draftdiff' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
