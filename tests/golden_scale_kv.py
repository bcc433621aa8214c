"""Parity of one golden case of ScaleKV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from draftdiff.core.importance import smooth
from draftdiff.var import scale_kv
from draftdiff.var.scale_kv import ScaleKVCache, ScaleKVConfig
from tests.golden_cases import Case, tolerances
from tests.golden_infinity import infinity_pipeline, run


class Recorder(ScaleKVCache):
    """Keeps the last scale too, as the original does, and what was chosen."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept, self.lengths, self.before = {}, {}, {}

    def extend(self, layer, key, value, *, keep=True):
        return super().extend(layer, key, value, keep=True)

    def observe(self, layer, query, key, raw_query):
        scale = self._ends[self._seen[layer]]
        self.chosen = None
        super().observe(layer, query, key, raw_query)
        self.lengths[layer, scale] = self.tokens(layer)
        if self.chosen is not None:
            self.kept[layer, scale], self.before[layer, scale] = self.chosen, key.shape[2]


def mask_of(case: Case, name: str, keys: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(case[name].numpy(), axis=-1, count=keys)).bool()


def check_scale_kv(case: Case) -> None:
    """Cache lengths, kept keys, bits and latents."""
    with pytest.MonkeyPatch.context() as patch:
        _check(case, patch)


def _check(case: Case, patch: pytest.MonkeyPatch) -> None:
    settings, (call,) = case.info["scalekv"], case.info["calls"].values()
    tolerance = tolerances(case.info["tolerance"])
    pooling = {"maxpool": "max", "avgpool": "average"}[settings["pooling"]]
    config = ScaleKVConfig(scoring="upstream", pooling=pooling, kernel=settings["kernel_size"])
    scales = [tuple(scale[1:]) for scale in call["scale_schedule"]]
    # The row "Scale n" is used after the scale of number n - 2, and the last scale uses that of the one before.
    rows = {int(name.split()[1]) - 2: row for name, row in case.info["budget_rows"].items()}
    capacities = [rows.get(scale) for scale in range(len(scales) - 1)]
    capacities.append(capacities[-1])

    caches, pooled = [], []
    pipe = infinity_pipeline(case)

    def new_cache(*_):
        caches.append(Recorder(scales, capacities, config))
        return caches[-1]

    def keep_topk(scores, count, always):
        indices = original(scores, count, always)
        caches[-1].chosen = indices
        return indices

    def pool(*arguments):
        pooled.append(smooth(*arguments))
        return pooled[-1]

    original = scale_kv.keep_topk
    patch.setattr(scale_kv, "keep_topk", keep_topk)
    patch.setattr(scale_kv, "smooth", pool)
    patch.setattr(pipe, "_make_cache", new_cache)
    _, steps = run(pipe, case, call, "latent")
    (cache,) = caches

    # Where the original keeps keys twice, ours cannot follow it further than the scale before.
    doubled = {name.removeprefix("twice.") for name in case.tensors if name.startswith("twice.")}
    first = min(scale for _, scale in cache.kept)
    last = first if doubled else len(scales) - 1
    lengths = case["cached_len"]
    compared = 0
    for (layer, scale), indices in cache.kept.items():
        label = f"l{layer}.s{scale:02d}"
        assert cache.lengths[layer, scale] == lengths[layer, scale]
        if scale > last or label in doubled:
            continue
        keys = case.info["eviction"]["keys_before"][label]
        assert cache.before[layer, scale] == keys
        ours = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool).scatter_(-1, indices, True)
        theirs = mask_of(case, f"kept.{label}", keys)
        # Another choice among keys of the very same score counts as equal.
        scores = pooled[list(cache.kept).index((layer, scale))]
        if f"score.{label}" in case.tensors:
            torch.testing.assert_close(scores, case[f"score.{label}"], atol=tolerance["score"], rtol=0)
        for row_ours, row_theirs, row_scores in zip(ours.flatten(0, 1), theirs.flatten(0, 1), scores.flatten(0, 1)):
            assert row_ours.sum() == row_theirs.sum()
            swapped = row_scores[row_ours != row_theirs]
            assert swapped.numel() == 0 or swapped.max() - swapped.min() <= tolerance["score"]
        compared += 1
    assert compared >= 3

    bits = torch.cat([step["bits"] for step in steps], dim=1)[0]
    exact = sum(h * w for h, w in scales[: last + 1])
    share = (bits[:exact] != case["bits"][:exact].long()).float().mean().item()
    assert share <= 0.0005
    if not doubled:
        early = sum(h * w for h, w in scales[:-4])
        assert torch.equal(bits[:early], case["bits"][:early].long())
        if share == 0:
            torch.testing.assert_close(steps[-1]["latents"], case["latent"], atol=tolerance["latent"], rtol=0)
