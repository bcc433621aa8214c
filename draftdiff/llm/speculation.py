"""Speculative decoding for any drafter: `model.generate(ids, custom_generate=speculative, drafter=...)`.

Each round a drafter proposes a tree, the target sees all of it in one forward, and tokens are taken from the root down
as long as they follow a branch. The output is the target's own: token by token at temperature 0, in law when sampling.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from draftdiff.errors import UserError
from draftdiff.hosts.transformers import device_of, generate_output, given_to_generate, padding_token
from draftdiff.hosts.transformers_quirks import (
    learned_positions,
)
from draftdiff.llm.call_checks import check_call
from draftdiff.llm.checks import require
from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context, Drafter
from draftdiff.llm.pace import Pace, Pacer
from draftdiff.llm.processors import for_drafts, usable
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import ROOT, Tree
from draftdiff.llm.verify import draw, reject

_STEP = 256  # tokens that the text grows by at least


def speculative(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Drafter | None = None,
    pace: Pace | None = Pace(),  # noqa: B008  # it is frozen
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode with drafts; called by `generate`, which takes `drafter=` and all of its own arguments as usual.

    Drafts are as deep as pays, up to what the drafter proposes, and rounds go without where they do not pay: `pace`
    says by what that is judged; None leaves all to the drafter. A drafter may serve several threads.

    Logits processors, stopping criteria, streamers, left-padded batches, caches that hold part of the prompt, and
    pictures, videos and sounds in it, of which drafts see the text alone, work as without drafts. The host's own
    processors see drafted tokens too; others once each token, in order, so that those of one row may keep state. Rows
    of a batch are padded once they end, and its cache, which has gaps, is not returned. In half precision the two best
    tokens may round to the same number, and then the text may differ from plain decoding's, as it may between two batch
    sizes. generate does not hand its tokenizer on, nor does it find it then: instead of `stop_strings` and `tokenizer`
    give `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`. Raises ValueError in one line for what cannot be:
    beams, encoder-decoder models, caches that cannot be rolled back, attention or hidden-state outputs, position_ids of
    one's own, a prompt without the tokens that the cache holds. `draftdiff.llm.report(drafter)` tells what it did.
    """
    if drafter is None or isinstance(drafter, type) or not hasattr(drafter, "propose"):
        got = drafter.__name__ if isinstance(drafter, type) else type(drafter).__name__
        raise UserError(f"speculative needs drafter=..., for example ModelDrafter(draft_model), got {got}")
    media = check_call(model, input_ids, generation_config, model_kwargs)
    streamer = given_to_generate(model, "streamer")
    rows = len(input_ids)
    require(streamer is None or rows == 1, f"speculative streams one row only, got a streamer and a batch of {rows}")
    processors = usable(logits_processor, rows)
    ids = input_ids.to(device_of(model))  # generate takes them from the CPU too
    with torch.no_grad(), _claimed(drafter) as own:
        generation = _Generation(model, ids, processors, stopping_criteria, generation_config, own, streamer, pace)
        result = generation.run(model_kwargs, media)
    drafter.last_report = generation.report
    if isinstance(result, Tensor):
        return result.to(input_ids.device)
    result.sequences = result.sequences.to(input_ids.device)  # type: ignore[union-attr]
    return result


@contextmanager
def _claimed(drafter: Drafter) -> Iterator[Drafter]:
    """The drafter, or a copy of it while another generation uses it."""
    claim = object()
    if vars(drafter).setdefault("_claim", claim) is not claim:
        yield copy.copy(drafter)
        return
    try:
        yield drafter
    finally:
        del vars(drafter)["_claim"]


