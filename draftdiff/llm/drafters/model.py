"""Drafts from any smaller model with the target's tokenizer: a chain, a tree of its likeliest, or a sampled tree.

Chains are speculative decoding (arXiv 2211.17192); trees of the likeliest continuations grow where the draft itself is
confident, as in EAGLE-2 (arXiv 2406.16858); sampled trees are SpecInfer's (arXiv 2305.09781) with the samplers of arXiv
2502.18779. A branch ends early where the draft's probability of its whole path falls below `confidence`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context, check_vocabularies, vocabulary_size
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.pair import check_length, learned_positions
from draftdiff.llm.tree import ROOT, Draws, Tree
from draftdiff.llm.verify import check_verifier, sample

# The draft's distributions after nodes of each row's tree, [nodes, vocabulary] for each row.
Expand = Callable[[list[list[int]]], list[Tensor]]


class Shape(Protocol):
    """How a tree grows from the draft's distributions."""

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Add nodes to the trees. roots: distributions [1, vocabulary] after the last accepted tokens."""


def _check(name: str, value: float, allowed: bool, text: str) -> None:
    if not allowed:
        raise ValueError(f"{name} must be {text}, got {value}")


@dataclass(frozen=True)
class Sampled:
    """A tree whose nodes have `branching[depth]` children each, sampled when the target samples, else the likeliest.

    sampler, verifier: keys of `verify.VERIFIERS`.  confidence: least probability of a path that is drafted further.
    """

    branching: tuple[int, ...] = (4, 2, 1, 1)
    sampler: str = "without_replacement"
    verifier: str = "rrs"
    confidence: float = 0.0

    def __post_init__(self) -> None:
        check_verifier(self.sampler, self.verifier)
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"branching must be positive numbers, got {self.branching}")
        _check("confidence", self.confidence, 0 <= self.confidence < 1, "in [0, 1)")

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Level by level."""
        frontier = [[(ROOT, 1.0)] if left > 0 else [] for left in room]
        found = roots
        for depth, count in enumerate(self.branching):
            if depth:
                if not any(frontier):
                    break
                found = expand([[node for node, _ in nodes] for nodes in frontier])
            for row, tree in enumerate(trees):
                grown: list[tuple[int, float]] = []
                for (node, chance), q in zip(frontier[row], found[row]):
                    tokens = sample(q, count, self.sampler) if sampling else _likeliest(q, count)
                    if sampling:
                        tree.draws[node] = Draws(q, tokens, self.sampler, self.verifier)
                    grown += [(tree.add(node, token), chance * float(q[token])) for token in dict.fromkeys(tokens)]
                more = depth + 1 < room[row]
                frontier[row] = [(node, chance) for node, chance in grown if more and chance >= self.confidence]


def _likeliest(q: Tensor, count: int) -> list[int]:
    """Fewer where q has fewer tokens of positive chance."""
    best = q.topk(min(count, len(q)))
    return [token for token, chance in zip(best.indices.tolist(), best.values.tolist()) if chance > 0]


def Chain(length: int = 5, confidence: float = 0.0) -> Sampled:
    """A chain of up to `length` tokens."""
    _check("length", length, length >= 1, "at least 1")
    return Sampled((1,) * length, "with_replacement", "rrs", confidence)


@dataclass(frozen=True)
class KBest:
    """A tree of the draft's likeliest paths: each level expands the best `width` nodes, `nodes` are proposed in all."""

    depth: int = 5
    width: int = 6
    nodes: int = 48
    confidence: float = 0.0

    def __post_init__(self) -> None:
        _check("depth", self.depth, self.depth >= 1, "at least 1")
        _check("width", self.width, self.width >= 1, "at least 1")
        least = self.width * max(self.depth - 1, 1)
        _check("nodes", self.nodes, self.nodes >= least, f"at least width * (depth - 1) = {least}")
        _check("confidence", self.confidence, 0 <= self.confidence < 1, "in [0, 1)")

    def grow(self, trees: list[Tree], roots: list[Tensor], room: list[int], sampling: bool, expand: Expand) -> None:
        """Level by level, then the best of what was seen but not expanded."""
        frontier = [[(ROOT, 1.0)] if left > 0 else [] for left in room]
        spare: list[list[tuple[float, int, int]]] = [[] for _ in trees]  # (chance of the path, parent, token)
        found = roots
        for depth in range(self.depth):
            if depth:
                if not any(frontier):
                    break
                found = expand([[node for node, _ in nodes] for nodes in frontier])
            for row, tree in enumerate(trees):
                if not frontier[row]:
                    continue
                best = found[row].topk(min(self.width, found[row].shape[1]))
                seen = [
                    (chance * q, node, token)
                    for (node, chance), some, tokens in zip(frontier[row], best.values.tolist(), best.indices.tolist())
                    for q, token in zip(some, tokens)
                    if q > 0
                ]
                seen.sort(reverse=True)
                last = depth + 1 == min(self.depth, room[row])
                chosen = [] if last else [one for one in seen[: self.width] if one[0] >= self.confidence]
                spare[row] += seen[len(chosen) :]
                frontier[row] = [(tree.add(node, token), chance) for chance, node, token in chosen]
        for row, tree in enumerate(trees):
            spare[row].sort(reverse=True)
            for _, node, token in spare[row][: self.nodes - len(tree.tokens)]:
                tree.add(node, token)


