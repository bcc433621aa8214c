"""Drafts from a published EAGLE-3 head (arXiv 2503.01840), in any of the `shapes`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftdiff.llm.checks import require
from draftdiff.llm.drafters.base import Context, Reads, suffixes
from draftdiff.llm.drafters.follower import Follower
from draftdiff.llm.drafters.shapes import Reranked, Shape
from draftdiff.llm.heads.eagle import EagleHead
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.reporting import Report
from draftdiff.llm.tree import ROOT, Tree


class EagleDrafter:
    """Drafts from an EAGLE-3 head, which reads the target's states of the whole prompt.

    head: `EagleHead` on the target's device.  shape: `Reranked`, the head's own dynamic tree, or any other, such as
    `Chain`. A row of whose tokens no state is known yet, such as one of a single token, gets no drafts.
    """

    def __init__(self, head: EagleHead, shape: Shape | None = None) -> None:
        self.head, self.shape = head, shape or Reranked()
        self.reads = Reads(head.settings.target_layers, prompt=True)
        self.forwards = 0
        self.last_report: Report | None = None
        self._session: _Session | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel, shape: Shape | None = None) -> EagleDrafter:
        """The head of a folder for its target: config.json with pytorch_model.bin or model.safetensors as SafeAILab
        publishes them, or of speculators (speculators_model_type "eagle3").

        Raises FileNotFoundError, and ValueError for other heads, for those of another target, and for damage.
        """
        return cls(EagleHead.from_pretrained(folder, model), shape)

    def cost(self, target: PreTrainedModel) -> float:
        """Bytes of weights that one draft forward reads over those of a target forward; no embedding is counted."""
        skipped = self.head.embed_tokens
        own = 0 if skipped is None else skipped.weight.numel() * skipped.weight.element_size()
        read = sum(p.numel() * p.element_size() for p in self.head.parameters())
        return (read - own) / bytes_per_forward(target)

    def begin(self, context: Context) -> None:
        """Raises ValueError for a target of another size or on another device than the head is for."""
        model, own = context.target.model, self.head.device
        require(model.device == own, f"the head is on {own}, the target on {model.device}: they need the same device")
        self.head.target.check_target(model)
        self._session, self.forwards = _Session(self.head), 0

    def end(self) -> None:
        """Let the head's cache go."""
        self._session = None

    def propose(self, context: Context) -> list[Tree]:
        """One tree for each row."""
        assert self._session is not None, "propose before begin"
        trees = [Tree() for _ in context.ids]
        session = self._session
        roots = session.catch_up(context) if max(context.room) >= 1 else None  # else it is the last round
        if roots is not None:
            room = [left if known else 0 for left, known in zip(context.room, session.known)]
            self.shape.grow(trees, roots, room, context.sampling, lambda nodes: session.expand(context, trees, nodes))
            self.forwards = session.follower.forwards
        return trees


class _Session:
    """The head's side of one generation: its cache, and its output for what is pending there."""

    def __init__(self, head: EagleHead) -> None:
        self.follower = Follower(head)
        self._out = torch.empty(0)  # [rows, pending, width]
        self._places: list[dict[int, int]] = []

    @property
    def known(self) -> list[int]:
        """How many states of each row came in this round."""
        return self.follower.known

    def catch_up(self, context: Context) -> list[Tensor] | None:
        """What follows each row's last token, [1, vocabulary], no rows where no state is known; None if nowhere."""
        output = self.follower.catch_up(context)
        if output is None:
            return None
        self._out = output.hidden_states[0]
        self._places = [{} for _ in self.known]
        return [
            context.distribution(row, [[]], output.logits[row, known - 1 : known]) if known else output.logits[row, :0]
            for row, known in enumerate(self.known)
        ]

    def expand(self, context: Context, trees: list[Tree], nodes: list[list[int]]) -> list[Tensor]:
        """What follows some new nodes of each row's tree, [nodes, vocabulary]."""
        tokens = [[tree.tokens[node] for node in some] for tree, some in zip(trees, nodes)]
        parents = []
        for row, (tree, some) in enumerate(zip(trees, nodes)):
            places, last = self._places[row], self.known[row] - 1
            above = [tree.parents[node] for node in some]
            parents.append([last if parent == ROOT else places[parent] for parent in above])
            places.update({node: self._out.shape[1] + i for i, node in enumerate(some)})
        # What the head said after a token's parent stands for the target's states of it.
        width = max(map(len, nodes))
        index = torch.tensor([above + [0] * (width - len(above)) for above in parents], device=self._out.device)
        states = self._out.gather(1, index[..., None].expand(-1, -1, self._out.shape[-1]))
        output = self.follower.decoder.feed(tokens, parents, states=states)
        self._out = torch.cat([self._out, output.hidden_states[0]], dim=1)
        return [
            context.distribution(row, suffixes(context, trees[row], some), output.logits[row, : len(some)])
            if some
            else output.logits[row, :0]
            for row, some in enumerate(nodes)
        ]
