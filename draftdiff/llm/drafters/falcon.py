"""Drafts from a Falcon layer (arXiv 2412.12639), k tokens a pass, in a tree of passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context, Reads
from draftdiff.llm.drafters.follower import Follower
from draftdiff.llm.drafters.one_layer import LayerDrafter
from draftdiff.llm.heads import files
from draftdiff.llm.heads.falcon import FalconHead, State
from draftdiff.llm.reporting import Report
from draftdiff.llm.static_tree import StaticTree
from draftdiff.llm.tree import ROOT, Tree


class FalconDrafter(LayerDrafter):
    """Proposes the same tree in each round: a pass guesses k tokens after a path, of which none reads the others, and
    the node at each depth is the guess of its rank there. Verified by `match`. A row of which fewer than k states are
    known gets no drafts.

    head: `FalconHead` on the target's device; it reads the states of the whole prompt.  tree: nodes whose depth is a
    multiple of k and that have children cost a part of a pass each. `StaticTree` says what a list of nodes lacks.
    """

    reads = Reads((-1,), prompt=True)
    samples = False

    def __init__(self, head: FalconHead, tree: StaticTree | None = None, passes: int = 4) -> None:
        """passes: of the default tree, 4 nodes wide and k * passes deep.  Raises ValueError for more children of a node
        than the vocabulary has tokens."""
        require(passes >= 1, f"passes must be at least 1, got {passes}")
        size = head.config.vocab_size
        self.head = head
        self.tree = tree or StaticTree.from_widths((min(4, size), *[1] * (head.settings.k * passes - 1)))
        require(self.tree.width <= size, f"the tree has {self.tree.width} children of a node, the vocabulary {size}")
        self.forwards = 0
        self.last_report: Report | None = None
        self._follower: _Follower | None = None
        self._plan: list[_Pass] = []

    @classmethod
    def from_target(
        cls,
        model: PreTrainedModel,
        k: int = 2,
        passes: int = 4,
        tree: StaticTree | None = None,
        recurrent: bool = False,
    ) -> FalconDrafter:
        """A new layer to train, fp32. k: tokens of a pass.  recurrent: as in `FalconConfig`."""
        return cls(FalconHead.from_target(model, k, recurrent), tree, passes)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: PreTrainedModel,
        tree: StaticTree | None = None,
        recurrent: bool = False,
    ) -> FalconDrafter:
        """The layer of a folder of `save_pretrained` or of the original's, in the target's dtype.

        tree: in place of the one that was saved.  recurrent: how the LSTM of an original is run.
        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        return cls(FalconHead.from_pretrained(folder, model, recurrent), tree or files.saved_tree(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write layer and tree to a new folder, as config.json and model.safetensors. Raises FileExistsError."""
        files.save(self.head, folder, "falcon", self.tree.paths)

    def _trainer(self) -> type[Trainer]:
        from draftdiff.llm.train.falcon import FalconTrainer

        return FalconTrainer

    def begin(self, context: Context) -> None:
        """Raises ValueError for a target of another size or on another device than the layer is for."""
        self.check_target(context)
        self._follower, self.forwards = _Follower(self.head, len(context.ids)), 0
        self._plan = _plan(self.tree, self.head.settings.k, self.head.device)

    def end(self) -> None:
        """Let the layer's cache go."""
        self._follower = None

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        assert self._follower is not None, "propose before begin"
        trees = [Tree() for _ in context.ids]
        depth = min(max(context.room), self.tree.depth)
        output = self._follower.catch_up(context) if depth >= 1 else None  # else it is the last round
        if output is None:
            return trees
        tokens = self._draft(self._follower, output, depth).tolist()
        self.forwards = self._follower.forwards
        for row, (left, known) in enumerate(zip(context.room, self._follower.known)):
            if left > 0 and known >= self.head.settings.k:
                count = self.tree.levels[min(left, depth) - 1].stop
                trees[row] = Tree(tokens[row][:count], self.tree.parents[:count])
        return trees

    def _draft(self, follower: _Follower, output: Any, depth: int) -> Tensor:
        """Tokens int64 [rows, nodes] of the passes that reach a depth."""
        k, rows = self.head.settings.k, len(follower.known)
        pending = output.logits.shape[1]
        places = [[known - 1] for known in follower.known]  # of the last row of each block that is gone on from
        index = [[max(known - k + i, 0) for i in range(k)] for known in follower.known]
        where = torch.tensor(index, device=output.logits.device)[..., None]
        states, logits = (
            x.gather(1, where.expand(-1, -1, x.shape[-1]))[:, None] for x in (output.hidden_states[0], output.logits)
        )
        carried: State = tuple(x[:, :, None] for x in follower.ends)
        found: list[Tensor] = []
        for number, plan in enumerate(self._plan):
            if number * k >= depth:
                break
            if number:
                ids = torch.cat(found, dim=1)[:, plan.tokens]  # [rows, blocks, k]
                above = states[:, plan.above].flatten(0, 1)
                before = tuple(x[:, :, plan.above].flatten(1, 2) for x in carried)
                read, after = self.head.read(ids.flatten(0, 1), above, before)
                count = ids.shape[1]
                carried = tuple(x.unflatten(1, (rows, count)) for x in after)
                chains = [
                    [
                        place if i == 0 else pending + block * k + i - 1
                        for block, place in enumerate(of_row[n] for n in plan.above.tolist())
                        for i in range(k)
                    ]
                    for of_row in places
                ]
                read = read.unflatten(0, (rows, count)).flatten(1, 2)
                output = follower.decoder.feed(ids.flatten(1).tolist(), chains, block=k, states=read)
                states, logits = (x.unflatten(1, (count, k)) for x in (output.hidden_states[0], output.logits))
                places = [[pending + block * k + k - 1 for block in range(count)]] * rows
                pending += count * k
            best = logits.topk(plan.width).indices  # [rows, blocks, k, width]
            found.append(best.flatten(1).index_select(1, plan.picked))
        return torch.cat(found, dim=1)


class _Follower(Follower):
    """Remembers where the LSTM stands. ends: after what was fed last."""

    head: FalconHead

    def __init__(self, head: FalconHead, rows: int) -> None:
        super().__init__(head, head.settings.k)
        self.ends = self._committed = head.begin(rows)
        self._last: tuple[Tensor, Tensor, Sequence[range]] | None = None

    def _read(self, states: Tensor, ids: Tensor, spans: Sequence[range]) -> Tensor:
        self._last = ids, states, spans
        if not self.head.settings.recurrent:
            return self.head.read(ids, states)[0]
        # Each row from its first state on, padded behind, and back to where they stand.
        rows, count = ids.shape
        starts, lengths = torch.tensor([[span.start, len(span)] for span in spans], device=ids.device).unbind(1)
        most = max(map(len, spans))
        if not most:
            self.ends = self._committed
            return states.new_zeros(rows, count, self.head.config.hidden_size, dtype=self.head.dtype)
        there = (starts[:, None] + torch.arange(most, device=ids.device)).clamp(max=count - 1)
        back = (torch.arange(count, device=ids.device) - starts[:, None]).clamp(0, most - 1)
        new = states.gather(1, there[..., None].expand(-1, -1, states.shape[-1]))
        read, self.ends = self.head.read(ids.gather(1, there), new, self._committed, lengths)
        return read.gather(1, back[..., None].expand(-1, -1, read.shape[-1]))

    def _advance(self, counts: Sequence[int]) -> None:
        if self.head.settings.recurrent:
            assert self._last is not None, "nothing was read yet"
            ids, states, spans = self._last
            self._read(states, ids, [range(span.start, span.start + n) for span, n in zip(spans, counts)])
            self._committed = self.ends


@dataclass(frozen=True)
class _Pass:
    """The blocks of a pass and the nodes that it guesses.

    tokens: nodes that a block reads, [blocks, k].  above: which block of the pass before it goes on from, [blocks].
    width: guesses of a row.  picked: which guesses are in the tree, of all rows of all blocks one after the other.
    """

    tokens: Tensor
    above: Tensor
    width: int
    picked: Tensor


def _plan(tree: StaticTree, k: int, device: torch.device) -> list[_Pass]:
    """The passes of a tree, as indices on a device."""
    number = {path: node for node, path in enumerate(tree.paths)} | {(): ROOT}
    blocks: dict[tuple[int, ...], int] = {(): 0}
    plans = []
    for first in range(0, tree.depth, k):
        nodes = [node for level in tree.levels[first : first + k] for node in level]
        above, tokens = [0], [[0] * k]  # of the first pass, which reads no drafts
        if first:
            inner = sorted({number[tree.paths[node][:first]] for node in nodes})
            paths = [tree.paths[node] for node in inner]
            above = [blocks[path[: first - k]] for path in paths]
            tokens = [[number[path[: first - k + i + 1]] for i in range(k)] for path in paths]
            blocks = {path: block for block, path in enumerate(paths)}
        width = max(tree.paths[node][-1] for node in nodes) + 1
        picked = [
            (blocks[path[:first]] * k + len(path) - 1 - first) * width + path[-1]
            for path in (tree.paths[node] for node in nodes)
        ]
        index = (torch.tensor(one, device=device) for one in (tokens, above, picked))
        read, from_block, chosen = index
        plans.append(_Pass(read, from_block, width, chosen))
    return plans
