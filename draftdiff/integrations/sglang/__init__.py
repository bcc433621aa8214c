"""Draft attention in SGLang's diffusion server, by its entry point `sglang.multimodal_gen.plugins`.

Two ways in, both by name (`--attention-backend`): with `--backend diffusers` the name is "draftdiff", and the whole of
draftdiff works on the pipeline; SGLang's own models take names of a closed list, in which rain_fusion_attn, a sparse
backend for Ascend with nothing behind it elsewhere, becomes ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draftdiff.errors import UserError

SLOT = "RAIN_FUSION_ATTN"
_SELECTOR = "sglang.multimodal_gen.runtime.layers.attention.selector._cached_get_attn_backend"
_DIFFUSERS = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline.DiffusersPipeline._apply_attention_backend"


def register() -> None:
    """Hook the two places where SGLang turns a name into a backend; it applies hooks when its workers start."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookType, plugin_hook

    plugin_hook(_SELECTOR, HookType.AROUND)(resolve_backend)
    plugin_hook(_DIFFUSERS, HookType.AROUND)(apply_to_pipeline)


def resolve_backend(
    original: Callable[..., Any], head_size: int, dtype: Any, supported: tuple[Any, ...], selected: Any
) -> Any:
    """The class behind a name, for SGLang's own models. On Ascend all stays what it is."""
    from sglang.multimodal_gen.runtime.platforms import current_platform

    if getattr(selected, "name", None) != SLOT or current_platform.is_npu():
        return original(head_size, dtype, supported, selected)
    from draftdiff.integrations.sglang.backend import DraftAttentionBackend

    return DraftAttentionBackend


def apply_to_pipeline(original: Callable[..., Any], self: Any, pipe: Any, server_args: Any) -> Any:
    """`draftdiff.enable` for a pipeline of diffusers, where that is the name.

    `--attention-backend-config`: fields of DraftAttentionConfig, or `profile`, a file of `draftdiff tune`.
    Raises UserError for pipelines and settings that it refuses: a server that silently stayed dense would help nobody.
    """
    from draftdiff.hosts.dispatcher import BACKEND
    from draftdiff.video.config import DraftAttentionConfig
    from draftdiff.video.patch import enable

    if (server_args.attention_backend or "").lower() != BACKEND:
        return original(self, pipe, server_args)
    settings = dict(server_args.attention_backend_config or {})
    profile = settings.pop("profile", None)
    if profile is not None and settings:
        raise UserError(f"a profile is the whole configuration: {', '.join(settings)} cannot be given beside it")
    config = DraftAttentionConfig.of(settings) if profile is None else DraftAttentionConfig.from_profile(profile)
    enable(pipe, config)
    return None
