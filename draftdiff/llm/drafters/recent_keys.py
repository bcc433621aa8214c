"""Keys and values of the last tokens of each row, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftdiff.core.importance import gather_kv
from draftdiff.llm.heads.longspec import LongSpecHead


class RecentKeys:
    """Of the `window` tokens before the last one of each row, on the right: keys, values [rows, key heads, window,
    head_dim]."""

    def __init__(self, head: LongSpecHead, rows: int) -> None:
        config, self.window, self.head = head.config, head.settings.window, head
        shape = rows, config.num_key_value_heads, self.window, config.head_dim
        self.keys = torch.zeros(shape, device=head.device, dtype=head.dtype)
        self.values = torch.zeros_like(self.keys)
        self._known = [0] * rows  # tokens of each row that have come so far

    def follow(self, ids: Sequence[Tensor], padding: Sequence[int], last: Sequence[int]) -> None:
        """Take in the tokens before the last one that are new.

        ids: of each row all tokens with their padding, int64 [1, tokens].  last: position of the last one.
        """
        totals = [row.shape[1] - skipped - 1 for row, skipped in zip(ids, padding)]
        starts = [max(known, total - self.window) for known, total in zip(self._known, totals)]
        most = max(total - start for total, start in zip(totals, starts))
        if most:
            new = torch.nn.utils.rnn.pad_sequence(
                [
                    row[0, skipped + start : skipped + total]
                    for row, skipped, start, total in zip(ids, padding, starts, totals)
                ],
                batch_first=True,
            ).to(self.keys.device)
            shifts = torch.tensor([[total - start] for start, total in zip(starts, totals)], device=new.device)
            # What stands behind a shorter row's tokens is not taken in.
            positions = torch.tensor(last, device=new.device)[:, None] - shifts + torch.arange(most, device=new.device)
            keys, values = self.head.keys(new, positions)
            index = (shifts + torch.arange(self.window, device=new.device))[:, None]
            index = index.expand(-1, keys.shape[1], -1)
            self.keys, self.values = gather_kv(
                torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2), index
            )
        self._known = totals

    def mask(self, first: Tensor) -> Tensor:
        """Which of the window tokens see, bool [rows, tokens, window]. first: of those, int64 [rows, tokens]."""
        empty = [max(self.window - known, 0) for known in self._known]
        least = first.clamp(min=torch.tensor(empty, device=first.device)[:, None])
        return torch.arange(self.window, device=first.device) >= least[..., None]
