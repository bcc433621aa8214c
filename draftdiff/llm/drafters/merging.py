"""Draft tokens as target tokens: the n-gram cache of OmniDraft (arXiv 2507.02659), merging, and the law of what comes
out.

A draft token is a target token of the same bytes, or several together are one (an n-gram, learned as text comes by), or
it cannot be proposed. Draft tokens are merged greedily, the longest n-gram first. A token that begins longer n-grams
loses the mass of the shortest of them: longer ones are among those already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from draftdiff.errors import UserError
from draftdiff.files import replacing
from draftdiff.llm.checks import require
from draftdiff.llm.drafters.locked import Locked
from draftdiff.stored import read_tensors

NGram = tuple[int, ...]


class Merged(NamedTuple):
    """Draft tokens [start, stop) and the target's token for them, None where there is none."""

    token: int | None
    start: int
    stop: int


class NGramCache(Locked):
    """Target tokens by the draft tokens that they consist of, two or more. Those seen longest ago are forgotten first.

    max_items: most n-grams that are kept; one takes about 300 bytes.  longest: most draft tokens of one. May be shared
    by threads.
    """

    def __init__(self, max_items: int = 20_000, longest: int = 8) -> None:
        require(max_items >= 1 and longest >= 2, f"max_items must be at least 1, longest 2, got {max_items}, {longest}")
        super().__init__()
        self.max_items, self.longest = max_items, longest
        self._targets: OrderedDict[NGram, int] = OrderedDict()
        self._by_first: dict[int, dict[NGram, int]] = {}

    def __len__(self) -> int:
        return len(self._targets)

    def learn(self, target: int, draft: Sequence[int]) -> bool:
        """That these draft tokens are this target token; whether that was news."""
        ngram = tuple(draft)
        if not 2 <= len(ngram) <= self.longest:
            return False
        with self._lock:
            new = ngram not in self._targets
            self._targets[ngram] = self._by_first.setdefault(ngram[0], {})[ngram] = target
            self._targets.move_to_end(ngram)
            if len(self._targets) > self.max_items:
                old, _ = self._targets.popitem(last=False)
                del self._by_first[old[0]][old]
                if not self._by_first[old[0]]:
                    del self._by_first[old[0]]
        return new

    def starting(self, first: int) -> dict[NGram, int]:
        """The n-grams that begin with a draft token, with their target tokens."""
        with self._lock:
            return dict(self._by_first.get(first, {}))

    def continues(self, draft: Sequence[int]) -> bool:
        """Whether an n-gram begins with these draft tokens and has more."""
        ngrams, size = self.starting(draft[0]), len(draft)
        return any(len(ngram) > size and ngram[:size] == tuple(draft) for ngram in ngrams)

    def settled(self, draft: Sequence[int], direct: Sequence[int]) -> list[Merged]:
        """The first of the merged tokens, those that no further draft token can change."""
        merged = self.merge(draft, direct)
        return list(takewhile(lambda one: not self.continues(draft[one.start :]), merged))

    def merge(self, draft: Sequence[int], direct: Sequence[int]) -> list[Merged]:
        """Draft tokens as target tokens, greedily. direct: the target's token of each of the draft's, -1 without
        one."""
        found, start = [], 0
        while start < len(draft):
            for stop in range(min(start + self.longest, len(draft)), start + 1, -1):
                token = self._targets.get(tuple(draft[start:stop]))
                if token is not None:
                    break
            else:
                stop = start + 1
                token = direct[draft[start]] if direct[draft[start]] >= 0 else None
            found.append(Merged(token, start, stop))
            start = stop
        return found

    def save(self, file: str | Path) -> None:
        """Write the cache as safetensors, whole or not at all."""
        with self._lock:
            items = list(self._targets.items())
        tensors = {
            "targets": torch.tensor([target for _, target in items], dtype=torch.int64),
            "lengths": torch.tensor([len(ngram) for ngram, _ in items], dtype=torch.int64),
            "drafts": torch.tensor([id for ngram, _ in items for id in ngram], dtype=torch.int64),
        }
        with replacing(Path(file)) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, file: str | Path, **options: int) -> NGramCache:
        """A cache written by `save`; options as for a new one. Raises FileNotFoundError or, for any other file,
        ValueError."""
        cache, what, any_length = cls(**options), "saved n-gram cache", (torch.int64, (None,))
        saved = read_tensors(file, what, dict.fromkeys(("targets", "lengths", "drafts"), any_length))
        lengths = saved["lengths"].tolist()
        if min(lengths, default=2) < 2 or len(lengths) != len(saved["targets"]) or sum(lengths) != len(saved["drafts"]):
            raise UserError(f"{file} is not a readable {what}: its targets, lengths and drafts do not fit together")
        for target, ngram in zip(saved["targets"].tolist(), saved["drafts"].split(lengths)):
            cache.learn(target, ngram.tolist())
        return cache


def merged_masses(ngrams: Iterable[NGram], law: Callable[[NGram], Any]) -> dict[NGram, Any]:
    """What merging by these n-grams gives each of them, and takes from the single tokens (n-grams of 1) they begin
    with.

    law: of the next draft token after some others, numbers of any kind by token; it is asked for proper beginnings.
    """
    known = set(ngrams)
    chances: dict[NGram, Any] = {}

    def chance(ngram: NGram) -> Any:
        if ngram not in chances:
            last = law(ngram[:-1])[ngram[-1]]
            chances[ngram] = chance(ngram[:-1]) * last if len(ngram) > 1 else last
        return chances[ngram]

    masses: dict[NGram, Any] = {}
    for ngram in sorted(known, key=len):
        masses[ngram] = masses.get(ngram, 0) + chance(ngram)
        shorter = next(ngram[:n] for n in range(len(ngram) - 1, 0, -1) if n == 1 or ngram[:n] in known)
        masses[shorter] = masses.get(shorter, 0) - chance(ngram)
    return masses
