"""Drafts without a model, from what followed the last two tokens before (ADED, arXiv 2407.12021).

A tree of continuations is searched in a tri-gram table: by the paper's Monte-Carlo tree search (PUCT, which balances
likely branches against unvisited ones), or best first by the product of shares. The table learns while decoding.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, count
from typing import Any

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import CandidateGenerator

from draftdiff.llm.drafters.base import Context, vocabulary_size
from draftdiff.llm.drafters.ngram_table import NGramTable
from draftdiff.llm.tree import ROOT, Tree

SEARCHES = ("best_first", "puct")
_PATHS = 24  # PUCT: most visited paths that are proposed
_C1, _C2 = 32.0, 8.0  # PUCT: exploration, section 3.3


class NGramDrafter:
    """Drafts from a tri-gram table, on the host, in about a millisecond.

    table: what is known already; a new one learns from the prompt and while decoding, and stays for later generations.
    search: "best_first" or "puct".  depth: most tokens of a path.  nodes: most drafted tokens of a round.
    iterations, seed: of PUCT.
    """

    reads_hidden_states = False

    def __init__(
        self,
        table: NGramTable | None = None,
        *,
        search: str = "best_first",
        depth: int = 5,
        nodes: int = 64,
        iterations: int = 150,
        seed: int = 0,
    ) -> None:
        if search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
        for name, value in (("depth", depth), ("nodes", nodes), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.table = NGramTable() if table is None else table
        self.search, self.depth, self.nodes, self.iterations = search, depth, nodes, iterations
        self.forwards = 0
        self._random = random.Random(seed)

    def cost(self, target: Any) -> float:
        """No model is read."""
        return 0.0

    def begin(self, context: Context) -> None:
        """Learn from the prompts. Raises ValueError if the table is of another vocabulary."""
        _check_vocabulary(self.table, context.target.model)
        self._padding = context.padding
        for ids, padding in zip(context.ids, context.padding):
            self.table.learn_prompt(ids[0, padding:].tolist())

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        if context.trees:
            for ids, padding, left in zip(context.ids, self._padding, context.room):
                if left >= 0:
                    self.table.learn_step(ids[0, max(padding, ids.shape[1] - self.table.window) :].tolist())
        # A padding token can only stand in the pair if the prompt was one token, and then nothing follows it.
        return [self.tree(ids[0, -2:].tolist(), min(self.depth, left)) for ids, left in zip(context.ids, context.room)]

    def end(self) -> None:
        """The table stays: what it learned serves the next generation."""

    def tree(self, last: Sequence[int], depth: int) -> Tree:
        """Continuations of the last two tokens, at most `depth` long."""
        if len(last) < 2 or depth < 1:
            return Tree()
        return _best_first(self, last, depth) if self.search == "best_first" else _puct(self, last, depth)


def _best_first(drafter: NGramDrafter, last: Sequence[int], depth: int) -> Tree:
    """The likeliest paths, by the product of each token's share of the weights after its pair."""
    tree, arrival = Tree(), count()
    # (-share of the path, order of arrival, parent, token, token before, depth)
    queue: list[tuple[float, int, int, int, int, int]] = []

    def push(parent: int, share: float, a: int, b: int, level: int) -> None:
        found = drafter.table.follow(a, b)
        total = sum(weight for weight, _ in found)
        for weight, token in found:
            heapq.heappush(queue, (-share * weight / total, next(arrival), parent, token, b, level))

    push(ROOT, 1.0, last[0], last[1], 1)
    while queue and len(tree.tokens) < drafter.nodes:
        share, _, parent, token, before, level = heapq.heappop(queue)
        node = tree.add(parent, token)
        if level < depth:
            push(node, -share, before, token, level + 1)
    return tree


class _Followers(dict[tuple[int, int], tuple[list[tuple[float, int]], list[float]]]):
    """What follows the pairs that one search meets, with running sums of the weights."""

    def __init__(self, table: NGramTable) -> None:
        self._table = table

    def __missing__(self, pair: tuple[int, int]) -> tuple[list[tuple[float, int]], list[float]]:
        found = self._table.follow(*pair)
        self[pair] = found, list(accumulate(weight for weight, _ in found))
        return self[pair]


class _Node:
    """A place in the search. `prior` is its weight in the table, `reward` the sum over its `visits`.

    followers: what may follow, the heaviest first; None until expanded.  children: those of them that were visited.
    """

    __slots__ = ("children", "followers", "prior", "reward", "token", "visits")

    def __init__(self, token: int, prior: float) -> None:
        self.token, self.prior = token, prior
        self.visits, self.reward = 0, 0.0
        self.followers: list[tuple[float, int]] | None = None
        self.children: list[_Node] = []

    def select(self) -> _Node:
        """The child of the largest reward and exploration. Of the unvisited ones that is the heaviest, and only it."""
        children, followers = self.children, self.followers
        scale = (_C1 + math.log((self.visits + _C2 + 1) / _C2)) * math.sqrt(self.visits)
        best, most = None, -1.0
        for child in children:
            score = child.reward / child.visits + scale * child.prior / (1 + child.visits)
            if score > most:
                best, most = child, score
        if followers is not None and len(children) < len(followers):
            prior, token = followers[len(children)]
            if best is None or scale * prior > most:
                best = _Node(token, prior)
                children.append(best)
        assert best is not None
        return best