class _Generation:
    """One call of generate."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        processors: list[LogitsProcessorList],
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        drafter: Drafter,
        streamer: Any,
        pace: Pace | None,
    ) -> None:
        self.model, self.processors, self.config = model, processors, config
        self.drafter, self.streamer = drafter, streamer
        self.pace = pace
        self.sampling = bool(config.do_sample)
        self.limit = criteria.max_length or config.max_length
        # The two that nearly every generation has need no tensors.
        self.ends = {int(end) for one in criteria if type(one) is EosTokenCriteria for end in one.eos_token_id}
        plain = (EosTokenCriteria, MaxLengthCriteria)
        self.criteria = StoppingCriteriaList([one for one in criteria if type(one) not in plain])
        self.buffer = ids.clone()
        self.lengths = [ids.shape[1]] * len(ids)
        self.done = [ids.shape[1] >= self.limit] * len(ids)
        self.padding = [0] * len(ids)
        self.positions = learned_positions(model)
        self.scores: tuple[Tensor, ...] = ()
        self.logits: tuple[Tensor, ...] = ()
        self.report = Report()

    def run(self, kwargs: dict[str, Any], media: dict[str, Any]) -> Tensor | GenerateDecoderOnlyOutput:
        start = time.perf_counter()
        report, drafter = self.report, self.drafter
        prompt, mask = self.buffer, kwargs.get("attention_mask")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        mask = None if mask is None else mask.to(prompt.device)
        reads = drafter.reads
        positions = kwargs.get("position_ids")
        # Models of several media count in several ways, which are one in text; the last one is that of their keys.
        several = positions if media and positions is not None and positions.ndim == 3 else None
        flat = positions if several is None else several[-1]
        last = flat[:, -1].expand(len(prompt)) if flat is not None and flat.ndim == 2 else None
        by_token = {n: x for n, x in media.items() if isinstance(x, Tensor) and x.shape == prompt.shape}
        chunk = self.config.prefill_chunk_size
        target = TreeDecoder.prefill(
            self.model,
            prompt,
            mask,
            cache,
            last_position=last,
            chunk=chunk,
            layers=reads.layers,
            whole=reads.prompt,
            inputs=by_token,
            media={name: x for name, x in media.items() if name not in by_token},
            positions=several,
        )
        if mask is not None:  # of a row of padding tokens alone the last one counts
            self.padding = (mask == 0).sum(-1).clamp(max=prompt.shape[1] - 1).tolist()
        processors = [for_drafts(of_row) for of_row in self.processors]
        context = Context(target, self.padding, processors, self.sampling, self._ids(), self._room())
        report.cost = drafter.cost(self.model)
        pacer = None if self.pace is None else self._pacer(self.pace)
        drafter.begin(context)
        try:
            report.prompt_seconds = time.perf_counter() - start
            prompt_forwards = target.forwards
            while not all(self.done):
                context = self._round(context) if pacer is None else self._paced(context, pacer)
            report.target_forwards, report.replays = target.forwards - prompt_forwards, target.replays
            report.draft_forwards = drafter.forwards
            if pacer is not None:
                pacer.tell(report)
            report.seconds = time.perf_counter() - start
        finally:
            drafter.end()
        if self.streamer is not None:
            self.streamer.end()
        return self._result(target.cache)

    def _ids(self) -> list[Tensor]:
        return [self.buffer[row : row + 1, :length] for row, length in enumerate(self.lengths)]

    def _room(self) -> list[int]:
        """Most drafts that may be accepted: the text and a table of positions must not be outrun. -1 when done."""
        room = [self.limit - length - 1 for length in self.lengths]
        if self.positions is not None:
            left = [self.positions - (length - padding) for length, padding in zip(self.lengths, self.padding)]
            room = [max(min(pair), 0) for pair in zip(room, left)]
        return [-1 if done else most for done, most in zip(self.done, room)]

    def _pacer(self, pace: Pace) -> Pacer:
        """The clock is not asked where other lengths would draw other random numbers, or round otherwise."""
        drafter = self.drafter
        chance = self.sampling and getattr(drafter, "samples", True)
        exact = self.model.dtype in (torch.float32, torch.float64)
        clock = pace.cost == "clock" or (pace.cost == "auto" and exact and not chance)
        known = pace.cost if isinstance(pace.cost, float | int) else None if clock else self.report.cost
        earlier = getattr(drafter, "last_report", None)
        return Pacer(known, self.report.cost, whole=getattr(drafter, "whole", False), earlier=earlier)

    def _paced(self, context: Context, pacer: Pacer) -> Context:
        """A round whose drafts are as deep as pays."""
        start, before, depth = time.perf_counter(), self.report.tokens, pacer.depth()
        room = [int(min(most, depth)) for most in context.room]
        states = context.target.states
        after = self._round(replace(context, room=room))
        if self.drafter.reads.layers and max(room) < 1:  # states that were not looked at wait for the next drafts
            pairs = zip(states, context.target.states)
            context.target.states = [torch.cat(pair) if len(pair[0]) else pair[1] for pair in pairs]
        live = [row for row, most in enumerate(room) if most >= 0]
        accepted = [len(after.paths[row]) for row in live]
        seconds = time.perf_counter() - start
        pacer.saw([room[row] for row in live], accepted, self.report.tokens - before, seconds)
        return after

    def _round(self, context: Context) -> Context:
        start = time.perf_counter()
        trees = self.drafter.propose(context)
        sizes = [len(tree.tokens) for tree in trees]
        drafted = time.perf_counter()
        # Node n of a tree is pending token n + 1: the last accepted token is fed with it.
        live = [row for row, done in enumerate(self.done) if not done]
        last = {row: int(context.ids[row][0, -1]) for row in live}
        tokens = [[last[row], *tree.tokens] if row in last else [] for row, tree in enumerate(trees)]
        parents = [[ROOT, *(p + 1 for p in tree.parents)] if row in last else [] for row, tree in enumerate(trees)]
        beside = getattr(self.drafter, "beside", None)
        join = beside(context) if beside else None
        output = context.target.feed(tokens, parents)
        if join:
            join()
        seen = time.perf_counter()
        paths = [
            self._follow(row, trees[row], output.logits[row], sizes[row]) if row in last else None
            for row in range(len(trees))
        ]
        # A node that was drafted meanwhile is accepted as the last one at most, and has not been fed.
        fed = [
            [] if path is None else [0, *(node + 1 for node in path if node < size)] for path, size in zip(paths, sizes)
        ]
        context.target.keep(fed)
        logits = [output.logits[row, kept] for row, kept in enumerate(fed)] if self.drafter.reads.logits else None
        for row in live:
            self.report.rounds += 1
            self.report.drafted += len(trees[row].tokens)
        self.report.draft_seconds += drafted - start
        self.report.target_seconds += seen - drafted
        taken = [path or [] for path in paths]
        return context.next_round(self._ids(), self._room(), trees, taken, logits)

    def _follow(self, row: int, tree: Tree, logits: Tensor, size: int) -> list[int]:
        """Take tokens of one row from the root down until none was proposed or all is done; the accepted nodes.

        size: nodes of the tree that the target was fed. What follows another one is not known yet.
        """
        # Where nothing changes the logits: one transfer from a device, or just the nodes that are visited.
        plain = not (self.sampling or self.processors[row] or self.config.output_scores or self.config.output_logits)
        best = logits.argmax(-1).tolist() if plain and not logits.is_cpu else None
        node: int | None = ROOT
        path: list[int] = []
        while node is not None:
            if plain:
                token = best[node + 1] if best else int(logits[node + 1].argmax())
            else:
                token = self._choose(row, tree, node, logits[node + 1 : node + 2])
            length = self.lengths[row]
            if length == self.buffer.shape[1]:
                # In steps, because max_new_tokens may be a mere upper limit.
                room = min(max(length, _STEP), self.limit - length)
                self.buffer = torch.nn.functional.pad(self.buffer, (0, room))
            self.buffer[row, length] = token
            self.lengths[row] = length + 1
            self.report.tokens += 1
            if self.streamer is not None:
                self.streamer.put(self.buffer[row, length : length + 1].cpu())
            node = tree.child(node, token)
            if self._is_done(row, token):
                self.done[row] = True
                break
            if node is not None:
                path.append(node)
                if node >= size:
                    break
        if node is None:
            self.report.count(max(tree.depths(), default=0), len(path))
        elif self.done[row]:  # the last token of all was drafted too, but is on no path: nothing was to follow it
            self.report.count(len(path) + 1, len(path) + 1)
        else:
            self.report.count(len(path), len(path))
        return path

    def _is_done(self, row: int, token: int) -> bool:
        """Whether the row ends with this token, its last."""
        length = self.lengths[row]
        if length >= self.limit or token in self.ends:
            return True
        return bool(self.criteria and self.criteria(self.buffer[row : row + 1, :length], self.scores or None))

    def _choose(self, row: int, tree: Tree, node: int, logits: Tensor) -> int:
        scores = logits.to(torch.float32, copy=True)
        processed = self.processors[row](self.buffer[row : row + 1, : self.lengths[row]], scores.clone())
        if self.config.return_dict_in_generate:
            if self.config.output_scores:
                self.scores += (processed,)
            if self.config.output_logits:
                self.logits += (scores,)
        if not self.sampling:
            return int(processed[0].argmax())
        p = processed[0].softmax(-1)
        draws = tree.draws.get(node)
        if draws is None:
            return draw(p)
        return reject(p, draws.q, draws.tokens, draws.sampler, draws.verifier)

    def _result(self, cache: Any) -> Tensor | GenerateDecoderOnlyOutput:
        longest = max(self.lengths)
        sequences = self.buffer[:, :longest].contiguous()
        for row, length in enumerate(self.lengths):
            if length < longest:
                sequences[row, length:] = padding_token(self.config)  # type: ignore[assignment]
        if not self.config.return_dict_in_generate:
            return sequences
        kept = cache if len(self.lengths) == 1 else None
        return generate_output(sequences, kept, scores=self.scores or None, logits=self.logits or None)
