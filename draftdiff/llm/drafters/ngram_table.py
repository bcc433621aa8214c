"""A bounded table of which token follows which two, from a corpus and from decoding (ADED, arXiv 2407.12021)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_SHIFT = 32


class NGramTable:
    """Weights M[(a, b)][c]: of a corpus the share of c among what followed (a, b), plus what decoding added.

    corpus: sequences of token ids.  successors: most tokens kept for a pair, the heaviest.  max_pairs: pairs kept,
    those that were seen last.  rate, window, ceiling: each step adds `rate` to the trigrams among the last `window`
    tokens, up to `ceiling`.
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
        if successors < 1 or max_pairs < 1 or window < 3:
            raise ValueError(
                f"successors and max_pairs must be at least 1 and window 3, got {successors}, {max_pairs}, {window}"
            )
        self.successors, self.max_pairs = successors, max_pairs
        self.rate, self.window, self.ceiling = rate, window, ceiling
        self._pairs: dict[int, dict[int, float]] = {}
        counts: Counter[tuple[int, int, int]] = Counter()
        for tokens in corpus:
            counts.update(zip(tokens, tokens[1:], tokens[2:]))
        following: dict[int, list[tuple[int, int]]] = {}
        for (a, b, c), count in counts.items():
            following.setdefault(a << _SHIFT | b, []).append((count, c))
        frequent = sorted(following.items(), key=lambda item: -sum(count for count, _ in item[1]))[:max_pairs]
        self.largest = max((max(trigram) for trigram in counts), default=-1)  # token that is known
        for key, found in reversed(frequent):  # the most frequent pair is forgotten last
            total = sum(count for count, _ in found)
            best = sorted(found, key=lambda one: (-one[0], one[1]))[:successors]
            self._pairs[key] = {c: count / total for count, c in best}

    def __len__(self) -> int:
        """Pairs in the table."""
        return len(self._pairs)

    def follow(self, a: int, b: int) -> list[tuple[float, int]]:
        """(weight, token) of what may follow, the heaviest first."""
        found = self._pairs.get(a << _SHIFT | b)
        return sorted(((weight, token) for token, weight in found.items()), reverse=True) if found else []

    def learn_prompt(self, tokens: Sequence[int]) -> None:
        """Add all trigrams of a text, each as much as if it had been decoded token by token."""
        self._add(tokens, self.rate * (self.window - 2))

    def learn_step(self, tokens: Sequence[int]) -> None:
        """Add the trigrams among the last tokens, once a decoding step."""
        self._add(tokens[-self.window :], self.rate)

    def _add(self, tokens: Sequence[int], amount: float) -> None:
        for a, b, c in zip(tokens, tokens[1:], tokens[2:]):
            key = a << _SHIFT | b
            found = self._pairs.pop(key, {})
            self.largest = max(self.largest, a, b, c)
            self._pairs[key] = found  # now the last to be forgotten
            found[c] = min(found.get(c, 0.0) + amount, self.ceiling)
            if len(found) > self.successors:
                # The lightest of the others, so that a new token has the chance to grow.
                del found[min((token for token in found if token != c), key=found.__getitem__)]
        while len(self._pairs) > self.max_pairs:
            del self._pairs[next(iter(self._pairs))]

    def save(self, file: Path) -> None:
        """Write the table as safetensors, whole or not at all."""
        rows = [(key >> _SHIFT, key & (1 << _SHIFT) - 1, c) for key, found in self._pairs.items() for c in found]
        weights = [weight for found in self._pairs.values() for weight in found.values()]
        partial = file.with_name(f".{file.name}.partial")
        tensors = {
            "trigrams": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
            "weights": torch.tensor(weights, dtype=torch.float64),
        }
        save_file(tensors, partial)
        os.replace(partial, file)

    @classmethod
    def load(cls, file: Path, **options: int | float) -> NGramTable:
        """A table written by `save`; options as for a new one."""
        table = cls(**options)  # type: ignore[arg-type]
        tensors = load_file(file)
        for (a, b, c), weight in zip(tensors["trigrams"].tolist(), tensors["weights"].tolist()):
            table._pairs.setdefault(a << _SHIFT | b, {})[c] = weight
            table.largest = max(table.largest, a, b, c)
        return table
