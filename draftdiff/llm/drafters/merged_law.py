"""Drafts drawn from the exact law of merged tokens, for verification by rejection (OmniDraft, arXiv 2507.02659).

What a drawn token is compared with must be the law that it was drawn from, for every token, also for those whose draft
tokens were not drawn: with the chances on the drawn path alone the output would be biased. So all beginnings of n-grams
that matter are read in one forward, as a tree, and the token is drawn from what follows; what cannot be proposed is one
more token of the law, which the target never says.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftdiff.llm.drafters.merging import NGram, NGramCache, merged_masses
from draftdiff.llm.tree import ROOT, Draws, Tree
from draftdiff.llm.verify import sample

_FIRST, _BEGINNINGS = 8, 32  # likeliest first tokens whose n-grams are looked at, and beginnings that are read

# What is to be fed: tokens and the places of their parents in the draft's cache. Logits [tokens, vocabulary] come back.
Request = tuple[list[int], list[int]]


@dataclass
class _Next:
    """What may follow. law: of the next draft token, fp64 [draft vocabulary].  places: of the beginnings of n-grams in
    the draft's cache.  masses: that merging moves.  targets: the n-grams' target tokens."""

    law: Tensor
    places: dict[NGram, int]
    masses: dict[NGram, float]
    targets: dict[NGram, int]

    def path(self, token: int, mapped: Tensor) -> NGram:
        """The draft tokens that most often are this token of the target."""
        single: list[NGram] = [(d,) for d in (mapped == token).nonzero()[:, 0].tolist()]
        several = [ngram for ngram, target in self.targets.items() if target == token]
        chances = {one: float(self.law[one[0]]) + self.masses.get(one, 0.0) for one in single}
        chances |= {ngram: self.masses[ngram] for ngram in several}
        return max(chances, key=chances.__getitem__)


def sampled_path(
    tree: Tree,
    logits: Tensor,
    place: int,
    next_place: Callable[[], int],
    cache: NGramCache,
    direct: Sequence[int],
    *,
    length: int,
    size: int,
    device: torch.device,
) -> Generator[Request, Tensor, None]:
    """Add up to `length` drawn tokens of the target to a tree, as a chain. Yields what the draft is to be fed, so that
    the rows of a batch are fed together.

    logits: of the draft after the text, [vocabulary].  place: of the text's last token.  next_place: at which a request
    that is being made will be fed.  direct: the target's token of each of the draft's, -1 without one.  size: of the
    target's vocabulary.  device: its own.
    """
    mapped = torch.tensor([size if token < 0 else token for token in direct], device=logits.device)
    node = ROOT
    for depth in range(length):
        after = yield from _look_ahead(logits, place, next_place, cache)
        q = merged_law(after.law, after.masses, after.targets, mapped, size)
        tokens = sample(q, 1, "with_replacement")
        tree.draws[node] = Draws(q.to(device), tokens, "with_replacement", "rrs")
        if not tokens or tokens[0] == size:
            return
        node = tree.add(node, tokens[0])
        if depth + 1 < length:
            path = after.path(tokens[0], mapped)
            place = next_place()
            logits = (yield [path[-1]], [after.places[path[:-1]]])[0]


def merged_law(law: Tensor, masses: dict[NGram, float], targets: dict[NGram, int], mapped: Tensor, size: int) -> Tensor:
    """The law of the next merged token, fp32 [size + 1]; the last is that of what cannot be proposed.

    law: of the next draft token [draft vocabulary].  masses: of `merged_masses` for the n-grams, whose target tokens
    are `targets`.  mapped: the target's token of each of the draft's, `size` without one; missing ones have none.
    """
    q = torch.zeros(size + 1, dtype=torch.float64, device=law.device)
    q.index_add_(0, mapped, law[: len(mapped)].double())
    q[size] += law[len(mapped) :].sum()
    if masses:
        where = [targets[ngram] if len(ngram) > 1 else int(mapped[ngram[0]]) for ngram in masses]
        moved = torch.tensor(list(masses.values()), dtype=torch.float64, device=law.device)
        q.index_add_(0, torch.tensor(where, device=law.device), moved)
    q = q.clamp(min=0)  # rounding
    return (q / q.sum()).float()


def _look_ahead(
    logits: Tensor, place: int, next_place: Callable[[], int], cache: NGramCache
) -> Generator[Request, Tensor, _Next]:
    law = logits.double().softmax(-1)
    targets: dict[NGram, int] = {}
    beginnings: dict[NGram, None] = {}
    for first in law.topk(min(_FIRST, len(law))).indices.tolist():
        for ngram, target in cache.starting(first).items():
            new = [ngram[:n] for n in range(1, len(ngram)) if ngram[:n] not in beginnings]
            if len(beginnings) + len(new) <= _BEGINNINGS:
                beginnings |= dict.fromkeys(new)
                targets[ngram] = target
    order = sorted(beginnings, key=len)  # a beginning's own come before it
    start = next_place()
    places: dict[NGram, int] = {(): place} | {ngram: start + i for i, ngram in enumerate(order)}
    laws: dict[NGram, Tensor] = {(): law}
    if order:
        after = yield [ngram[-1] for ngram in order], [places[ngram[:-1]] for ngram in order]
        laws |= dict(zip(order, after.double().softmax(-1)))
    needed = sorted({ngram[:n] for ngram in targets for n in range(1, len(ngram) + 1)})
    found = torch.stack([laws[ngram[:-1]][ngram[-1]] for ngram in needed]).tolist() if needed else []
    chances: dict[NGram, dict[int, float]] = {}
    for ngram, chance in zip(needed, found):
        chances.setdefault(ngram[:-1], {})[ngram[-1]] = chance
    return _Next(law, places, merged_masses(targets, chances.__getitem__), targets)
