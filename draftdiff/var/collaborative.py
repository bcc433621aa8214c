"""Collaborative decoding (CoDe, arXiv 2411.17787): a large drafter for the first scales, a small refiner after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.var.cache import KVCache
from draftdiff.var.decoding import ScaleDecoder
from draftdiff.var.transformer_var import VARTransformer2DModel

SHARED = ("vocab_size", "in_channels", "num_classes", "patch_nums")


def check_pair(drafter: VARTransformer2DModel, refiner: VARTransformer2DModel, draft_scales: int) -> None:
    """Raise ValueError unless these two can work together for that many drafted scales."""
    for name in SHARED:
        ours, theirs = drafter.config[name], refiner.config[name]
        if (tuple(ours) != tuple(theirs)) if name == "patch_nums" else (ours != theirs):
            raise UserError(f"drafter and refiner must have the same {name}, got {ours} and {theirs}")
    check_draft_scales(draft_scales, len(drafter.config.patch_nums))


def check_draft_scales(draft_scales: int, scales: int) -> None:
    """Raise ValueError unless both models have a scale to do."""
    if isinstance(draft_scales, bool) or not isinstance(draft_scales, int) or not 1 <= draft_scales < scales:
        raise UserError(f"draft_scales must be a whole number from 1 to {scales - 1}, got {draft_scales!r}")


class CollaborativeDecoder:
    """Drafter for scales 0 to draft_scales - 1, refiner for the others.

    At the hand-over the drafter's cache is dropped and the refiner reads all drafted scales in one block-causal
    forward, which fills its cache and gives the logits of the next scale alone.
    new_decoder: makes a model's decoder with an empty cache.  hand_over: called when the refiner takes over.
    """

    def __init__(
        self,
        drafter: VARTransformer2DModel,
        refiner: VARTransformer2DModel,
        draft_scales: int,
        new_decoder: Callable[[VARTransformer2DModel], ScaleDecoder],
        hand_over: Callable[[], None] = lambda: None,
    ) -> None:
        check_pair(drafter, refiner, draft_scales)
        self.draft_scales = draft_scales
        self.refiner = refiner
        self.new_decoder = new_decoder
        self.hand_over = hand_over
        self.active = new_decoder(drafter)
        self.drafted: list[Tensor] = []

    @property
    def cache(self) -> KVCache:
        """Of the model at work."""
        return self.active.cache

    def logits(self, scale: int, inputs: Tensor | None) -> Tensor:
        """See ScaleDecoder."""
        if inputs is not None and scale <= self.draft_scales:
            self.drafted.append(inputs)
        if scale != self.draft_scales:
            return self.active.logits(scale, inputs)
        self.active.cache.clear()  # before the refiner's grows
        self.active = self.new_decoder(self.refiner)
        self.hand_over()
        rows = len(self.drafted[-1])  # those at work now: of the unconditional half none, once guidance is off
        history = torch.cat([drafted[:rows] for drafted in self.drafted], dim=1)
        self.drafted.clear()
        return self.active.logits(scale, history, first_scale=0)
