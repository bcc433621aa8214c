"""draftdiff.llm: draft models for language models of transformers, lossless (speculation) and lossy (smaller caches).

Needs transformers 5.8 or newer. Never imports diffusers.
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import Any

from packaging.version import Version as _Version

OLDEST_TRANSFORMERS = "5.8"

_HOMES = {
    "acceptance_upper_bound": "draftdiff.llm.bounds",
    "AcceptanceHead": "draftdiff.llm.drafters.length_head",
    "AnchorOffset": "draftdiff.llm.train.positions",
    "anchor_offset_positions": "draftdiff.llm.train.positions",
    "assisted": "draftdiff.llm.drafters.assisted",
    "Beams": "draftdiff.llm.drafters.shapes",
    "Chain": "draftdiff.llm.drafters.shapes",
    "CrossVocabDistiller": "draftdiff.llm.train.cross_vocab",
    "CrossVocabDrafter": "draftdiff.llm.drafters.cross_vocab",
    "distil_cross_vocab": "draftdiff.llm.train.cross_vocab",
    "DistillationSet": "draftdiff.llm.train.data",
    "draft_config": "draftdiff.llm.train.config",
    "DraftScores": "draftdiff.llm.train.evaluate",
    "DraftTrainer": "draftdiff.llm.train.trainer",
    "EagleDrafter": "draftdiff.llm.drafters.eagle",
    "evaluate_draft": "draftdiff.llm.train.evaluate",
    "expected_acceptance": "draftdiff.llm.bounds",
    "export_token_map": "draftdiff.llm.train.trim",
    "FalconDrafter": "draftdiff.llm.drafters.falcon",
    "FalconTrainer": "draftdiff.llm.train.falcon",
    "future_attention": "draftdiff.llm.future_attention",
    "generate_distillation_set": "draftdiff.llm.train.data",
    "HeadsTrainer": "draftdiff.llm.train.heads",
    "HydraDrafter": "draftdiff.llm.drafters.hydra",
    "KBest": "draftdiff.llm.drafters.shapes",
    "KeptCache": "draftdiff.llm.kept_cache",
    "load_trimmed": "draftdiff.llm.train.trim",
    "LongSpecDrafter": "draftdiff.llm.drafters.longspec",
    "LongSpecTrainer": "draftdiff.llm.train.longspec",
    "LOSSES": "draftdiff.llm.train.losses",
    "MedusaDrafter": "draftdiff.llm.drafters.medusa",
    "mix_in_text": "draftdiff.llm.train.data",
    "ModelDrafter": "draftdiff.llm.drafters.model",
    "NGramCache": "draftdiff.llm.drafters.merging",
    "NGramCandidates": "draftdiff.llm.drafters.assisted",
    "NGramDrafter": "draftdiff.llm.drafters.ngram",
    "NGramTable": "draftdiff.llm.drafters.ngram_table",
    "observing": "draftdiff.llm.observe",
    "Pace": "draftdiff.llm.pace",
    "packed_text": "draftdiff.llm.train.data",
    "PearlDrafter": "draftdiff.llm.drafters.pearl",
    "rank_acceptance": "draftdiff.llm.train.heads",
    "report": "draftdiff.llm.reporting",
    "Reranked": "draftdiff.llm.drafters.shapes",
    "Sampled": "draftdiff.llm.drafters.shapes",
    "save_trimmed": "draftdiff.llm.train.trim",
    "SparsePrefill": "draftdiff.llm.sparse_prefill",
    "speckv": "draftdiff.llm.spec_kv",
    "speckv_pc": "draftdiff.llm.spec_kv_pc",
    "SpecKVConfig": "draftdiff.llm.spec_kv",
    "SpecKVInfo": "draftdiff.llm.spec_kv",
    "specpc": "draftdiff.llm.spec_pc",
    "SpecPCConfig": "draftdiff.llm.spec_pc",
    "speculative": "draftdiff.llm.speculation",
    "StaticTree": "draftdiff.llm.static_tree",
    "trim": "draftdiff.llm.train.trim",
    "Vocabularies": "draftdiff.llm.retokenize",
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