class ModelDrafter:
    """Drafts from a smaller language model of transformers that shares the target's tokenizer.

    model: on the target's device; its vocabulary may be padded to another multiple of 64.  shape: `Chain`, `KBest` or
    `Sampled`.
    """

    reads_hidden_states = False

    def __init__(self, model: PreTrainedModel, shape: Shape | None = None) -> None:
        self.model, self.shape = model, shape or Chain()
        self.forwards = 0

    def cost(self, target: PreTrainedModel) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward."""
        return bytes_per_forward(self.model) / bytes_per_forward(target)

    def begin(self, context: Context) -> None:
        """Prefill the draft.

        Raises ValueError for another vocabulary or device than the target's, an encoder-decoder model, and a prompt
        beyond the draft's learned positions. Where those end in the middle, it proposes nothing any more.
        """
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"a draft must be a decoder-only model, got {type(self.model).__name__}")
        check_length(self.model, context.ids[0].shape[1])
        self._positions = learned_positions(self.model)
        self._vocabulary = check_vocabularies(context.target.model, self.model)
        # The target may have padding tokens that the draft lacks; any other token in their place will do.
        self._last_token = vocabulary_size(self.model) - 1
        ids = torch.cat(context.ids).to(self.model.device).clamp(max=self._last_token)
        padding = torch.tensor(context.padding, device=ids.device)
        mask = (
            (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long() if any(context.padding) else None
        )
        self._decoder = TreeDecoder(self.model, ids, mask)
        self._prompt_forwards = self._decoder.forwards
        self.forwards = 0
        # Of what is pending in the draft: how many tokens were known when it was fed, and the places of tree nodes.
        self._known = [0] * len(ids)
        self._places: list[dict[int, int]] = [{} for _ in range(len(ids))]
        self._held = [ids.shape[1] - 1] * len(ids)

    def end(self) -> None:
        """Let the draft's cache go."""
        del self._decoder

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        room = context.room
        if self._positions is not None:
            left = self._positions - max(ids.shape[1] for ids in context.ids)
            room = [min(one, left) for one in room]
        if max(room) < 1:  # the last round, or no more positions
            return [Tree() for _ in context.ids]
        self._keep(context.paths)
        trees = [Tree() for _ in context.ids]
        roots = self._catch_up(context)
        self.shape.grow(trees, roots, room, context.sampling, lambda nodes: self._expand(context, trees, nodes))
        self.forwards = self._decoder.forwards - self._prompt_forwards
        return trees

    def _keep(self, paths: list[list[int]]) -> None:
        """Commit what the draft has already seen of the accepted tokens."""
        if not paths:
            return
        kept = []
        for row, path in enumerate(paths):
            places = [self._places[row][node] for node in path if node in self._places[row]]
            kept.append([*range(self._known[row]), *places])
            self._held[row] += len(kept[-1])
        self._decoder.keep(kept)

    def _catch_up(self, context: Context) -> list[Tensor]:
        tokens = [
            ids[0, held:].clamp(max=self._last_token).tolist() if left >= 0 else []
            for ids, held, left in zip(context.ids, self._held, context.room)
        ]
        self._known = [len(new) for new in tokens]
        self._places = [{} for _ in tokens]
        self._next = max(self._known)  # place of the token that is fed next
        logits = self._decoder.feed(tokens, [list(range(-1, len(new) - 1)) for new in tokens]).logits
        return [
            self._distribution(context, row, [[]], logits[row, known - 1 : known]) if known else logits[row, :0]
            for row, known in enumerate(self._known)
        ]

    def _expand(self, context: Context, trees: list[Tree], nodes: list[list[int]]) -> list[Tensor]:
        tokens = [[tree.tokens[node] for node in some] for tree, some in zip(trees, nodes)]
        parents = []
        for row, (tree, some) in enumerate(zip(trees, nodes)):
            places = self._places[row]
            above = [tree.parents[node] for node in some]
            parents.append([self._known[row] - 1 if parent == ROOT else places[parent] for parent in above])
            places.update({node: self._next + i for i, node in enumerate(some)})
        self._next += max(map(len, nodes))
        logits = self._decoder.feed(tokens, parents).logits
        return [
            self._distribution(context, row, _suffixes(context, trees[row], some), logits[row, : len(some)])
            if some
            else logits[row, :0]
            for row, some in enumerate(nodes)
        ]

    def _distribution(self, context: Context, row: int, suffixes: list[list[int]], logits: Tensor) -> Tensor:
        missing = self._vocabulary - logits.shape[-1]
        if missing > 0:
            logits = F.pad(logits, (0, missing), value=-torch.inf)
        return context.distribution(row, suffixes, logits[..., : self._vocabulary])


def _suffixes(context: Context, tree: Tree, nodes: list[int]) -> list[list[int]]:
    """The drafted tokens down to each node, where somebody wants to know them."""
    return [[tree.tokens[n] for n in tree.path(node)] for node in nodes] if any(context.processors) else []
