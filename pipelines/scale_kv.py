"""What both next-scale pipelines share of their caches: ScaleKV on, off and calibrated, draft attention on and off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from draftdiff.var.cache import KVCache
from draftdiff.var.last_scales import LastScales
from draftdiff.var.scale_kv import Drafters, ScaleKVCache, ScaleKVConfig
from draftdiff.var.selectivity import Selectivity, SelectivityCache, selectivity


class ScaleKVMixin:
    """`enable_scale_kv`, `disable_scale_kv`, `calibrate_scale_kv`; what is enabled is `scale_kv`, None if nothing."""

    transformer: Any
    scale_kv: ScaleKVConfig | None = None
    last_scales: LastScales | None = None
    _measuring: list[SelectivityCache] | None = None

    def enable_scale_kv(
        self,
        budget: float = 0.1,
        *,
        drafters: Drafters = None,
        allocation: str = "full",
        scoring: str = "paper",
        pooling: str | None = None,
        kernel: int = 5,
    ) -> None:
        """Keep a share of the cache (ScaleKV, arXiv 2505.19602); see ScaleKVConfig for the arguments and their units.

        Raises ValueError for one that cannot be.
        """
        config = ScaleKVConfig(budget, drafters, allocation, scoring, pooling, kernel)
        config.check_drafters(self.transformer.config.num_layers)
        self.scale_kv = config

    def disable_scale_kv(self) -> None:
        """Keep the whole cache again."""
        self.scale_kv = None

    def calibrate_scale_kv(self, prompts: Iterable[Any], **call: Any) -> Selectivity:
        """Measure how widely each layer looks, over one generation per prompt (or class label) with the whole cache.

        call: further arguments of the pipeline. `enable_scale_kv(drafters=found.drafters())` puts the result to use;
        ten prompts are enough, says the paper. Raises ValueError without prompts or if the pipeline has two models.
        """
        prompts = list(prompts)
        if not prompts:
            raise ValueError("calibration needs at least one prompt")
        if getattr(self, "refiner", None) is not None:
            raise ValueError("calibrate one model at a time: disable_collaborative() first")
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

        Off by default: it pays at Infinity's largest sizes only (`samples/bench_var_attention.py`).
        Raises ValueError for a value that cannot be.
        """
        self.last_scales = LastScales(density, min_tokens)

    def disable_draft_attention(self) -> None:
        """Dense attention at every scale again."""
        self.last_scales = None

    def _make_cache(self, scales: Sequence[tuple[int, int]], model: Any, key_dtype: torch.dtype | None) -> KVCache:
        if self._measuring is not None:
            self._measuring.append(SelectivityCache(key_dtype))
            return self._measuring[-1]
        config = self._scale_kv_for(model)
        last_scales = None if self.last_scales is None else replace(self.last_scales, scales=tuple(scales))
        if config is None:
            return KVCache(key_dtype, last_scales)
        capacities = config.capacities([h * w for h, w in scales], model.config.num_layers)
        return ScaleKVCache(scales, capacities, config, key_dtype, last_scales)

    def _scale_kv_for(self, model: Any) -> ScaleKVConfig | None:
        return self.scale_kv
