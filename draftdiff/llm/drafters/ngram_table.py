"""A bounded table of which token follows which two, from a corpus and from decoding (ADED, arXiv 2407.12021)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.files import replacing
from draftdiff.llm.checks import require, vocabulary_size
from draftdiff.llm.drafters.locked import Locked
from draftdiff.stored import read_tensors

_SHIFT = 32
_MASK = (1 << _SHIFT) - 1


class NGramTable(Locked):
    """Weights M[(a, b)][c]: of a corpus the share of c among what followed (a, b), plus what decoding added.

    corpus: sequences of token ids.  successors: most tokens kept for a pair, the heaviest.  max_pairs: pairs kept,
    those that were seen last.  rate, window, ceiling: each step adds `rate` to the trigrams among the last `window`
    tokens, up to `ceiling`.
    A corpus of any size is counted in bounded memory: at twice `max_pairs` pairs, or twice what the full table would
    hold, only the most frequent pairs and successors so far are counted on. Below that all shares are exact.
    """

    def __init__(
        self,
        corpus: Iterable[Sequence[int]] = (),
        *,
        successors: int = 12,
        max_pairs: int = 500_000,
        rate: float = 0.04,
        window: int = 16,
        ceiling: float = 3.0,
    ) -> None:
        require(
            successors >= 1 and max_pairs >= 1 and window >= 3,
            f"successors and max_pairs must be at least 1 and window 3, got {successors}, {max_pairs}, {window}",
        )
        super().__init__()
        self.successors, self.max_pairs = successors, max_pairs
        self.rate, self.window, self.ceiling = rate, window, ceiling
        frequent = _most_frequent(corpus, max_pairs, successors)
        # The first is the first to be forgotten. A plain dict would search for it past all that were deleted before.
        self._pairs: OrderedDict[int, dict[int, float]] = OrderedDict()
        for key, total, found in reversed(frequent):
            self._pairs[key] = {c: count / total for c, count in found.items()}
        self.largest = self._largest()  # token that is known

    def _largest(self) -> int:
        return max((max(key >> _SHIFT, key & _MASK, *found) for key, found in self._pairs.items()), default=-1)

    def __len__(self) -> int:
        """Pairs in the table."""
        return len(self._pairs)

    def follow(self, a: int, b: int) -> list[tuple[float, int]]:
        """(weight, token) of what may follow, the heaviest first."""
        with self._lock:
            found = list(self._pairs.get(a << _SHIFT | b, {}).items())
        return sorted(((weight, token) for token, weight in found), reverse=True)

    def learn_prompt(self, tokens: Sequence[int]) -> None:
        """Add all trigrams of a text, each as much as if it had been decoded token by token."""
        with self._lock:
            self._add(tokens, self.rate * (self.window - 2))

    def learn_step(self, tokens: Sequence[int]) -> None:
        """Add the trigrams among the last tokens, once a decoding step."""
        with self._lock:
            self._add(tokens[-self.window :], self.rate)

    def _add(self, tokens: Sequence[int], amount: float) -> None:
        for a, b, c in zip(tokens, tokens[1:], tokens[2:]):
            key = a << _SHIFT | b
            found = self._pairs.setdefault(key, {})
            self._pairs.move_to_end(key)
            self.largest = max(self.largest, a, b, c)
            found[c] = min(found.get(c, 0.0) + amount, self.ceiling)
            if len(found) > self.successors:
                # The lightest of the others, so that a new token has the chance to grow.
                del found[min((token for token in found if token != c), key=found.__getitem__)]
            if len(self._pairs) > self.max_pairs:
                self._pairs.popitem(last=False)

    def save(self, file: Path) -> None:
        """Write the table as safetensors, whole or not at all."""
        with self._lock:
            pairs = [(key, found.copy()) for key, found in self._pairs.items()]
        rows = [(key >> _SHIFT, key & _MASK, c) for key, found in pairs for c in found]
        weights = [weight for _, found in pairs for weight in found.values()]
        tensors = {
            "trigrams": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
            "weights": torch.tensor(weights, dtype=torch.float64),
        }
        with replacing(file) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, file: Path, **options: int | float) -> NGramTable:
        """A table written by `save`; options as for a new one, and what they have no room for is left out.

        Raises FileNotFoundError or, for any other file, ValueError.
        """
        table = cls(**options)  # type: ignore[arg-type]
        tensors = _saved(file)
        pairs: dict[int, dict[int, float]] = {}
        for (a, b, c), weight in zip(tensors["trigrams"].tolist(), tensors["weights"].tolist()):
            pairs.setdefault(a << _SHIFT | b, {})[c] = weight
        for key, found in islice(pairs.items(), max(len(pairs) - table.max_pairs, 0), None):
            table._pairs[key] = _heaviest(found, table.successors)
        table.largest = table._largest()
        return table


def _saved(file: Path) -> dict[str, Tensor]:
    """What `save` wrote: trigrams of ids and as many positive weights."""
    what = "saved n-gram table"
    tensors = read_tensors(file, what, {"trigrams": (torch.int64, (None, 3)), "weights": (torch.float64, (None,))})
    trigrams, weights = tensors["trigrams"], tensors["weights"]
    if len(trigrams) != len(weights):
        raise UserError(f"{file} is not a readable {what}: {len(trigrams)} trigrams have {len(weights)} weights")
    if ((trigrams < 0) | (trigrams > _MASK)).any():
        raise UserError(f"{file} is not a readable {what}: its ids go from {trigrams.min()} to {trigrams.max()}")
    if not (weights.isfinite() & (weights > 0)).all():
        raise UserError(f"{file} is not a readable {what}: its weights must be positive numbers")
    return tensors


def check_table(table: NGramTable, model: Any) -> None:
    """Raise ValueError for a table of a larger vocabulary than the model's."""
    size = vocabulary_size(model)
    require(
        table.largest < size, f"the n-gram table holds token {table.largest}, the target has {size}: another tokenizer?"
    )


def _heaviest(found: dict[int, float], successors: int) -> dict[int, float]:
    """The heaviest few, the smaller token first of equals."""
    return dict(sorted(found.items(), key=lambda one: (-one[1], one[0]))[:successors])


def _most_frequent(
    corpus: Iterable[Sequence[int]], max_pairs: int, successors: int
) -> list[tuple[int, int, dict[int, float]]]:
    """(pair, how often something followed it, counts of its most frequent successors), the most frequent pair first."""
    totals: Counter[int] = Counter()
    following: dict[int, dict[int, float]] = {}
    size = 0  # counts in `following`

    def best() -> list[tuple[int, int, dict[int, float]]]:
        return [(key, total, _heaviest(following[key], successors)) for key, total in totals.most_common(max_pairs)]

    for tokens in corpus:
        for a, b, c in zip(tokens, tokens[1:], tokens[2:]):
            key = a << _SHIFT | b
            found = following.setdefault(key, {})
            size += c not in found
            found[c] = found.get(c, 0) + 1
            totals[key] += 1
            if len(totals) > 2 * max_pairs or size > 2 * max_pairs * successors:
                kept = best()
                totals = Counter({key: total for key, total, _ in kept})
                following = {key: found for key, _, found in kept}
                size = sum(map(len, following.values()))
    return best()
