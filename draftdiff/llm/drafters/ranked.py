"""What drafters with a static tree share: heads, files with the tree, and a state of each row to draft from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context, Reads
from draftdiff.llm.heads import files
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.reporting import Report
from draftdiff.llm.static_tree import StaticTree
from draftdiff.llm.tree import Tree


class RankedDrafter:
    """Proposes the same tree in each round, whose nodes are the guesses of heads by rank, whatever logits processors
    say. Verified by `match`, so that any choice of nodes is exact. A row of whose tokens no state is known yet, such as
    one of a single token, gets none.
    """

    reads = Reads((-1,))
    kind: str  # of heads, in files
    module: Any  # the class of the heads

    def __init__(self, heads: Any, tree: StaticTree | None = None) -> None:
        """heads: on the target's device.  Raises ValueError for a tree deeper than there are heads."""
        count = heads.settings.heads
        tree = tree or default_tree(count)
        require(tree.depth <= count, f"the tree must be at most {count} deep, one level a head, got {tree.depth}")
        require(
            tree.width <= heads.settings.vocab_size,
            f"the tree has {tree.width} children of a node, the vocabulary {heads.settings.vocab_size} tokens",
        )
        self.heads, self.tree = heads, tree
        self.forwards = 0
        self.last_report: Report | None = None

    @classmethod
    def from_target(cls, model: PreTrainedModel, *, tree: StaticTree | None = None, **options: Any) -> Self:
        """New heads to train, fp32. options: of the heads' own `from_target`, such as heads=4 and layers=1."""
        return cls(cls.module.from_target(model, **options), tree)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel, tree: StaticTree | None = None) -> Self:
        """Heads of a folder of `save_pretrained` or of a published one, in the dtype of the target that they are for.

        tree: in place of the one that was saved.  Raises FileNotFoundError, and ValueError for other heads, for those
        of another target, and for damage.
        """
        return cls(cls.module.from_pretrained(folder, model), tree or files.saved_tree(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write heads and tree to a new folder, as config.json and model.safetensors. Raises FileExistsError."""
        files.save(self.heads, folder, self.kind, self.tree.paths)

    def cost(self, target: Any) -> float:
        """Bytes of weights that a forward of a head reads, on average, over those of a target forward."""
        read = sum(p.numel() * p.element_size() for p in self.heads.parameters())
        if not self.heads.settings.own_output:
            read += self.heads.settings.heads * self.heads.target.output_bytes()
        return read / self.heads.settings.heads / bytes_per_forward(target)

    def begin(self, context: Context) -> None:
        """Raises ValueError for a target of another size or on another device than the heads are for."""
        model = context.target.model
        mine = next(self.heads.parameters()).device
        require(model.device == mine, f"the heads are on {mine}, the target on {model.device}: they need the same one")
        self.heads.target.check_target(model)
        self.forwards = 0

    def end(self) -> None:
        """Nothing is kept."""

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        depth = min(max(context.room), self.tree.depth)
        if depth < 1:
            return [Tree() for _ in context.ids]
        states, known = self.states(context)
        last = torch.stack([ids[0, -1] for ids in context.ids]).to(states.device)
        tokens = self.tokens(states, last, depth).tolist()
        self.forwards += depth
        trees = []
        for row, (left, there) in enumerate(zip(context.room, known)):
            count = self.tree.levels[min(left, depth) - 1].stop if left > 0 and there else 0
            trees.append(Tree(tokens[row][:count], self.tree.parents[:count]))
        return trees

    def states(self, context: Context) -> tuple[Tensor, list[bool]]:
        """The last known state of each row [rows, width], and of which rows there is one."""
        found = context.target.states
        known = [len(states) > 0 for states in found]
        width = self.heads.settings.hidden_size
        dtype = next(self.heads.parameters()).dtype
        last = [states[-1] if there else states.new_zeros(width) for states, there in zip(found, known)]
        return torch.stack(last).to(dtype), known

    def tokens(self, states: Tensor, last: Tensor, depth: int) -> Tensor:
        """Tokens int64 [rows, nodes] of the tree's first levels. last: the rows' last tokens, int64 [rows]."""
        raise NotImplementedError


def default_tree(heads: int) -> StaticTree:
    """A tree for heads of which nothing is known yet."""
    return StaticTree.from_widths((4, 2, *[1] * heads)[:heads])
