"""Which token follows, given what the target says and what the draft proposed: exact, whatever the draft's quality.

Every rule returns a token distributed as the target's p. If it is one of the proposed ones, that branch goes on.

`match`: a draw from p, for proposals made in any way (SpecInfer, arXiv 2305.09781, with one draw a node).
`reject`: for proposals sampled from a known q: one draft (arXiv 2211.17192), recursive rejection (RRS, arXiv
2305.09781), K-SEQ (SpecTr, arXiv 2310.15141) and the greedy sampler's rule (arXiv 2502.18779).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.errors import UserError

SAMPLERS = ("with_replacement", "without_replacement", "greedy")

# Verifiers that are exact for the proposals of a sampler.
VERIFIERS: dict[str, tuple[str, ...]] = {
    "with_replacement": ("rrs", "k_seq", "match"),
    "without_replacement": ("rrs", "match"),
    "greedy": ("greedy", "match"),
}


def check_verifier(sampler: str, verifier: str) -> None:
    """Raise ValueError unless the verifier is exact for what the sampler draws."""
    if sampler not in VERIFIERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if verifier not in VERIFIERS[sampler]:
        raise UserError(
            f"verifier for sampler {sampler!r} must be one of {', '.join(VERIFIERS[sampler])}, got {verifier!r}"
        )


def draw(p: Tensor) -> int:
    """One index with chance proportional to p [n], from PyTorch's global generator.

    Raises ValueError where p is no distribution, as after logits that overflowed.
    """
    sums = p.double().cumsum(0)
    if not 0 < float(sums[-1]) < float("inf"):
        raise UserError("probabilities must be finite and not all 0: the model's logits hold NaN or inf")
    at = torch.rand((), dtype=torch.float64, device=p.device) * sums[-1]
    # The first index whose sum exceeds the point, so that an index of zero chance is never drawn.
    return int(torch.searchsorted(sums, at, right=True).clamp(max=int(p.shape[0]) - 1))


def sample(q: Tensor, count: int, sampler: str) -> list[int]:
    """Proposals for one node, in the order in which `reject` has to see them.

    q: the draft's distribution [vocabulary].  sampler: "with_replacement" draws `count` times; "without_replacement" as
    often, each time from what is left; "greedy" takes the count - 1 likeliest and draws the last from the rest. Fewer
    come back where q has fewer tokens of positive chance.
    """
    possible = min(count, int((q > 0).sum()))
    if not possible:  # all that the draft knows is forbidden
        return []
    if sampler == "with_replacement":
        return [draw(q) for _ in range(count)]
    if sampler == "greedy":
        best = q.topk(possible - 1).indices
        return [*best.tolist(), draw(q.index_fill(0, best, 0))]
    # Exponential races: the order of arrival is that of successive draws without replacement. In fp32 the time of a
    # token of very small chance would be infinite, as if it had no chance at all.
    q = q.double()
    return (torch.empty_like(q).exponential_() / q).topk(possible, largest=False).indices.tolist()


def match(p: Tensor) -> int:
    """One draw from p: accepted if it is among the children."""
    return draw(p)


def reject(p: Tensor, q: Tensor, tokens: Sequence[int], sampler: str, verifier: str) -> int:
    """A token distributed as p that is one of `tokens` as often as the rule can make it.

    p, q: distributions of target and draft, fp32 [vocabulary]; q may have more tokens, which p never says.  tokens:
    what `sample(q, ..., sampler)` gave. Raises ValueError for a verifier that is not exact for this sampler.
    """
    check_verifier(sampler, verifier)
    p = F.pad(p, (0, max(len(q) - len(p), 0)))
    if verifier == "match" or not tokens:
        return match(p)
    if verifier == "k_seq":
        return _k_seq(p, q, tokens)
    if verifier == "greedy":
        tokens, q = tokens[-1:], _rest(q, tokens[:-1])
    for token in tokens:
        if _accepts(p, q, token):
            return token
        p = residual(p, q)
        if sampler == "without_replacement":
            q = _rest(q, [token])
    return draw(p)


def _rest(q: Tensor, taken: Sequence[int]) -> Tensor:
    """q without the taken tokens, normalised."""
    rest = q.clone()
    rest[list(taken)] = 0
    return rest / rest.sum()


def residual(p: Tensor, taken: Tensor) -> Tensor:
    """What of p is left when `taken` was given away, normalised; p where nothing is left but rounding."""
    rest = (p - taken).clamp_(min=0)
    total = rest.sum()
    return rest / total if total > 0 else p


def _accepts(p: Tensor, q: Tensor, token: int) -> bool:
    """True with chance min(1, p/q) at the token."""
    return torch.rand(()).item() * float(q[token]) < float(p[token])


def k_seq_rate(p: Tensor, q: Tensor, count: int) -> tuple[float, float]:
    """(rho, beta) of K-SEQ: the smallest rho in [1, count] with 1 - (1 - beta)^count <= rho * beta.

    beta = sum min(q, p/rho) is the chance that one of the `count` draws passes.
    """
    p, q = p.double(), q.double()

    def beta(rho: float) -> float:
        return float(torch.minimum(q, p / rho).sum())

    low, high = 1.0, float(count)
    for _ in range(20):  # a rho that is a little too large is exact too
        rho = (low + high) / 2
        b = beta(rho)
        if 1 - (1 - b) ** count <= rho * b:
            high = rho
        else:
            low = rho
    return high, beta(high)


def _k_seq(p: Tensor, q: Tensor, tokens: Sequence[int]) -> int:
    rho, beta = k_seq_rate(p, q, len(tokens))
    for token in tokens:
        if _accepts(p, rho * q, token):
            return token
    taken = torch.minimum(q, p / rho) * ((1 - (1 - beta) ** len(tokens)) / max(beta, 1e-30))
    return draw(residual(p, taken))
