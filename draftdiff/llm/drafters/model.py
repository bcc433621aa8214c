"""Drafts from any smaller model with the target's tokenizer (arXiv 2211.17192), in any of the `shapes`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.hosts.transformers import device_of
from draftdiff.hosts.transformers_quirks import learned_positions, media_tokens
from draftdiff.llm.checks import check_vocabulary_sizes, require, vocabulary_size
from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context, Reads, suffixes
from draftdiff.llm.drafters.shapes import Chain, Sampled, Shape
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import ROOT, Tree


class ModelDrafter:
    """Drafts from a smaller language model of transformers that shares the target's tokenizer.

    model: on any device; its vocabulary may be padded or have tokens added, fewer than 1,024 together.  shape: `Chain`,
    `KBest` or `Sampled`.  same_tokenizer: whether to take it for the target's whatever its size.
    """

    reads = Reads()

    def __init__(self, model: PreTrainedModel, shape: Shape | None = None, *, same_tokenizer: bool = False) -> None:
        self.model, self.shape, self.same_tokenizer = model, shape or Chain(), same_tokenizer
        self.forwards = 0
        self.last_report: Report | None = None
        self._session: _Session | None = None

    @property
    def samples(self) -> bool:
        """Whether drafts are drawn at random when the target samples."""
        return isinstance(self.shape, Sampled)

    def cost(self, target: PreTrainedModel) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward."""
        return bytes_per_forward(self.model) / bytes_per_forward(target)

    def begin(self, context: Context) -> None:
        """Prefill the draft, which proposes nothing where its learned positions have ended.

        Raises ValueError for another vocabulary than the target's and for an encoder-decoder model.
        """
        check_draft(self.model)
        self._session, self.forwards = _Session(self.model, context, self.same_tokenizer), 0

    def end(self) -> None:
        """Let the draft's cache go."""
        self._session = None

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        assert self._session is not None, "propose before begin"
        room = self._session.room(context)
        trees = [Tree() for _ in context.ids]
        if max(room) >= 1:  # else it is the last round, or there are no more positions
            roots = self._session.catch_up(context)
            expand = self._session.expand
            self.shape.grow(trees, roots, room, context.sampling, lambda nodes: expand(context, trees, nodes))
            self.forwards = self._session.forwards
        return trees


def check_draft(model: PreTrainedModel) -> None:
    """Raise ValueError for what is no draft model."""
    require(not model.config.is_encoder_decoder, f"a draft must be a decoder-only model, got {type(model).__name__}")


class DraftSide:
    """A draft model in one generation: its cache after the prompt, and what it says in the target's vocabulary.

    held: tokens of each row that are committed in its cache.
    """

    def __init__(self, model: PreTrainedModel, context: Context, same_tokenizer: bool = False) -> None:
        self._positions = learned_positions(model)
        self._vocabulary = check_vocabulary_sizes(context.target.model, model, same_tokenizer=same_tokenizer)
        # The target may have padding tokens that the draft lacks; any other token in their place will do.
        self.last_token = vocabulary_size(model) - 1
        there = context.ids[0].device
        ids = torch.cat(context.ids).to(device_of(model)).clamp(max=self.last_token)
        padding = torch.tensor(context.padding, device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]
        media = torch.isin(torch.cat(context.ids), torch.tensor(media_tokens(context.target.model), device=there))
        real &= ~media.to(ids.device)
        if self._positions is None or ids.shape[1] <= self._positions:
            self.decoder = TreeDecoder.prefill(model, ids, None if bool(real.all()) else real.long())
        else:  # it has no room for a draft, ever
            self.decoder = TreeDecoder(model, None, len(ids))
        self._prompt_forwards = self.decoder.forwards
        self.held = [ids.shape[1] - 1] * len(ids)

    @property
    def forwards(self) -> int:
        """Of the draft, those of the prompt aside."""
        return self.decoder.forwards - self._prompt_forwards

    def room(self, context: Context) -> list[int]:
        """The rows' room as far as the draft has positions."""
        if self._positions is None:
            return context.room
        left = self._positions - max(ids.shape[1] for ids in context.ids)
        return [min(one, left) for one in context.room]

    def law(self, context: Context, row: int, suffixes: list[list[int]], logits: Tensor) -> Tensor:
        """Distributions after the row's tokens and suffixes, fp32 [suffixes, the target's vocabulary]."""
        missing = self._vocabulary - logits.shape[-1]
        if missing > 0:
            logits = F.pad(logits, (0, missing), value=-torch.inf)
        return context.distribution(row, suffixes, logits[..., : self._vocabulary])


class _Session(DraftSide):
    """With the places of the rows' tokens and tree nodes in the cache."""

    def __init__(self, model: PreTrainedModel, context: Context, same_tokenizer: bool) -> None:
        super().__init__(model, context, same_tokenizer)
        # Of what is pending in the draft: how many tokens were known when it was fed, and the places of tree nodes, in
        # the trees as they were grown: what a shape proposes in the end may be a part of them.
        self._known = [0] * len(context.ids)
        self._places: list[dict[int, int]] = [{} for _ in context.ids]
        self._grown = [Tree() for _ in context.ids]
        self._next = 0  # place of the token that is fed next

    def catch_up(self, context: Context) -> list[Tensor]:
        """Commit what the draft has seen of the accepted tokens and feed the others: what follows, [1, vocabulary]."""
        if context.paths:
            kept = []
            for row, path in enumerate(context.paths):
                places = self._fed(row, [context.trees[row].tokens[node] for node in path])
                kept.append([*range(self._known[row]), *places])
                self.held[row] += len(kept[-1])
            self.decoder.keep(kept)
        tokens = [
            ids[0, held:].clamp(max=self.last_token).tolist() if left >= 0 else []
            for ids, held, left in zip(context.ids, self.held, context.room)
        ]
        self._known = [len(new) for new in tokens]
        self._places = [{} for _ in tokens]
        self._next = max(self._known)
        logits = self.decoder.feed(tokens, [list(range(-1, len(new) - 1)) for new in tokens]).logits
        return [
            self._distribution(context, row, [[]], logits[row, known - 1 : known]) if known else logits[row, :0]
            for row, known in enumerate(self._known)
        ]

    def expand(self, context: Context, trees: list[Tree], nodes: list[list[int]]) -> list[Tensor]:
        """What follows some new nodes of each row's tree, [nodes, vocabulary]."""
        tokens = [[tree.tokens[node] for node in some] for tree, some in zip(trees, nodes)]
        parents = []
        for row, (tree, some) in enumerate(zip(trees, nodes)):
            places = self._places[row]
            above = [tree.parents[node] for node in some]
            parents.append([self._known[row] - 1 if parent == ROOT else places[parent] for parent in above])
            places.update({node: self._next + i for i, node in enumerate(some)})
        self._grown = list(trees)
        self._next += max(map(len, nodes))
        logits = self.decoder.feed(tokens, parents).logits
        return [
            self._distribution(context, row, suffixes(context, trees[row], some), logits[row, : len(some)])
            if some
            else logits[row, :0]
            for row, some in enumerate(nodes)
        ]

    def _fed(self, row: int, tokens: list[int]) -> list[int]:
        """The places of the first of a path's tokens, as far as they were fed."""
        places: list[int] = []
        node = ROOT
        for token in tokens:
            child = self._grown[row].child(node, token)
            if child is None or child not in self._places[row]:
                break
            node = child
            places.append(self._places[row][node])
        return places

    def _distribution(self, context: Context, row: int, suffixes: list[list[int]], logits: Tensor) -> Tensor:
        return self.law(context, row, suffixes, logits).to(context.ids[row].device)
