"""A cache that is cut down after each scale (ScaleKV, arXiv 2505.19602), every layer or head to its own budget.

What a head keeps is decided by the attention of a few tokens spread over the scale just generated. Heads of a layer
that keep as many keys are held and attended together, so that a budget per head costs neither padding nor masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draftdiff.core.importance import attention_mass, gather_kv, keep_topk, smooth
from draftdiff.var.cache import KVCache, Place
from draftdiff.var.last_scales import LastScales
from draftdiff.var.scale_kv import SCORINGS, WINDOW_SIDE, Capacities, ScaleKVConfig, window


class ScaleKVCache(KVCache):
    """A KVCache that evicts after each scale.

    scales: (height, width) of each.  capacities: keys per layer after each scale, or per layer and head, None for all;
    rows may be missing at the end.
    """

    def __init__(
        self,
        scales: Sequence[tuple[int, int]],
        capacities: Sequence[Capacities | None],
        config: ScaleKVConfig,
        key_dtype: torch.dtype | None = None,
        last_scales: LastScales | None = None,
    ) -> None:
        super().__init__(key_dtype, last_scales)
        self.scales = [tuple(scale) for scale in scales]
        self.capacities = capacities
        self.config = config
        self.window_side = WINDOW_SIDE
        self._ends = {sum(h * w for h, w in self.scales[: n + 1]): n for n in range(len(self.scales))}
        self._seen: dict[Place, int] = {}
        self._heads: dict[int, list[tuple[int, ...]]] = {}  # of each group of a layer that is not one place
        self._parted: dict[int, list[tuple[list[int], Tensor, Tensor]]] = {}  # of a layer that is being cut
        self._keeping, self._device = True, torch.device("cpu")

    def groups(self, layer: int) -> list[tuple[Place, Tensor]]:
        """See KVCache."""
        return [((layer, n), self._at(heads)) for n, heads in enumerate(self._heads.get(layer, ()))]

    def extend(self, place: Place, key: Tensor, value: Tensor, *, keep: bool = True) -> tuple[Tensor, Tensor]:
        """See KVCache."""
        self._seen[place] = self._seen.get(place, 0) + key.shape[2]
        self._keeping, self._device = keep, key.device
        return super().extend(place, key, value, keep=keep)

    def clear(self) -> None:
        """See KVCache."""
        super().clear()
        self._seen.clear()
        self._heads.clear()

    def observe(self, place: Place, query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]) -> None:
        """Cut the heads at a place down to their capacity after the scale that has just been attended."""
        layer, group = (place, None) if isinstance(place, int) else place
        scale = self._ends[self._seen[place]]
        row = self.capacities[scale] if scale < len(self.capacities) else None
        if not self._keeping or row is None:
            return
        of_heads = row[layer]
        if isinstance(of_heads, int):
            of_heads = [of_heads] * (query.shape[1] if group is None else sum(map(len, self._heads[layer])))
        heads = range(len(of_heads)) if group is None else self._heads[layer][group]
        counts = [min(of_heads[head], self.tokens(place)) for head in heads]
        cut = self._cut(place, scale, counts, query, key, raw_query)
        if group is None and len(cut) == 1:
            ((self.keys[place], self.values[place]),) = cut.values()
            return
        del self.keys[place], self.values[place]
        parts = self._parted.setdefault(layer, [])
        parts += [([h for h, n in zip(heads, counts) if n == count], *kept) for count, kept in cut.items()]
        if sum(len(part[0]) for part in parts) == len(of_heads):
            self._regroup(layer, self._seen[place])

    def _cut(
        self, place: Place, scale: int, counts: list[int], query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of a place by how many of them its heads keep."""
        keys, values = self.keys[place], self.values[place]
        if min(counts) < keys.shape[2]:
            always, scores = self._scores(scale, query, key, raw_query)
        found = {}
        for count in sorted(set(counts)):
            rows = [row for row, n in enumerate(counts) if n == count]
            at = None if len(rows) == len(counts) else self._at(tuple(rows))
            some = (keys, values) if at is None else (keys[:, at], values[:, at])
            if count < keys.shape[2]:
                own = scores if at is None else scores[:, at]
                some = gather_kv(*some, self.choose(place, scale, own, keep_topk(own, count, always)))
            found[count] = some
        return found

    def _regroup(self, layer: int, seen: int) -> None:
        """Put the parts of a layer into places, those that hold as many keys into one."""
        for group in range(len(self._heads.pop(layer, ()))):
            del self._seen[layer, group]
        parts, places = self._parted.pop(layer), []
        for count in sorted({keys.shape[2] for _, keys, _ in parts}):
            alike = [part for part in parts if part[1].shape[2] == count]
            heads = [head for part in alike for head in part[0]]
            order = sorted(range(len(heads)), key=heads.__getitem__)
            keys = torch.cat([keys for _, keys, _ in alike], dim=1)[:, self._at(tuple(order))]
            values = torch.cat([values for _, _, values in alike], dim=1)[:, self._at(tuple(order))]
            places.append((tuple(sorted(heads)), keys, values))
        if len(places) > 1:
            self._heads[layer] = [heads for heads, _, _ in places]
        for group, (_, keys, values) in enumerate(places):
            place = layer if len(places) == 1 else (layer, group)
            self.keys[place], self.values[place], self._seen[place] = keys, values, seen

    def _at(self, numbers: tuple[int, ...]) -> Tensor:
        """Numbers as an index on the device, int64; made once."""
        return self.once(("at", numbers), lambda: torch.tensor(numbers, device=self._device))

    def _scores(self, scale: int, query: Tensor, key: Tensor, raw_query: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys that stay whatever they score, int64 [n], and what all score, fp32 [batch, heads, keys]."""
        height, width = self.scales[scale]
        row = self.capacities[scale] or ()
        least = min(n if isinstance(n, int) else min(n) for n in row)
        side = min(self.window_side, height, width, max(math.isqrt(least // 2), 1))
        at = self.once(("window", scale), lambda: window((height, width), side).to(key.device))
        new = height * width
        always = at + key.shape[2] - new
        if self.config.scoring == "paper":
            scores = attention_mass(query[:, :, -new:][:, :, at], key, scale=1.0)
        else:
            raw = raw_query()[:, :, -new:][:, :, at].sum(2, keepdim=True)
            scores = (raw @ key.transpose(-1, -2))[:, :, 0].float() / math.sqrt(key.shape[-1])
            scores = scores.index_fill(-1, always, -torch.inf)
        return always, smooth(scores, self.config.kernel, self.config.pooling or SCORINGS[self.config.scoring])

    def choose(self, place: Place, scale: int, scores: Tensor, best: Tensor) -> Tensor:
        """Which keys stay, int64 [batch, heads, kept], given their scores [batch, heads, keys] and the best of them."""
        return best
