"""Drafts from a LongSpec layer (arXiv 2502.17421), whose memory does not grow with the text."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context, Reads, suffixes
from draftdiff.llm.drafters.one_layer import LayerDrafter
from draftdiff.llm.drafters.recent_keys import RecentKeys
from draftdiff.llm.drafters.shapes import Beams, Sampled, Shape
from draftdiff.llm.heads import files
from draftdiff.llm.heads.hybrid import hybrid
from draftdiff.llm.heads.longspec import LongSpecHead
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import ROOT, Tree, ancestors, as_mask


class LongSpecDrafter(LayerDrafter):
    """Drafts from one layer that reads the keys and values of the target's last layer, of all tokens that the target
    has verified. Its own keys are those of the last `window` tokens, as many whatever the text's length.

    head: `LongSpecHead` on the target's device.  shape: `Beams`, or any other, such as `Chain`. A target whose last
    layer slides over a window, or whose cache is evicted from, is read as far as it remembers.
    """

    reads = Reads()

    def __init__(self, head: LongSpecHead, shape: Shape | None = None) -> None:
        self.head, self.shape = head, shape or Beams()
        self.forwards = 0
        self.last_report: Report | None = None
        self._session: _Session | None = None

    @property
    def samples(self) -> bool:
        """Whether drafts are drawn at random when the target samples."""
        return isinstance(self.shape, Sampled)

    @classmethod
    def from_target(cls, model: PreTrainedModel, shape: Shape | None = None, window: int = 512) -> LongSpecDrafter:
        """A new layer to train, fp32. window: tokens before a token that it attends to."""
        return cls(LongSpecHead.from_target(model, window), shape)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel, shape: Shape | None = None) -> LongSpecDrafter:
        """The layer of a folder of `save_pretrained` or of the original's (a glide folder), in the target's dtype.

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        return cls(LongSpecHead.from_pretrained(folder, model), shape)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the layer to a new folder, as config.json and model.safetensors. Raises FileExistsError."""
        files.save(self.head, folder, "longspec")

    def _trainer(self) -> type[Trainer]:
        from draftdiff.llm.train.longspec import LongSpecTrainer

        return LongSpecTrainer

    def begin(self, context: Context) -> None:
        """Raises ValueError for a target of another size or on another device than the layer is for."""
        self.check_target(context)
        self._session, self.forwards = _Session(self, len(context.ids)), 0

    def end(self) -> None:
        """Let the layer's keys go."""
        self._session = None

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        assert self._session is not None, "propose before begin"
        trees = [Tree() for _ in context.ids]
        session = self._session
        if max(context.room) >= 1:  # else it is the last round
            roots = session.catch_up(context)
            self.shape.grow(
                trees, roots, context.room, context.sampling, lambda nodes: session.expand(context, trees, nodes)
            )
            self.forwards = session.forwards
        return trees

    def first_seen(self, depths: Tensor) -> Tensor:
        """The first of the `window` tokens before the root that nodes at these depths see, int64 as depths."""
        return depths


