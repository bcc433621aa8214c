"""A head with a cache of its own, which follows the target: it is fed the target's states of what was committed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context


class Follower:
    """One generation. head: as a `TreeDecoder` calls a model, with `states` beside the tokens; it has a `config`.

    known: how many states of each row were fed last, none where nothing new was committed.
    """

    def __init__(self, head: Any) -> None:
        self.head = head
        self.known: list[int] = []
        self._decoder: TreeDecoder | None = None
        self._prompt_forwards = 0

    @property
    def forwards(self) -> int:
        """Of the head, those of the prompt aside."""
        return 0 if self._decoder is None else self._decoder.forwards - self._prompt_forwards

    @property
    def decoder(self) -> TreeDecoder:
        """What holds the head's cache, once there is a state."""
        assert self._decoder is not None, "nothing was fed yet"
        return self._decoder

    def catch_up(self, context: Context) -> Any:
        """The head's output for the states that were committed last, each with the token after it, [rows, most, ...],
        padded behind; of the prompt for the last one alone. None while no row has a state.

        What was fed else since the last call, such as drafts, is forgotten.
        """
        found = [states[: len(states) if left >= 0 else 0] for states, left in zip(context.target.states, context.room)]
        counts = [len(states) for states in found]
        if not any(counts):
            return None
        tokens = [ids[0, ids.shape[1] - count :] for ids, count in zip(context.ids, counts)]
        if self._decoder is None:
            self._read_prompt(found, tokens)
            found, tokens = [states[-1:] for states in found], [new[-1:] for new in tokens]
        else:
            self._decoder.keep([range(count) for count in self.known])
        self.known = [len(new) for new in tokens]
        most, width = max(self.known), max(states.shape[-1] for states in found)
        padded = [F.pad(states, (0, width - states.shape[1], 0, most - len(states))) for states in found]
        chains = [list(range(-1, count - 1)) for count in self.known]
        return self.decoder.feed([new.tolist() for new in tokens], chains, states=self._read(torch.stack(padded)))

    def _read_prompt(self, found: list[Tensor], tokens: list[Tensor]) -> None:
        """Feed all but the last state of each row, padded in front."""
        most, width = max(map(len, found)), max(states.shape[-1] for states in found)
        before = [most - len(states) for states in found]
        states = torch.stack([F.pad(x, (0, width - x.shape[1], n, 0)) for x, n in zip(found, before)])
        ids = torch.stack([F.pad(new, (n, 0)) for new, n in zip(tokens, before)])
        mask = torch.arange(most, device=ids.device) >= torch.tensor(before, device=ids.device)[:, None]
        self._decoder = TreeDecoder.prefill(
            self.head,
            ids,
            mask.long() if any(before) else None,
            DynamicCache(config=self.head.config),
            inputs={"states": self._read(states)},
        )
        self._prompt_forwards = self._decoder.forwards

    def _read(self, states: Tensor) -> Tensor:
        """States as the head reads them."""
        return self.head.project(states)
