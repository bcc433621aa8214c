"""Parity of one golden case of ScaleKV."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from draftdiff.var.cache import KVCache
from draftdiff.var.scale_kv import ScaleKVConfig, window
from draftdiff.var.scale_kv_cache import ScaleKVCache
from tests.golden_cases import Case, tolerances
from tests.golden_infinity import infinity_pipeline, run

POOLINGS = {"maxpool": "max", "avgpool": "average"}


class FollowingCache(ScaleKVCache):
    """Compares what it would keep with what the original kept, and goes on with the original's choice.

    Among keys of the very same score another choice is as good, but changes all that comes after.
    """

    def __init__(self, case: Case, scales: list[tuple[int, int]]) -> None:
        settings = case.info["scalekv"]
        # The row "Scale n" is used after the scale of number n - 2, and the last scale uses that of the one before.
        rows = {int(name.split()[1]) - 2: row for name, row in case.info["budget_rows"].items()}
        capacities = [rows.get(scale) for scale in range(len(scales) - 1)]
        pooling = POOLINGS[settings["pooling"]]
        config = ScaleKVConfig(scoring="upstream", pooling=pooling, kernel=settings["kernel_size"])
        super().__init__(scales, [*capacities, capacities[-1]], config)
        self.window_side = math.isqrt(settings["window_size"])
        self.case, self.most = case, settings["max_capacity"]
        self.tolerance = tolerances(case.info["tolerance"]).get("score", 1e-4)
        self.results: dict[str, torch.Tensor] = {}
        self.lengths: dict[tuple[int, int], int] = {}
        self.followed: list[str] = []

    def extend(self, layer, key, value, *, keep=True):
        return super().extend(layer, key, value, keep=True)  # the original keeps the last scale too

    def observe(self, layer, query, key, raw_query):
        if key.shape[2] > self.most:
            super().observe(layer, query, key, raw_query)
        self.lengths[layer, self._ends[self._seen[layer]]] = self.tokens(layer)

    def choose(self, layer, scale, scores, best):
        label, keys = f"l{layer}.s{scale:02d}", scores.shape[-1]
        ours = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)
        self.results |= {f"kept.{label}": ours, f"score.{label}": scores}
        if f"kept.{label}" not in self.case.tensors:
            return best
        assert keys == self.case.info["eviction"]["keys_before"][label]
        always = self.case.info["eviction"]["window"][str(scale)]
        assert window(self.scales[scale], self.window_side).tolist() == always
        if f"score.{label}" in self.case.tensors:
            torch.testing.assert_close(scores, self.case[f"score.{label}"], atol=self.tolerance, rtol=0)
        kept, twice = (mask_of(self.case, f"{name}.{label}", scores) for name in ("kept", "twice"))
        assert torch.equal(ours.sum(-1), kept.sum(-1) + twice.sum(-1))
        rows = zip(*(x.flatten(0, 1) for x in (ours, kept, twice, scores.clamp(min=torch.finfo(scores.dtype).min))))
        chosen = []
        for mine, theirs, again, worth in rows:
            swapped = worth[mine != theirs]
            assert swapped.numel() == 0 or swapped.max() - swapped.min() <= self.tolerance, label
            chosen.append(torch.arange(keys).repeat_interleave(theirs.long() + again))
        self.followed.append(label)
        return torch.stack(chosen).unflatten(0, scores.shape[:2])


def mask_of(case: Case, name: str, like: torch.Tensor) -> torch.Tensor:
    """A mask of keys, unpacked; nothing where the case has none."""
    if name not in case.tensors:
        return torch.zeros(like.shape, dtype=torch.bool)
    return torch.from_numpy(np.unpackbits(case[name].numpy(), axis=-1, count=like.shape[-1])).bool()


def generate(case: Case, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits [tokens, bits per token] and latents of the case's call with this cache."""
    (call,) = case.info["calls"].values()
    pipe = infinity_pipeline(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "_make_cache", lambda *_: cache)
        _, steps = run(pipe, case, call, "latent")
    return torch.cat([step["bits"] for step in steps], dim=1)[0], steps[-1]["latents"]


def scale_kv_results(case: Case) -> tuple[dict[str, torch.Tensor], FollowingCache]:
    """Every result that a case may have; masks of kept keys as bool."""
    (call,) = case.info["calls"].values()
    cache = FollowingCache(case, [tuple(scale[1:]) for scale in call["scale_schedule"]])
    bits, latent = generate(case, cache)
    layers = 1 + max(layer for layer, _ in cache.lengths)
    lengths = [[cache.lengths[layer, scale] for scale in range(len(cache.scales))] for layer in range(layers)]
    return {"bits": bits, "latent": latent, "cached_len": torch.tensor(lengths), **cache.results}, cache


def check_scale_kv(case: Case) -> None:
    """Cache lengths, kept keys, bits and latents; of the whole cache too where the case has its bits."""
    ours, cache = scale_kv_results(case)
    known = {*ours, "text", "negative_text", "full_cache_bits"} | {name.replace("kept", "twice") for name in ours}
    assert set(case.tensors) <= known, f"unknown results: {sorted(set(case.tensors) - known)}"
    assert {f"kept.{label}" for label in cache.followed} == {name for name in case.tensors if name.startswith("kept.")}
    assert cache.followed
    assert torch.equal(ours["cached_len"], case["cached_len"].long())

    wrong = (ours["bits"] != case["bits"].long()).float()
    early = sum(h * w for h, w in cache.scales[:-4])
    assert not wrong[:early].any() and wrong.mean() <= 0.0005
    if "latent" in case.tensors and not wrong.any():
        allowed = tolerances(case.info["tolerance"])["latent"]
        torch.testing.assert_close(ours["latent"], case["latent"], atol=allowed, rtol=0)
    if "full_cache_bits" in case.tensors:
        assert torch.equal(generate(case, KVCache())[0], case["full_cache_bits"].long())