class _Session:
    """One generation. Pending are the last token of each row, which is no draft, and the nodes that were expanded."""

    def __init__(self, drafter: LongSpecDrafter, rows: int) -> None:
        self.head, self.first_seen, self.forwards = drafter.head, drafter.first_seen, 0
        self.recent = RecentKeys(self.head, rows)
        self._read: tuple[Tensor, Tensor, Tensor | None] | None = None  # the target's keys and values, and which count
        self._roots: list[int] = []  # positions
        self._pending: tuple[Tensor, Tensor] | None = None
        self._parents: list[list[int]] = []
        self._seen: list[list[int]] = []
        self._depths: list[list[int]] = []
        self._places: list[dict[int, int]] = []  # of nodes among what is pending

    def catch_up(self, context: Context) -> list[Tensor]:
        """What follows each row's last token, [1, vocabulary], no rows where nothing is to be drafted."""
        rows = len(context.ids)
        self._read = self._target_keys(context)
        self._roots = context.target.next
        self.recent.follow(context.ids, context.padding, self._roots)
        self._pending = None
        for of_rows in (self._parents, self._seen, self._depths):
            of_rows[:] = [[] for _ in range(rows)]
        self._places = [{ROOT: 0} for _ in range(rows)]
        logits = self._feed([[int(ids[0, -1])] for ids in context.ids], [[ROOT]] * rows)
        return [
            context.distribution(row, [[]], logits[row]) if left > 0 else logits[row, :0]
            for row, left in enumerate(context.room)
        ]

    def expand(self, context: Context, trees: list[Tree], nodes: list[list[int]]) -> list[Tensor]:
        """What follows some new nodes of each row's tree, [nodes, vocabulary]."""
        before = len(self._parents[0])
        tokens = [[tree.tokens[node] for node in some] for tree, some in zip(trees, nodes)]
        parents = [
            [places[tree.parents[node]] for node in some] for tree, places, some in zip(trees, self._places, nodes)
        ]
        for places, some in zip(self._places, nodes):
            places.update({node: before + i for i, node in enumerate(some)})
        logits = self._feed(tokens, parents)
        return [
            context.distribution(row, suffixes(context, trees[row], some), logits[row, : len(some)])
            if some
            else logits[row, :0]
            for row, some in enumerate(nodes)
        ]

    def _target_keys(self, context: Context) -> tuple[Tensor, Tensor, Tensor | None] | None:
        held = context.target.committed()
        if held is None:  # a prompt of one token
            return None
        keys, values, valid = held
        own = self.head.config.num_key_value_heads, self.head.config.head_dim
        got = keys.shape[1], keys.shape[3]
        require(
            got == own,
            f"the head reads {own[0]} keys of {own[1]} a token, the last layer of "
            f"{type(context.target.model).__name__} has {got[0]} of {got[1]}",
        )
        keys, values = (x.to(self.head.device, self.head.dtype) for x in (keys, values))
        return keys, values, None if bool(valid.all()) else valid.to(keys.device)

    def _feed(self, tokens: list[list[int]], parents: list[list[int]]) -> Tensor:
        """Logits [rows, most, vocabulary] after new pending tokens, rows padded behind."""
        before, width = len(self._parents[0]), max(map(len, tokens))
        for row, above in enumerate(parents):
            depths = self._depths[row]
            depths += [0 if parent == ROOT else depths[parent] + 1 for parent in above]
            depths += [0] * (width - len(above))
            self._parents[row] += [*above, *[ROOT] * (width - len(above))]
            self._seen[row] = ancestors(self._parents[row], self._seen[row])
        ids = [[*new, *[0] * (width - len(new))] for new in tokens]
        both = torch.tensor([ids, [depths[before:] for depths in self._depths]], device=self.head.device)
        positions = both[1] + torch.tensor(self._roots, device=both.device)[:, None]
        near = self.recent.mask(self.first_seen(both[1]))
        bits = [seen for of_row in self._seen for seen in of_row[before:]]
        branch = torch.from_numpy(as_mask(bits, before + width)).view(len(ids), width, -1).to(both.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self._pending is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self._pending, (k, v)))
            self._pending = k, v
            return hybrid(q, (self.recent.keys, self.recent.values, near), (k, v, branch))

        self.forwards += 1
        return self.head.logits(self.head.step(both[0], positions, attend, self._cross))

    def _cross(self, q: Tensor) -> Tensor:
        """What queries [rows, heads, tokens, head_dim] find in the target's keys, of which all see all."""
        if self._read is None:
            return torch.zeros_like(q)
        keys, values, valid = self._read
        if valid is not None:  # a row of whose tokens none was read yet is given zeros
            known = valid.any(-1)[:, None, None, None]
            valid = valid[:, None, None] | ~known
        # The heads of a group side by side with the tokens, so that keys need no copy for each.
        group = q.shape[1] // keys.shape[1]
        grouped = q.unflatten(1, (-1, group)).flatten(2, 3)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=valid)
        out = out.unflatten(2, (group, -1)).flatten(1, 2)
        return out if valid is None else out * known
