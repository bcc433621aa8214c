"""Draft attention in vLLM-Omni, by its entry point `vllm_omni.general_plugins`.

The registry of 0.30 has no free place: a plugin can only put a class of its own behind one of its names. Ours is
RAINFUSION_ATTN, a block-sparse backend for Ascend that refuses to run on anything else, and whose settings (sparsity,
first and last dense steps, dense layers) are those that draft attention needs.
"""

from __future__ import annotations

SLOT = "RAINFUSION_ATTN"


def register() -> None:
    """Put draft attention behind SLOT; on Ascend, where RainFusion itself runs, nothing changes."""
    from vllm_omni.diffusion.attention.backends.registry import (
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )
    from vllm_omni.platforms import current_omni_platform

    if not current_omni_platform.is_npu():
        path = "draftdiff.integrations.vllm_omni.backend.DraftAttentionBackend"
        register_diffusion_backend(DiffusionAttentionBackendEnum[SLOT], path)
