"""The one oracle of the tests: attention of single queries written out from its definition, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling


def attention_row(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, tiling: Tiling, row: int, tail: bool, text_mask: Tensor | None
):
    """Output and log-sum-exp of one query of one head.

    q, k, v [tokens, head_dim] in model order, keep [tiles, tiles], row in model order, text_mask [text].
    """
    q, k, v = q.double(), k.double(), v.double()
    members = [[int(s) for s in slots if s >= 0] for slots in tiling.slots]
    own = next(i for i, tokens in enumerate(members) if row in tokens)
    logits, values, weights = [], [], []
    for i, tokens in enumerate(members):
        if keep[own, i]:
            for t in tokens:
                text_index = t if t < tiling.lead else t - tiling.grid.tokens
                is_text = not tiling.lead <= t < tiling.lead + tiling.grid.tokens
                if is_text and text_mask is not None and not text_mask[text_index]:
                    continue
                logits.append(q[row] @ k[t])
                values.append(v[t])
                weights.append(1.0)
        elif tail:
            logits.append(q[row] @ k[tokens].mean(0))
            values.append(v[tokens].mean(0))
            weights.append(float(len(tokens)))
    if not logits:
        return torch.zeros_like(q[row]), torch.tensor(-math.inf, dtype=torch.float64)
    scores = torch.stack(logits) / math.sqrt(q.shape[-1]) + torch.tensor(weights, dtype=torch.float64).log()
    return scores.softmax(0) @ torch.stack(values), scores.logsumexp(0)
