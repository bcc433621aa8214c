"""What both next-scale pipelines can be spared, on and off: cache by ScaleKV, with its calibration, attention by draft
attention, and the unconditional half of late scales."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

import torch
from tqdm import tqdm

from draftdiff.errors import UserError
from draftdiff.var.cache import KVCache
from draftdiff.var.last_scales import LastScales
from draftdiff.var.scale_kv import ScaleKVConfig, WideLayers
from draftdiff.var.scale_kv_cache import ScaleKVCache
from draftdiff.var.selectivity import Selectivity, SelectivityCache, selectivity

Arguments = ParamSpec("Arguments")
_OLD_NAMES = {"drafters": "wide_layers", "refiner_drafters": "refiner_wide_layers"}


def accepts_old_names(enable: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Of an `enable_scale_kv`: keywords by their names of today, with one warning for old ones."""

    @functools.wraps(enable)
    def renamed(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        old = ", ".join(f"{name} is now {_OLD_NAMES[name]}" for name in options if name in _OLD_NAMES)
        if old:
            warnings.warn(f"enable_scale_kv: {old}", FutureWarning, stacklevel=2)
        today: Any = {_OLD_NAMES.get(name, name): value for name, value in options.items()}
        enable(*arguments, **today)

    return renamed


class ScaleKVMixin:
    """`enable_scale_kv`, `disable_scale_kv`, `calibrate_scale_kv`; what is enabled is `scale_kv`, None if nothing."""

    transformer: Any
    scale_kv: ScaleKVConfig | None = None
    last_scales: LastScales | None = None
    unguided_scales: int = 0
    _measuring: list[SelectivityCache] | None = None

    @accepts_old_names
    def enable_scale_kv(
        self,
        budget: float = 0.1,
        *,
        wide_layers: WideLayers = None,
        allocation: str = "full",
        scoring: str = "paper",
        pooling: str | None = None,
        kernel: int = 5,
        per: str = "layer",
        missed: Any = None,
    ) -> None:
        """Keep a share of the cache (ScaleKV, arXiv 2505.19602); see ScaleKVConfig for the arguments and their units.

        Raises ValueError for one that cannot be.
        """
        config = ScaleKVConfig(budget, wide_layers, allocation, scoring, pooling, kernel, per, missed)
        config.check_model(self.transformer.config.num_layers, self.transformer.config.num_attention_heads)
        self.scale_kv = config

    def disable_scale_kv(self) -> None:
        """Keep the whole cache again."""
        self.scale_kv = None

    def calibrate_scale_kv(self, prompts: Iterable[Any], **call: Any) -> Selectivity:
        """Measure how widely each layer looks, over one generation per prompt (or class label) with the whole cache.

        call: further arguments of the pipeline. `enable_scale_kv(wide_layers=found.wide_layers())` or
        `enable_scale_kv(per="head", missed=found.missed)` puts the result to use; ten prompts are enough, says the
        paper. Raises ValueError without prompts or if there are two models.
        """
        prompts = list(prompts)
        if not prompts:
            raise UserError("calibration needs at least one prompt")
        if getattr(self, "refiner", None) is not None:
            raise UserError("calibrate one model at a time: disable_collaborative() first")
        self._measuring = []
        try:
            for prompt in tqdm(prompts, desc="calibrating", disable=len(prompts) < 2):
                self(prompt, output_type="latent", **call)  # type: ignore[operator]
            return selectivity(self._measuring)
        finally:
            self._measuring = None

    def enable_draft_attention(self, density: float = 0.25, *, min_tokens: int = 1024) -> None:
        """At scales of at least min_tokens tokens, let each read of its own scale only the share `density`, in (0, 1],
        of key tiles that a draft map chooses; earlier scales are read wholly.

        Off by default: it pays at Infinity's largest sizes only (`draftdiff bench var attention`).
        Raises ValueError for a value that cannot be.
        """
        self.last_scales = LastScales(density, min_tokens)

    def disable_draft_attention(self) -> None:
        """Dense attention at every scale again."""
        self.last_scales = None

    def enable_unguided_scales(self, scales: int = 2) -> None:
        """Make the last `scales` scales by the conditional half of the model alone, at half the work, its guidance off
        (the unconditional branch replaced by the conditional, as in SkipVAR, arXiv 2506.08908).

        Changes pictures: guidance is what late scales of VAR are sharpened by. At least the first scale is guided.
        Raises ValueError for what is no whole number from 1 on.
        """
        if isinstance(scales, bool) or not isinstance(scales, int) or scales < 1:
            raise UserError(f"unguided scales must be a whole number from 1 on, got {scales!r}")
        self.unguided_scales = scales

    def disable_unguided_scales(self) -> None:
        """Guidance at every scale again."""
        self.unguided_scales = 0

    def _make_cache(self, scales: Sequence[tuple[int, int]], model: Any, key_dtype: torch.dtype | None) -> KVCache:
        if self._measuring is not None:
            self._measuring.append(SelectivityCache(scales, key_dtype))
            return self._measuring[-1]
        config = self._scale_kv_for(model)
        last_scales = None if self.last_scales is None else replace(self.last_scales, scales=tuple(scales))
        if config is None:
            return KVCache(key_dtype, last_scales)
        capacities = config.capacities([h * w for h, w in scales], model.config.num_layers)
        return ScaleKVCache(scales, capacities, config, key_dtype, last_scales)

    def _scale_kv_for(self, model: Any) -> ScaleKVConfig | None:
        return self.scale_kv
