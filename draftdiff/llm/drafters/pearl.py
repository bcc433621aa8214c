"""Drafts made while the target verifies those before (PEARL, arXiv 2408.11850): a step takes the longer of the two.

Each step the draft writes gamma tokens while the target reads what was written before. After a rejection nothing was:
the target reads its own last token and so judges the first of the new ones alone (pre-verify); the others wait. As long
as all goes well it reads those that wait and judges them with the first of the next gamma (post-verify), so that a
draft grows without bound. What is judged is judged by the rules of `verify`, and nothing is emitted unjudged: the laws
are exact at any temperature, which the original's are not, nor are its last gamma - 1 tokens verified.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.hosts.transformers import device_of
from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context, Reads
from draftdiff.llm.drafters.model import DraftSide, check_draft
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import ROOT, Draws, Tree
from draftdiff.llm.verify import sample

_LEAST, _MOST = 2, 16  # of gamma "auto": with one token a step none ever waits, and no step gains more than a token


class PearlDrafter:
    """Chains from a smaller model of the target's tokenizer, drafted beside the target.

    model: on any device.  gamma: tokens drafted in a step; "auto" is how many draft forwards fit into one of the
    target, by the clock where that cannot change the text (greedy, fp32 or fp64) and by the bytes of weights elsewhere.
    executor: runs the draft; None is a thread of its own where the two models are on different devices or both on CUDA,
    where the draft has a stream of its own, and no thread elsewhere. Tokens are the same either way.  same_tokenizer:
    as for a ModelDrafter.
    """

    reads = Reads()
    whole = True

    def __init__(
        self,
        model: PreTrainedModel,
        gamma: int | str = "auto",
        *,
        executor: Executor | None = None,
        same_tokenizer: bool = False,
    ) -> None:
        known = gamma == "auto" if isinstance(gamma, str) else gamma >= 1
        require(known, f"gamma must be a number from 1 on or 'auto', got {gamma!r}")
        self.model, self.gamma, self.executor = model, gamma, executor
        self.same_tokenizer = same_tokenizer
        self.last_report: Report | None = None
        self._session: _Session | None = None
        self._own: Executor | None = None

    @property
    def forwards(self) -> int:
        """Draft forwards of this generation."""
        return self._session.forwards if self._session else 0

    def cost(self, target: PreTrainedModel) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward."""
        return bytes_per_forward(self.model) / bytes_per_forward(target)

    def begin(self, context: Context) -> None:
        """Prefill the draft. Raises ValueError for another vocabulary than the target's or an encoder-decoder model."""
        check_draft(self.model)
        there, here = context.ids[0].device, device_of(self.model)
        beside = self.executor is None and (there != here or here.type == "cuda")
        self._own = ThreadPoolExecutor(1, "draftdiff-pearl") if beside else None
        guess = 1 / max(self.cost(context.target.model), 1e-9)
        executor = self.executor or self._own
        self._session = _Session(self.model, context, self.same_tokenizer, self.gamma, guess, executor)

    def propose(self, context: Context) -> list[Tree]:
        """What waits to be verified, as a chain for each row."""
        assert self._session is not None, "propose before begin"
        return self._session.settle(context)

    def beside(self, context: Context) -> Callable[[], None]:
        """Begin to draft what follows what waits."""
        assert self._session is not None, "beside before begin"
        return self._session.start(context)

    def end(self) -> None:
        """Wait for the draft, and let its cache go."""
        if self._session is not None:
            self._session.wait()
        if self._own is not None:
            self._own.shutdown()
        self._session = self._own = None


