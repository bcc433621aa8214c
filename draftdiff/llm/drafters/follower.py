"""A head with a cache of its own, which follows the target: it is fed the target's states of what was committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from draftdiff.llm.decoder import TreeDecoder
from draftdiff.llm.drafters.base import Context


class Follower:
    """One generation. head: as a `TreeDecoder` calls a model, with `states` beside the tokens; it has a `config`.

    block: states that the head reads together, counted from the first that it is fed. Where fewer are new the last ones
    before them are read again, so that the last `block` are read together with what is known by then.
    known: how many states of each row were fed last, none where nothing new was committed.
    """

    def __init__(self, head: Any, block: int = 1) -> None:
        self.head, self.block = head, block
        self.known: list[int] = []
        self._fed: list[Tensor] = []  # those states, of each row
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
        padded behind; of the prompt for the last ones alone. None while no row has a state.

        What was fed else since the last call, such as drafts, is forgotten.
        """
        found = [states[: len(states) if left >= 0 else 0] for states, left in zip(context.target.states, context.room)]
        counts, block = [len(states) for states in found], self.block
        if not any(counts):
            return None
        if self._decoder is None:
            # All but the last ones are whole blocks, and so read as they would be together with those.
            fed = [block + count % block if count >= block else count for count in counts]
            tokens = [ids[0, ids.shape[1] - count :] for ids, count in zip(context.ids, counts)]
            self._read_prompt(*([x[: max(len(x) - n + 1, 0)] for x, n in zip(some, fed)] for some in (found, tokens)))
            found = [states[len(states) - n :] for states, n in zip(found, fed)]
        else:
            again = [min(block - 1, known) if 0 < count < block else 0 for count, known in zip(counts, self.known)]
            self._keep([known - n for known, n in zip(self.known, again)])
            found = [torch.cat([old[len(old) - n :], new]) for old, new, n in zip(self._fed, found, again)]
        self.known, self._fed = [len(states) for states in found], found
        most, width = max(self.known), max(states.shape[-1] for states in found)
        padded = torch.stack([F.pad(x, (0, width - x.shape[1], 0, most - len(x))) for x in found])
        last = [ids[0, ids.shape[1] - n :] for ids, n in zip(context.ids, self.known)]
        ids = torch.nn.utils.rnn.pad_sequence(last, batch_first=True)
        states = self._read(padded, ids, [range(n) for n in self.known])
        chains = [list(range(-1, n - 1)) for n in self.known]
        return self.decoder.feed([tokens.tolist() for tokens in last], chains, block=block, states=states)

    def _read_prompt(self, found: list[Tensor], tokens: list[Tensor]) -> None:
        """Feed all but the last of these states of each row, padded in front."""
        most, width = max(map(len, found)), max(states.shape[-1] for states in found)
        before = [most - len(states) for states in found]
        states = torch.stack([F.pad(x, (0, width - x.shape[1], n, 0)) for x, n in zip(found, before)])
        ids = torch.stack([F.pad(new, (n, 0)) for new, n in zip(tokens, before)])
        mask = torch.arange(most, device=ids.device) >= torch.tensor(before, device=ids.device)[:, None]
        read = self._read(states, ids, [range(n, most - 1) for n in before])
        self._decoder = TreeDecoder.prefill(
            self.head,
            ids,
            mask.long() if any(before) else None,
            DynamicCache(config=self.head.config),
            inputs={"states": read},
        )
        self._advance([max(most - 1 - n, 0) for n in before])
        self._prompt_forwards = self._decoder.forwards

    def _keep(self, counts: Sequence[int]) -> None:
        """Commit the first of the states that were fed last, so many of each row."""
        self.decoder.keep([range(count) for count in counts])
        self._advance(counts)

    def _read(self, states: Tensor, ids: Tensor, spans: Sequence[range]) -> Tensor:
        """States [rows, n, width] as the head reads them. ids: the tokens after them.  spans: where a row's stand."""
        return self.head.project(states)

    def _advance(self, counts: Sequence[int]) -> None:
        """The first of the states that were read last are committed, so many of each row."""
