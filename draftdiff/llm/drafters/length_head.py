"""A head that stops a draft where it is likely to be rejected (adaptive drafting of OmniDraft, arXiv 2507.02659)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftdiff.llm.checks import require


class AcceptanceHead(nn.Module):
    """Chance that a drafted token is accepted, as a logit, from the draft's last hidden state before it.

    width: of the draft's hidden states, `config.hidden_size`.  inner: of its own layer. A new one says 0.88 of
    anything.
    """

    def __init__(self, width: int, inner: int = 64) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, 2.0)

    def forward(self, states: Tensor) -> Tensor:
        """states [..., width] of any dtype; logits [...], fp32."""
        return self.outer(F.silu(self.inner(states.float()))).squeeze(-1)


def first_over(chances: Sequence[float], threshold: float) -> int | None:
    """The first token at which 1 - the product of the chances so far exceeds the threshold: the draft's last one."""
    survives = 1.0
    for place, chance in enumerate(chances):
        survives *= chance
        if 1 - survives > threshold:
            return place
    return None


def acceptance_loss(logits: Tensor, accepted: Tensor, rejection_weight: float = 3.0) -> Tensor:
    """Weighted binary cross-entropy, the mean over tokens.

    logits: of the head [tokens].  accepted: the chances min(1, p/q) that they are compared with [tokens].
    rejection_weight: of rejections over acceptances, since there are fewer of them and each costs a draft forward.
    """
    require(
        logits.shape == accepted.shape, f"accepted must be {list(logits.shape)} like logits, got {list(accepted.shape)}"
    )
    accepted = accepted.to(logits)
    rejected = (1 - accepted) * F.logsigmoid(-logits)
    return -(accepted * F.logsigmoid(logits) + rejection_weight * rejected).mean()


@torch.no_grad()
def chance(head: AcceptanceHead, state: Tensor) -> float:
    """Of one token, by its state [width]."""
    return float(head(state.to(head.outer.weight.device)).sigmoid())