class _Session(DraftSide):
    """The draft's side of one generation.

    chains: of each row, the drafted tokens after its text, of which `waiting` were there when the step began.  laws:
    the distributions they were drawn from, if they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: Context,
        same_tokenizer: bool,
        gamma: int | str,
        guess: float,
        executor: Executor | None,
    ) -> None:
        super().__init__(model, context, same_tokenizer)
        rows = len(context.ids)
        self._executor, self._running = executor, None
        exact = context.target.model.dtype in (torch.float32, torch.float64)
        self._clock = gamma == "auto" and exact and not context.sampling
        self._gamma = gamma if isinstance(gamma, int) else min(max(math.ceil(guess), _LEAST), _MOST)
        self._draft_seconds: deque[float] = deque(maxlen=9)  # of forwards; those of the target below
        self._target_seconds: deque[float] = deque(maxlen=9)
        self._there = context.ids[0].device
        self._length = [ids.shape[1] for ids in context.ids]
        self._chains: list[list[int]] = [[] for _ in range(rows)]
        self._laws: list[list[Tensor]] = [[] for _ in range(rows)]
        self._waiting = [0] * rows
        self._trees: list[Tree] = []
        # Places of a row's tokens after those held, in the decoder, and of the token that is fed next.
        self._places: list[list[int]] = [[] for _ in range(rows)]
        self._next = 0
        device = device_of(model)
        self._stream = torch.cuda.Stream(device) if executor is not None and device.type == "cuda" else None

    _running: Future[None] | None

    def settle(self, context: Context) -> list[Tree]:
        """Drop what was not accepted; the trees of what waits."""
        kept = [self._accepted(row, ids) for row, ids in enumerate(context.ids)]
        if self._next and not all(whole for whole, most in zip(kept, context.room) if most >= 0):
            # Of the text's last token the cache holds a rejected one in its place, if any.
            paths = [
                places[: max(ids.shape[1] - 1 - held, 0)]
                for places, ids, held in zip(self._places, context.ids, self.held)
            ]
            self.decoder.keep(paths)
            self.held = [held + len(path) for held, path in zip(self.held, paths)]
            self._places, self._next = [[] for _ in paths], 0
        self._trees = [Tree() for _ in context.ids]
        for row, tree in enumerate(self._trees):
            self._waiting[row] = len(self._chains[row])
            for place in range(min(self._waiting[row], context.room[row])):
                self._add(row, tree, place)
        return self._trees

    def _accepted(self, row: int, ids: Tensor) -> bool:
        """Take the row's new text off its chain; whether all of it was drafted."""
        new, chain = ids[0, self._length[row] :].tolist(), self._chains[row]
        whole = chain[: len(new)] == new
        cut = len(new) if whole else len(chain)
        del chain[:cut], self._laws[row][:cut]
        self._length[row] = ids.shape[1]
        return whole

    def _add(self, row: int, tree: Tree, place: int) -> None:
        token = self._chains[row][place]
        if self._laws[row]:
            law = self._laws[row][place].to(self._there)
            tree.draws[place - 1] = Draws(law, [token], "with_replacement", "rrs")
        tree.add(place - 1 if place else ROOT, token)

    def start(self, context: Context) -> Callable[[], None]:
        """Begin to draft; a function that waits for it and adds to each tree the first token that was drafted."""
        room = self.room(context)
        counts = [min(self._gamma, most - waits) for most, waits in zip(room, self._waiting)]
        if max(counts) > 0:
            self._run(lambda: self._draft(context, counts))
        began = time.perf_counter()
        return lambda: self._join(context, began)

    def _run(self, work: Callable[[], None]) -> None:
        if self._executor is None:
            work()
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._running = self._executor.submit(work)

    def wait(self) -> None:
        """For the draft."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
            if self._stream is not None:
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    @torch.no_grad()
    def _draft(self, context: Context, counts: list[int]) -> None:
        """So many tokens more for each row, one forward each."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for step in range(max(counts)):
                began = time.perf_counter()
                rows = [row for row, count in enumerate(counts) if step < count]
                logits = self._feed(context, rows)
                for row in rows:
                    law = self.law(context, row, [self._chains[row]], logits[row])[0]
                    tokens = sample(law, 1, "with_replacement") if context.sampling else [int(law.argmax())]
                    if not tokens:  # all that the draft knows is forbidden
                        counts[row] = 0
                        continue
                    self._chains[row] += tokens
                    if context.sampling:
                        self._laws[row].append(law)
                if step:  # the first one may feed several tokens
                    self._draft_seconds.append(time.perf_counter() - began)

    def _feed(self, context: Context, rows: list[int]) -> list[Tensor]:
        """The logits [1, vocabulary] after these rows' text and chain."""
        tokens: list[list[int]] = [[] for _ in context.ids]
        parents: list[list[int]] = [[] for _ in context.ids]
        for row in rows:
            places = self._places[row]
            text = context.ids[row][0, self.held[row] :].tolist() + self._chains[row]
            tokens[row] = [min(token, self.last_token) for token in text[len(places) :]]
            places += range(self._next, self._next + len(tokens[row]))
            parents[row] = [ROOT, *places][-len(tokens[row]) - 1 : -1]
        self._next += max(map(len, tokens))
        logits = self.decoder.feed(tokens, parents).logits
        return [logits[row, len(new) - 1 : len(new)] if new else logits[row, :0] for row, new in enumerate(tokens)]

    def _join(self, context: Context, began: float) -> None:
        if self._clock:
            if self._there.type == "cuda":
                torch.cuda.current_stream(self._there).synchronize()
            self._target_seconds.append(time.perf_counter() - began)
        self.wait()
        for row, tree in enumerate(self._trees):
            waits = self._waiting[row]
            if waits == len(tree.tokens) and len(self._chains[row]) > waits:
                self._add(row, tree, waits)
        if self._clock and self._draft_seconds:
            ratio = median(self._target_seconds) / median(self._draft_seconds)
            self._gamma = min(max(math.ceil(ratio), _LEAST), _MOST)
