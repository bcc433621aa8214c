"""Losses that bring a draft q closer to its target p, all of one signature and all per position.

`loss(draft_logits, target_logits, mask=None) -> [...]` takes logits [..., vocabulary] of any float dtype, computes in
fp32, and gives zero, with no gradient, where the bool mask [...] is False. Logits of -inf, which a draft with a trimmed
vocabulary has for the tokens it cannot emit, make no NaN: `kl` and `ce` then compare with the target's law over the
tokens that the draft can emit (they would be infinite otherwise), the other losses with the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from draftdiff.errors import UserError

Loss = Callable[..., Tensor]


def kl(draft_logits: Tensor, target_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Forward divergence, sum of p (log p - log q): the draft is to cover all that the target might say."""
    log_q, log_p = _logs(draft_logits, target_logits)
    log_p = log_p.masked_fill(log_q.isneginf(), -torch.inf).log_softmax(-1)
    return _masked((log_p.exp() * (_finite(log_p) - _finite(log_q))).sum(-1), mask)


def rkl(draft_logits: Tensor, target_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Reverse divergence, sum of q (log q - log p): the draft is to say nothing that the target would not."""
    log_q, log_p = _logs(draft_logits, target_logits)
    return _masked((log_q.exp() * (_finite(log_q) - log_p.masked_fill(log_q.isneginf(), 0.0))).sum(-1), mask)


def jsd(draft_logits: Tensor, target_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence, the mean of the divergences of p and q from their mean: symmetric, at most log 2."""
    log_q, log_p = _logs(draft_logits, target_logits)
    log_m = torch.logaddexp(_floored(log_p), _floored(log_q)) - torch.log(torch.tensor(2.0))
    parts = [log.exp() * (_finite(log) - log_m) for log in (log_p, log_q)]
    return _masked(0.5 * (parts[0] + parts[1]).sum(-1), mask)


def ce(draft_logits: Tensor, target_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy -log q of one token: the target's likeliest, or the one it wrote.

    target_logits: logits, or ids int64 [...] of what the target wrote. Where such an id is one that the draft cannot
    emit there is nothing to learn: zero.
    """
    if target_logits.dtype.is_floating_point:
        log_q, log_p = _logs(draft_logits, target_logits)
        ids = log_p.masked_fill(log_q.isneginf(), -torch.inf).argmax(-1)
    else:
        if target_logits.shape != draft_logits.shape[:-1]:
            raise UserError(
                f"target ids must have shape {tuple(draft_logits.shape[:-1])}, got {tuple(target_logits.shape)}"
            )
        log_q, ids = draft_logits.float().log_softmax(-1), target_logits
    return _masked(-_finite(log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)), mask)


def tvd(draft_logits: Tensor, target_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Total variation distance, half of the sum of |p - q|: one less the chance that a drafted token is accepted."""
    log_q, log_p = _logs(draft_logits, target_logits)
    return _masked(0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), mask)


def tvd_pp(
    draft_logits: Tensor,
    target_logits: Tensor,
    mask: Tensor | None = None,
    *,
    baseline: Literal["batch", "position"] = "batch",
    estimator: Literal["exact", "sample"] = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """TVD++ (arXiv 2403.00858): total variation by policy gradient with standardised rewards.

    The gradient of `tvd` is E[-r(x) grad log q(x)] for x drawn from q and rewards r(x) = 1 where p(x) > q(x), else 0.
    Here r - mean over deviation takes the place of r, mean and deviation being those of r under q, over all unmasked
    positions ("batch") or each position's own ("position"). With estimator "sample" one x a position is drawn
    (generator: of which), with "exact" the expectation is summed up over the vocabulary.

    Worth knowing: the mean drops out of an exact expectation, since E[grad log q] = 0. So "exact" with "batch" is `tvd`
    over the deviation, which Adam does not tell from `tvd`; "position" weighs positions anew, and in "sample" the mean
    lowers the variance. The value returned is that of `tvd`, so that curves can be read; only the gradient differs.
    """
    if baseline not in ("batch", "position"):
        raise UserError(f"baseline must be one of batch, position, got {baseline!r}")
    if estimator not in ("exact", "sample"):
        raise UserError(f"estimator must be one of exact, sample, got {estimator!r}")
    log_q, log_p = _logs(draft_logits, target_logits)
    q, p = log_q.exp(), log_p.exp()
    with torch.no_grad():
        reward = (p > q).float()
        mean = (q * reward).sum(-1, keepdim=True)
        if baseline == "batch":
            counted = mean if mask is None else mean[mask]
            mean = counted.mean() if counted.numel() else mean
        deviation = (mean * (1 - mean)).clamp_min(0).sqrt().clamp_min(1e-4)  # of a reward that is 0 or 1
        advantage = (reward - mean) / deviation
    if estimator == "exact":
        surrogate = -(advantage * q).sum(-1)
    else:
        drawn = torch.multinomial(q.detach().flatten(0, -2), 1, generator=generator).view(*q.shape[:-1], 1)
        surrogate = -(advantage * _finite(log_q)).gather(-1, drawn).squeeze(-1)
    value = 0.5 * (p - q.detach()).abs().sum(-1)
    return _masked(value + surrogate - surrogate.detach(), mask)


def lk(
    draft_logits: Tensor,
    target_logits: Tensor,
    mask: Tensor | None = None,
    *,
    form: Literal["hybrid", "log"] = "hybrid",
    decay: float = 3.0,
) -> Tensor:
    """Losses on the acceptance a = sum of min(p, q) itself (LK losses, arXiv 2602.23881).

    "hybrid": w KL(p, q) + (1 - w) TVD(p, q) with w = exp(-decay * a), each position's own and taken as a constant: the
    divergence leads while the draft is far away, where the gradient of TVD is weak, and TVD takes over as it comes
    near.  "log": -log a.
    """
    if form not in ("hybrid", "log"):
        raise UserError(f"form must be one of hybrid, log, got {form!r}")
    if form == "log":
        log_q, log_p = _logs(draft_logits, target_logits)
        return _masked(-torch.minimum(log_p, log_q).logsumexp(-1), mask)
    distance = tvd(draft_logits, target_logits)
    weight = torch.exp(-decay * (1 - distance.detach()))
    return _masked(weight * kl(draft_logits, target_logits) + (1 - weight) * distance, mask)


LOSSES: dict[str, Loss] = {"kl": kl, "rkl": rkl, "jsd": jsd, "ce": ce, "tvd": tvd, "tvd_pp": tvd_pp, "lk": lk}


def named_loss(loss: str | Loss) -> Loss:
    """A loss by its name in LOSSES; callables pass. Raises ValueError with the names there are."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise UserError(f"loss must be a callable or one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss]


def _logs(draft_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    if draft_logits.shape != target_logits.shape:
        raise UserError(
            f"draft and target logits must have one shape, got {tuple(draft_logits.shape)} "
            f"and {tuple(target_logits.shape)}"
        )
    return draft_logits.float().log_softmax(-1), target_logits.float().log_softmax(-1)


def _finite(log: Tensor) -> Tensor:
    # Only ever multiplied by the probability, which is zero there.
    return log.masked_fill(log.isneginf(), 0.0)


def _floored(log: Tensor) -> Tensor:
    # logaddexp of two -inf has no gradient; of two numbers this small it is as good as -inf.
    return log.masked_fill(log.isneginf(), torch.finfo(log.dtype).min / 4)


def _masked(loss: Tensor, mask: Tensor | None) -> Tensor:
    return loss if mask is None else loss.masked_fill(~mask, 0.0)
