"""What both next-scale pipelines share of ScaleKV: on, off, calibration, and the cache of a generation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from draftdiff.var.cache import KVCache
from draftdiff.var.scale_kv import Drafters, ScaleKVCache, ScaleKVConfig
from draftdiff.var.selectivity import Selectivity, SelectivityCache, selectivity


class ScaleKVMixin:
    """`enable_scale_kv`, `disable_scale_kv`, `calibrate_scale_kv`; what is enabled is `scale_kv`, None if nothing."""

    transformer: Any
    scale_kv: ScaleKVConfig | None = None
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

    def _make_cache(self, scales: Sequence[tuple[int, int]], model: Any, key_dtype: torch.dtype | None) -> KVCache:
        if self._measuring is not None:
            self._measuring.append(SelectivityCache(key_dtype))
            return self._measuring[-1]
        config = self._scale_kv_for(model)
        if config is None:
            return KVCache(key_dtype)
        capacities = config.capacities([h * w for h, w in scales], model.config.num_layers)
        return ScaleKVCache(scales, capacities, config, key_dtype)

    def _scale_kv_for(self, model: Any) -> ScaleKVConfig | None:
        return self.scale_kv
