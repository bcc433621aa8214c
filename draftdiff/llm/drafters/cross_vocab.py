"""One draft for targets of other tokenizers (OmniDraft, arXiv 2507.02659).

The text is kept in the draft's tokens too. What it drafts is merged into the target's tokens by an n-gram cache that
learns as text comes by, and verified as any draft: by `match`, or by `reject` with the law of what merging can give.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.hosts.transformers import device_of
from draftdiff.hosts.transformers_quirks import learned_positions
from draftdiff.llm.checks import require, vocabulary_size
from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context, Reads
from draftdiff.llm.drafters.length_head import AcceptanceHead, chance, first_over
from draftdiff.llm.drafters.merged_law import Request, sampled_path
from draftdiff.llm.drafters.merging import NGramCache
from draftdiff.llm.drafters.model import check_draft
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.reporting import Report
from draftdiff.llm.retokenize import Aligned, GrowingText, Vocabularies
from draftdiff.llm.train.cross_vocab import CrossVocabDistiller, Example
from draftdiff.llm.train.data import left_padded
from draftdiff.llm.tree import ROOT, Tree

VERIFIERS = ("match", "reject")
_UNSETTLED = 4  # last tokens of a text, which the next ones may change, are not committed


class CrossVocabDrafter:
    """Chains from a model of any tokenizer.

    model: on any device.  draft_tokenizer, target_tokenizer: fast ones.  cache: of n-grams, a new one if None; it stays
    for later generations, which may share it.  length: most draft tokens of a round.  verifier: "match" drafts what is
    likeliest; "reject" draws when the target does, with several draft forwards for each token, and accepts more where
    the two agree.  head: stops where the risk that anything is rejected exceeds `threshold`.  online: trains the draft,
    and the head, on what the target writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft_tokenizer: Any,
        target_tokenizer: Any,
        *,
        cache: NGramCache | None = None,
        length: int = 5,
        verifier: str = "match",
        head: AcceptanceHead | None = None,
        threshold: float = 0.7,
        online: CrossVocabDistiller | None = None,
    ) -> None:
        require(length >= 1, f"length must be at least 1, got {length}")
        require(verifier in VERIFIERS, f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
        require(0 < threshold < 1, f"threshold must be in (0, 1), got {threshold}")
        require(online is None or online.draft is model, "online must train the model that drafts, got another one")
        self.model, self.vocabularies = model, Vocabularies(draft_tokenizer, target_tokenizer)
        self.cache = NGramCache() if cache is None else cache
        self.length, self.verifier, self.head, self.threshold = length, verifier, head, threshold
        self.online = online
        self.reads = Reads(logits=online is not None)
        self.samples = verifier == "reject"
        self.last_report: Report | None = None
        self._session: _Session | None = None

    @property
    def forwards(self) -> int:
        """Draft forwards of this generation."""
        return self._session.forwards if self._session else 0

    def cost(self, target: PreTrainedModel) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward."""
        return bytes_per_forward(self.model) / bytes_per_forward(target)

    def begin(self, context: Context) -> None:
        """Begin to read the texts. Raises ValueError for an encoder-decoder model, or one whose vocabulary, like the
        target's, is smaller than its tokenizer's."""
        check_draft(self.model)
        known = self.vocabularies
        for what, model, tokens in (("draft", self.model, known.draft), ("target", context.target.model, known.target)):
            size, fits = vocabulary_size(model), len(tokens) <= vocabulary_size(model)
            require(fits, f"the {what}'s tokenizer has {len(tokens)} tokens, its model {size}: another model's?")
        self._session = _Session(self, context)

    def propose(self, context: Context) -> list[Tree]:
        """One chain for each row."""
        assert self._session is not None, "propose before begin"
        return self._session.propose(context)

    def end(self) -> None:
        """Let the draft's cache go; that of n-grams stays."""
        self._session = None


class _Session:
    """One generation: each row's text in the draft's tokens, and what of it is in the draft's cache."""

    def __init__(self, drafter: CrossVocabDrafter, context: Context) -> None:
        self.drafter = drafter
        rows = len(context.ids)
        self._texts = [GrowingText(drafter.vocabularies) for _ in range(rows)]
        self._seen = [0] * rows  # tokens of the target that the texts have
        self._positions = learned_positions(drafter.model)
        self._decoder: TreeDecoder | None = None
        self.forwards = 0
        # Of each row in the draft's cache: what is committed, and what is pending with its places.
        self._committed: list[list[int]] = [[] for _ in range(rows)]
        self._fed: list[list[int]] = [[] for _ in range(rows)]
        self._places: list[list[int]] = [[] for _ in range(rows)]
        self._next = 0
        # Of the round before, for training: the states and chances of drafted tokens, and the target's token of each.
        self._drafted: list[list[tuple[Tensor, float]]] = [[] for _ in range(rows)]
        self._proposed: list[list[tuple[int, int, int]]] = [[] for _ in range(rows)]

    def propose(self, context: Context) -> list[Tree]:
        """One chain for each row."""
        trees = [Tree() for _ in context.ids]
        if max(context.room) <= 0 and self.drafter.online is None:
            return trees
        texts = [self._read(context, row) for row in range(len(trees))]
        texts = [text if most > 0 else None for text, most in zip(texts, context.room)]
        if not any(texts):
            return trees
        logits = self._catch_up(texts)
        if context.sampling and self.drafter.verifier == "reject":
            self._draw(context, texts, trees, logits)
        else:
            self._extend(context, texts, trees, logits)
        return trees

    def _read(self, context: Context, row: int) -> list[int] | None:
        """Bring the row's text up to date and learn from it; its draft tokens, None if it cannot be drafted for."""
        tokens = context.ids[row][0, context.padding[row] :].tolist()
        before, self._seen[row] = self._seen[row], len(tokens)
        if len(tokens) == before:
            return None  # a row that is done
        ids, aligned = self._texts[row].update(tokens)
        for one in aligned:
            if ids is not None and one.stop - one.start > 1:
                self.drafter.cache.learn(one.token, ids[one.start : one.stop])
        if self.drafter.online is not None and ids is not None and context.logits is not None:
            self._train(self.drafter.online, context, row, ids, aligned, before)
        if ids is not None and self._positions is not None and len(ids) + self.drafter.length > self._positions:
            return None
        return ids

    def _train(
        self,
        online: CrossVocabDistiller,
        context: Context,
        row: int,
        ids: list[int],
        aligned: list[Aligned],
        before: int,
    ) -> None:
        assert context.logits is not None
        logits = context.logits[row]
        example = Example.of(ids, aligned, {before + i: one for i, one in enumerate(logits)}, online.window)
        for place, (token, start, stop) in enumerate(self._proposed[row][: len(logits)]):
            drafted = self._drafted[row][start:stop]
            p = logits[place].float().softmax(-1)
            accepted = float(p[token]) if context.sampling else float(int(p.argmax()) == token)
            q = float(torch.tensor([one for _, one in drafted]).prod())
            example.judged += [(state, min(1.0, accepted / q)) for state, _ in drafted if q > 0]
        online.add(example, self.drafter.vocabularies)

    def _catch_up(self, texts: list[list[int] | None]) -> list[Tensor]:
        """Commit what of the drafts was right and feed the rest of the texts; the logits after them, [1,
        vocabulary]."""
        fits = [text is None or text[: len(done)] == done for text, done in zip(texts, self._committed)]
        if self._decoder is None or not all(fits):
            self._begin(texts)
        elif self._next:
            paths: list[list[int]] = []
            for row, text in enumerate(texts):
                done = self._committed[row]
                settled = 0 if text is None else max(len(text) - _UNSETTLED - len(done), 0)
                right = 0
                for fed, token in zip(self._fed[row][:settled], (text or [])[len(done) :]):
                    if fed != token:
                        break
                    right += 1
                paths.append(self._places[row][:right])
                done += self._fed[row][:right]
            assert self._decoder is not None
            self._decoder.keep(paths)
        self._fed, self._places = [[] for _ in texts], [[] for _ in texts]
        self._next = 0
        return self.feed([[] if text is None else text[len(done) :] for text, done in zip(texts, self._committed)])

    def _begin(self, texts: list[list[int] | None]) -> None:
        """Read the texts from the start, as there are none in the cache or their committed tokens have changed."""
        self._committed = [[] if text is None else text[: max(len(text) - _UNSETTLED, 0)] for text in texts]
        rows = [torch.tensor([*done, 0]) for done in self._committed]  # the last one is not read
        ids, mask = left_padded(rows, 0)
        device = device_of(self.drafter.model)
        layers = (-1,) if self.drafter.head is not None else ()
        forwards = self.forwards
        self._decoder = TreeDecoder.prefill(
            self.drafter.model, ids.to(device), None if bool(mask.all()) else mask.to(device), layers=layers
        )
        self._offset = self._decoder.forwards - forwards
        self._states: list[Tensor] = []

    def feed(self, tokens: list[list[int]], parents: list[list[int]] | None = None) -> list[Tensor]:
        """The logits [1, vocabulary] after new tokens of each row, a chain, or [tokens, vocabulary] with places given
        as their parents."""
        assert self._decoder is not None
        above = []
        for row, new in enumerate(tokens):
            places = list(range(self._next, self._next + len(new)))
            if parents is None:
                last = self._places[row][-1] if self._places[row] else ROOT
                above.append([last, *places][: len(new)])
                self._fed[row] += new
                self._places[row] += places
            else:
                above.append(parents[row])
        self._next += max(map(len, tokens))
        output = self._decoder.feed(tokens, above)
        self.forwards = self._decoder.forwards - self._offset
        if self.drafter.head is not None:
            self._states = [output.hidden_states[-1][row, len(new) - 1] for row, new in enumerate(tokens)]
        if parents is None:
            return [output.logits[row, max(len(new) - 1, 0) : len(new)] for row, new in enumerate(tokens)]
        return [output.logits[row, : len(new)] for row, new in enumerate(tokens)]

    def _extend(self, context: Context, texts: list[list[int] | None], trees: list[Tree], logits: list[Tensor]) -> None:
        """The likeliest chains, as the target's tokens."""
        known, cache = self.drafter.vocabularies, self.drafter.cache
        chains: list[list[int]] = [[] for _ in texts]
        chances: list[list[float]] = [[] for _ in texts]
        self._drafted = [[] for _ in texts]
        live = [row for row, text in enumerate(texts) if text]
        for step in range(self.drafter.length):
            going = []
            for row in live:
                chain = chains[row]
                token = int(logits[row][0, : len(known.direct)].argmax())
                chain.append(token)
                if self.drafter.head is not None:
                    state = self._states[row]
                    chances[row].append(chance(self.drafter.head, state))
                    if self.drafter.online is not None:
                        q = float(logits[row][0].softmax(-1, dtype=torch.float32)[token])
                        self._drafted[row].append((state, q))
                settled = cache.settled(chain, known.direct)
                lost = any(one.token is None for one in settled)
                ended = token in known.special.values()
                risky = first_over(chances[row], self.drafter.threshold) is not None
                if not (lost or ended or risky or len(settled) >= context.room[row]):
                    going.append(row)
            live = going
            if not live or step + 1 == self.drafter.length:
                break
            logits = self.feed([[chains[row][-1]] if row in live else [] for row in range(len(texts))])
        for row, chain in enumerate(chains):
            self._proposed[row] = []
            for one in cache.merge(chain, known.direct)[: max(context.room[row], 0)]:
                if one.token is None:
                    break
                trees[row].add(len(trees[row].tokens) - 1 if trees[row].tokens else ROOT, one.token)
                self._proposed[row].append((one.token, one.start, one.stop))

    def _draw(self, context: Context, texts: list[list[int] | None], trees: list[Tree], logits: list[Tensor]) -> None:
        """Chains drawn from the law of merged tokens."""
        drawn = {
            row: sampled_path(
                trees[row],
                logits[row][0],
                self._places[row][-1],
                lambda: self._next,
                self.drafter.cache,
                self.drafter.vocabularies.direct,
                length=min(self.drafter.length, context.room[row]),
                size=vocabulary_size(context.target.model),
                device=context.ids[row].device,
            )
            for row, text in enumerate(texts)
            if text
        }
        asked = {row: request for row, path in drawn.items() if (request := next(path, None)) is not None}
        while asked:
            requests = [asked.get(row, ([], [])) for row in range(len(texts))]
            found = self.feed([tokens for tokens, _ in requests], [parents for _, parents in requests])
            asked = {row: request for row in asked if (request := _go_on(drawn[row], found[row])) is not None}


def _go_on(path: Generator[Request, Tensor, None], logits: Tensor) -> Request | None:
    """What a path asks for next, None at its end."""
    try:
        return path.send(logits)
    except StopIteration:
        return None