def _puct(drafter: NGramDrafter, last: Sequence[int], depth: int) -> Tree:
    """The paper's search: paths of `depth` - 1 tokens ranked by visits, each extended by its heaviest successor."""
    uniform, known = drafter._random.random, _Followers(drafter.table)
    root = _Node(last[1], 0.0)
    root.followers = known[last[0], last[1]][0]
    if not root.followers:
        return Tree()
    length = max(depth - 1, 1)
    for _ in range(drafter.iterations):
        path, before = [root], last[0]
        node = root
        while len(path) <= length and node.followers:
            before = node.token
            node = node.select()
            path.append(node)
        if node.followers is None and len(path) <= length:
            node.followers = known[before, node.token][0]
        reward = 1 + sum(one.prior for one in path)
        a, b = before, node.token
        for _ in range(length + 1 - len(path)):
            found, sums = known[a, b]
            if not found:
                break
            weight, token = found[bisect(sums, uniform() * sums[-1], hi=len(sums) - 1)]
            reward += weight
            a, b = b, token
        for one in path:
            one.visits += 1
            one.reward += reward
    return _most_visited(drafter, root, last[0], depth)


def _most_visited(drafter: NGramDrafter, root: _Node, before: int, depth: int) -> Tree:
    ends: list[tuple[int, list[int]]] = []
    stack = [(root, [before, root.token])]
    while stack:
        node, tokens = stack.pop()
        stack += [(child, [*tokens, child.token]) for child in node.children]
        if not node.children:
            ends.append((node.visits, tokens))
    ends.sort(key=lambda end: -end[0])
    tree = Tree()
    for _, tokens in ends[:_PATHS]:
        found = drafter.table.follow(tokens[-2], tokens[-1])
        path = [*tokens[2:], *([found[0][1]] if found else [])][:depth]
        node_of = ROOT
        for token in path:
            known = tree.child(node_of, token)
            if known is None and len(tree.tokens) >= drafter.nodes:
                return tree
            node_of = tree.add(node_of, token)
    return tree


class NGramCandidates(CandidateGenerator):
    """The same drafts as a chain, a `CandidateGenerator` as transformers' own assisted decoding takes it.

    drafter: its `depth` is the length of the chain.  max_length: of prompt and new tokens.  ends: tokens that end the
    text. Some hosts take what is accepted whole, beyond either: so the chain stops before them.
    """

    def __init__(self, drafter: NGramDrafter, *, max_length: int | None = None, ends: Sequence[int] = ()) -> None:
        self.drafter, self.max_length, self.ends = drafter, max_length, frozenset(ends)
        self._seen = 0

    def get_candidates(self, input_ids: LongTensor, **kwargs: Any) -> tuple[LongTensor, FloatTensor | None]:
        """The tokens so far [1, tokens] with the drafted ones behind, and no logits: the host then compares tokens."""
        table, length = self.drafter.table, input_ids.shape[1]
        if length < self._seen or not self._seen:
            table.learn_prompt(input_ids[0].tolist())
        else:
            table.learn_step(input_ids[0, -table.window :].tolist())
        self._seen = length
        depth = self.drafter.depth
        if self.max_length is not None:
            depth = min(depth, self.max_length - length - 1)  # the host's own token comes behind
        chain: list[int] = []
        last = input_ids[0, -2:].tolist()
        while len(last) == 2 and len(chain) < depth:
            found = table.follow(*last)
            if not found or found[0][1] in self.ends:
                break
            chain.append(found[0][1])
            last = [last[1], chain[-1]]
        drafted = torch.tensor([chain], dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids, drafted], dim=1), None  # type: ignore[return-value]

    def update_candidate_strategy(self, input_ids: LongTensor, scores: FloatTensor, num_matches: int) -> None:
        """The chain's length does not adapt."""


class _Host:
    """A model that gives assisted decoding our candidate generator where asked for one; itself it is not touched."""

    def __init__(self, model: PreTrainedModel, candidates: CandidateGenerator) -> None:
        self._model, self._candidates = model, candidates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)

    def _get_candidate_generator(self, **_: Any) -> CandidateGenerator:
        return self._candidates


def assisted(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: NGramDrafter | None = None,
    **model_kwargs: Any,
) -> Any:
    """transformers' own assisted decoding with n-grams as its assistant; called by `generate`, which takes `drafter=`.

    A chain and one row only, and no report: `speculative` does more. A streamer gets nothing but the prompt. Before
    transformers 5.24 models with sliding windows need `cache_implementation="dynamic_full"`, as caches are cropped.
    Raises ValueError without a drafter or for a table of another vocabulary, and whatever the host refuses.
    """
    if drafter is None:
        raise ValueError("assisted needs drafter=..., for example draftdiff.llm.NGramDrafter()")
    _check_vocabulary(drafter.table, model)
    ends = generation_config._eos_token_tensor
    candidates = NGramCandidates(
        drafter, max_length=generation_config.max_length, ends=[] if ends is None else ends.tolist()
    )
    return type(model)._assisted_decoding(
        _Host(model, candidates), input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    )


def _check_vocabulary(table: NGramTable, model: PreTrainedModel) -> None:
    size = vocabulary_size(model)
    if table.largest >= size:
        raise ValueError(f"the n-gram table holds token {table.largest}, the target has {size}: another tokenizer?")
