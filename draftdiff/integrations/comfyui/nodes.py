"""The nodes: what they take, as a table, and what they do. `v3` and `v1` say it in ComfyUI's two forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from draftdiff.integrations.comfyui.patch import apply, patch_of
from draftdiff.kernels.block_sparse import BACKENDS
from draftdiff.video.config import DraftAttentionConfig


@dataclass(frozen=True)
class Input:
    """kind: MODEL, LATENT, FLOAT, INT, STRING or COMBO.  options: default, min, max, step, tooltip; of a COMBO also
    what there is to choose from."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """execute: takes the inputs by name, returns the outputs in order.  outputs: kind and name of each.  is_output: a
    graph runs it though nothing needs what it returns; its last output is shown as text on it."""

    node_id: str
    display_name: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]
    execute: Any
    is_output: bool = False


CATEGORY = "model/patch"


def draft_attention(
    model: Any,
    sparsity: float,
    tokens: float,
    start_percent: float,
    end_percent: float,
    dense_blocks: str,
    min_tokens: int,
    backend: str,
) -> tuple[Any]:
    """A clone of the model with draft attention. Raises UserError for what the config does not allow."""
    given = {"sparsity": sparsity, "tokens": tokens, "min_tokens": min_tokens, "backend": backend}
    config = DraftAttentionConfig.of({**given, "dense_blocks": dense_blocks})
    return (apply(model, config, start_percent, end_percent),)


def report(model: Any, latent: Any) -> tuple[Any, str]:
    """The latent, untouched, and what draft attention did in the run that made it."""
    patch = patch_of(model)
    return latent, "Draft Attention is not on this model" if patch is None else str(patch.log)


_PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01}
_MODEL = Input("model", "MODEL", {"tooltip": "The model to patch."})

NODES = (
    Node(
        "DraftdiffAttention",
        "Draft Attention",
        "Computes only the attention that a low-resolution draft finds worth it, in tiles of neighbouring tokens. "
        "Outside start and end percent, in dense blocks and in short sequences the model's attention stays what it is.",
        (
            _MODEL,
            Input(
                "sparsity",
                "FLOAT",
                {"default": 0.75, "min": 0.0, "max": 0.99, "step": 0.01}
                | {"tooltip": "Share of attention over the video that is skipped. 0.9 is faster and another sample."},
            ),
            Input(
                "tokens",
                "FLOAT",
                {"default": 0.25, "min": 0.0, "max": 0.95, "step": 0.05}
                | {"tooltip": "Share of the computed part that is spent on single tokens outside the chosen tiles."},
            ),
            Input(
                "start_percent",
                "FLOAT",
                {"default": 0.2, **_PERCENT} | {"tooltip": "Where in the schedule sparse attention begins."},
            ),
            Input(
                "end_percent",
                "FLOAT",
                {"default": 1.0, **_PERCENT} | {"tooltip": "Where in the schedule sparse attention ends."},
            ),
            Input(
                "dense_blocks",
                "STRING",
                {"default": "0", "tooltip": "Transformer blocks that stay dense, as in '0, 1, 38-39'."},
            ),
            Input(
                "min_tokens",
                "INT",
                {"default": 4096, "min": 0, "max": 1 << 20, "step": 256}
                | {"tooltip": "Calls with fewer video tokens stay dense: below some 4,096 nothing is gained."},
            ),
            Input(
                "backend",
                "COMBO",
                {"options": ["auto", *BACKENDS], "default": "auto"}
                | {"tooltip": "What computes it; 'draftdiff doctor' says which work here."},
            ),
        ),
        (("MODEL", "model"),),
        draft_attention,
    ),
    Node(
        "DraftdiffAttentionReport",
        "Draft Attention Report",
        "Tells what draft attention did in the run that made the latent: density, steps, and why calls were dense.",
        (
            Input("model", "MODEL", {"tooltip": "The model that Draft Attention gave."}),
            Input("latent", "LATENT", {"tooltip": "The sampler's output, which goes on untouched."}),
        ),
        (("LATENT", "latent"), ("STRING", "report")),
        report,
        is_output=True,
    ),
)
