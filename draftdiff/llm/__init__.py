"""draftdiff.llm: draft models for language models of transformers, lossless (speculation) and lossy (smaller caches).

Needs transformers 5.8 or newer. Never imports diffusers.
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import Any

from packaging.version import Version as _Version

OLDEST_TRANSFORMERS = "5.8"

_HOMES: dict[str, str] = {
    "KeptCache": "draftdiff.llm.kept_cache",
    "SparsePrefill": "draftdiff.llm.sparse_prefill",
    "SpecKVConfig": "draftdiff.llm.spec_kv",
    "SpecKVInfo": "draftdiff.llm.spec_kv",
    "SpecPCConfig": "draftdiff.llm.spec_pc",
    "observing": "draftdiff.llm.observe",
    "speckv": "draftdiff.llm.spec_kv",
    "speckv_pc": "draftdiff.llm.spec_kv_pc",
    "specpc": "draftdiff.llm.spec_pc",
}

__all__ = sorted(_HOMES)

if _Version(_version("transformers")) < _Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"draftdiff.llm needs transformers {OLDEST_TRANSFORMERS} or newer, got {_version('transformers')}"
    )


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: parts that do without it, such as the bounds, must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'draftdiff.llm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
