"""How often one of several drafts can be accepted at best, and how often each verifier accepts one (arXiv 2502.18779).

The bound is 1 + min over token sets H of P(H) - Q(H): p's mass of H less the chance that all drafts fall into H. The
best H holds the tokens of the largest q/p, so only prefixes of that order are tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftdiff.llm.verify import SAMPLERS, check_verifier, k_seq_rate

_HEAVIEST = 4  # per draft: tokens that are convolved one by one, see `_Races`
_TERMS = 8  # and n more of the exponential's series for light tokens
_LIGHT = 0.5  # the largest exponent that the series is used for
_STEP = 0.5  # of the sum over log time
_GRID, _TOLERANCE = 12, 1e-7  # of the search for the best prefix
_POINTS = 2**16  # of the quasi-random estimate


def acceptance_upper_bound(p: Tensor, q: Tensor, n: int, sampler: str) -> float:
    """The largest chance that any lossless verifier can give to accepting one of n drafts (arXiv 2502.18779).

    p, q: probabilities of target and draft [vocabulary].  sampler: "with_replacement" (n draws from q),
    "without_replacement" or "greedy" (the n - 1 likeliest tokens of q and one draw from the rest).
    Exact but for rounding; for more than two drafts without replacement to about 1e-6.
    Raises ValueError for another sampler, n below 1, or distributions of different sizes.
    """
    p, q = _checked(p, q, n, sampler)
    if sampler == "greedy":
        return _greedy(p, q, n, "greedy")
    order = torch.argsort((q / p.clamp(min=1e-300)).float(), descending=True)
    sorted_p, sorted_q = p[order], q[order]
    inside = F.pad(sorted_p.cumsum(0), (1, 0))
    if sampler == "without_replacement" and n > 2:
        return 1 + _minimum(inside, _Races(sorted_q, n))
    mass = F.pad(sorted_q.cumsum(0), (1, 0))
    if sampler == "without_replacement" and n == 2:
        odds = sorted_q / (1 - sorted_q).clamp(min=1e-300)
        sums = F.pad(torch.stack([odds, odds * sorted_q]).cumsum(1), (1, 0))
        # The whole vocabulary holds both drafts for sure; as a quotient it is 0/0 where one token has all the mass.
        both = torch.where(mass < 1 - 1e-15, mass * sums[0] - sums[1], mass)
    else:
        both = mass**n
    return 1 + float((inside - both).min())


def expected_acceptance(p: Tensor, q: Tensor, n: int, sampler: str, verifier: str) -> float:
    """The chance that `verify.reject(p, q, ..., sampler, verifier)` emits one of n drafts by accepting it.

    Arguments and errors as for `acceptance_upper_bound`; verifier: one of `verify.VERIFIERS[sampler]`, which are exact.
    Exact but for rounding; "rrs" for more than two drafts without replacement is a quasi-random mean, to about 1e-4.
    """
    check_verifier(sampler, verifier)
    p, q = _checked(p, q, n, sampler)
    if sampler == "greedy":
        return _greedy(p, q, n, verifier)
    if verifier == "k_seq":
        _, beta = k_seq_rate(p, q, n)
        return 1 - (1 - beta) ** n
    if verifier == "match":
        if sampler == "with_replacement":
            return float((p * (1 - (1 - q) ** n)).sum())
        return float((p * _Races(q, n).included()).sum())
    return _recursive(p, q, n, sampler)


def _checked(p: Tensor, q: Tensor, n: int, sampler: str) -> tuple[Tensor, Tensor]:
    """Both normalised, fp64."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if p.shape != q.shape or p.ndim != 1:
        raise ValueError(f"p and q must be vectors of one size, got {list(p.shape)} and {list(q.shape)}")
    if n > int((q > 0).sum()) and sampler != "with_replacement":
        raise ValueError(f"n must be at most the {int((q > 0).sum())} tokens that q can give, got {n}")
    p, q = p.detach().double(), q.detach().double()
    return p / p.sum(), q / q.sum()


def _greedy(p: Tensor, q: Tensor, n: int, verifier: str) -> float:
    best = q.topk(n - 1).indices
    rest = q.index_fill(0, best, 0)
    rest = rest / rest.sum()
    gained = torch.minimum(p, rest) if verifier == "greedy" else p * rest
    return float(p[best].sum() + gained.sum())


class _Residuals:
    """Z(c) = sum of (p - c q)+, by which all residuals of recursive rejection are known: they are (p - c q)+ / Z(c)."""

    def __init__(self, p: Tensor, q: Tensor) -> None:
        ratio = p / q.clamp(min=1e-300)
        self.ratio, order = ratio.sort()
        # Sums over the tokens of at least this ratio.
        above = torch.stack([p[order], q[order]]).flip(1).cumsum(1).flip(1)
        self.p, self.q = F.pad(above, (0, 1))

    def __call__(self, c: Tensor) -> Tensor:
        at = torch.searchsorted(self.ratio, c)
        return (self.p[at] - c * self.q[at]).clamp(min=0)


def _recursive(p: Tensor, q: Tensor, n: int, sampler: str) -> float:
    """Recursive rejection: after some rejections the residual is (p - c q)+, where c is one number that depends on the
    drafts only through their mass S. It grows by Z(c) / (1 - S) with every rejection."""
    z = _Residuals(p, q)
    c = torch.zeros(1, dtype=torch.float64, device=p.device)
    if sampler == "with_replacement" or n == 1:
        rejected = torch.ones_like(c)
        for _ in range(n):
            before, c = z(c), c + z(c)
            rejected = rejected * z(c) / before.clamp(min=1e-300)
        return 1 - float(rejected)
    if n == 2:
        first, weight = torch.arange(len(q), device=q.device)[:, None], q
    else:
        points = torch.quasirandom.SobolEngine(n - 1, scramble=True, seed=0).draw(_POINTS, dtype=torch.float64)
        first, weight = _sequences(q, points.to(q.device)), torch.full((_POINTS,), 1 / _POINTS, dtype=torch.float64)
    rejected = torch.ones(len(first), dtype=torch.float64, device=q.device)
    mass = torch.zeros_like(rejected)
    c = torch.zeros_like(rejected)
    for draft in first.T:
        before = z(c)
        residual = (p[draft] - c * q[draft]).clamp(min=0) / before.clamp(min=1e-300)
        left = 1 - mass
        rejected = rejected * (1 - residual * left / q[draft].clamp(min=1e-300)).clamp(min=0)
        c = c + before / left
        mass = (mass + q[draft]).clamp(max=1 - 1e-15)
    before, after = z(c), z(c + z(c) / (1 - mass))
    rejected = rejected * after / before.clamp(min=1e-300)
    return 1 - float((weight.to(q.device) * rejected).sum())


def _sequences(q: Tensor, points: Tensor) -> Tensor:
    """Draws without replacement from uniform points [samples, draws], int64 of the same shape."""
    sums = q.cumsum(0)
    taken: list[Tensor] = []
    for u in points.T:
        held = torch.stack(taken, 1).sort(1).values if taken else None
        mass = q[held] if held is not None else None
        v = u * (1 - (mass.sum(1) if mass is not None else 0))
        if held is not None and mass is not None:
            for token, size in zip(held.T, mass.T):
                v = torch.where(v >= sums[token] - size, v + size, v)
        taken.append(torch.searchsorted(sums, v.contiguous(), right=True).clamp(max=len(q) - 1))
    return torch.stack(taken, 1)


@dataclass
class _Races:
    """Draws without replacement as exponential races: token i arrives at an Exp(q_i) time, the first n are drawn.

    The chance that all n are in H is the chance that n of H arrive before the first of the others: the mean over
    t ~ Exp(1 - q(H)) of Pr(at least n of H have arrived at t), a trapezoidal sum over log t, which converges
    exponentially. The number of arrivals is a sum of independent indicators: a few of the heaviest tokens are convolved
    one by one, others enter by power sums of their odds exp(q t) - 1 (Newton's identities), which for light tokens come
    from power sums of q alone.
    """

    q: Tensor
    n: int

    def __post_init__(self) -> None:
        self.heavy = self.q.topk(min(_HEAVIEST * self.n, len(self.q))).indices
        self._rest = self.q.index_fill(0, self.heavy, 0)
        self.mass = F.pad(self.q.cumsum(0), (1, 0))
        self._latest = 0.0

    def prefixes(self, ends: Tensor) -> Tensor:
        """Chance that all draws are among the first `end` tokens, for each of `ends` [m]."""
        held = self.mass[ends]
        rest = 1 - held
        result = torch.where(rest <= 1e-12, 1.0, 0.0).to(held)
        open_ = (rest > 1e-12) & (ends >= self.n)
        if bool(open_.any()):
            result[open_] = self._integrate(ends[open_], held[open_], rest[open_])
        return result

    def _integrate(self, ends: Tensor, held: Tensor, rest: Tensor) -> Tensor:
        grid = torch.arange(math.log(1e-6), math.log(24.0), _STEP, dtype=torch.float64, device=self.q.device)
        t = grid.exp() / rest[:, None]  # [prefixes, times]
        weight = _STEP * (t * rest[:, None]) * (-t * rest[:, None]).exp()
        return (weight * (1 - self._arrivals(ends, t).sum(0))).sum(1)

    def _arrivals(self, ends: Tensor, t: Tensor, without: int | None = None) -> Tensor:
        """Chance that 0 to n - 1 tokens of each prefix have arrived at its times t, [n, prefixes, times].

        without: one of the heavy tokens, which never arrives.
        """
        middle, sums = self._light_sums(ends, t)
        for part in middle.split(1024):
            # Where this is cut, so many heavier tokens have arrived that nothing is left of it.
            odds = torch.expm1((t[:, :, None] * self.q[part]).clamp(max=50)) * (part < ends[:, None])[:, None]
            power = odds
            for k in range(self.n - 1):
                sums[k] = sums[k] + power.sum(-1)
                power = power * odds
        # Odds turn into chances times the chance that none at all has arrived.
        quiet = ((self.heavy < ends[:, None]) * self.q[self.heavy]).sum(1) - self.mass[ends]
        arrivals = _newton(sums, self.n, t) * (quiet[:, None] * t).exp()
        for token in self.heavy[self.heavy != without] if without is not None else self.heavy:
            stays = torch.where((token < ends)[:, None], (-t * self.q[token]).exp(), 1.0)
            shifted = F.pad(arrivals, (0, 0, 0, 0, 1, 0))[:-1]
            arrivals = arrivals * stays + shifted * (1 - stays)
        return arrivals

    def _light_sums(self, ends: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens whose odds must be summed one by one; sums of powers 1 to n - 1 of the odds of lighter ones."""
        latest = float(t.max())
        if latest > self._latest:
            self._latest = 2 * latest  # later prefixes are longer and wait for longer: once is enough for most
            self._middle = torch.nonzero(self._rest * self._latest > _LIGHT).flatten()
            q = self._rest.index_fill(0, self._middle, 0)
            powers = [q]
            while len(powers) < (_TERMS + self.n if self.n > 1 else 0):
                powers.append(powers[-1] * q)
            self._powers = [power.cumsum(0) for power in powers]
        sums = [torch.zeros_like(t) for _ in range(self.n - 1)]
        for degree, power in enumerate(self._powers, start=1):
            moments = power[ends - 1][:, None] * t**degree
            for k in range(min(degree, self.n - 1)):
                sums[k] = sums[k] + _series(degree, k + 1) * moments
        return self._middle, sums

    def included(self) -> Tensor:
        """Chance of each token to be drawn, [vocabulary]: fewer than n others arrive before it."""
        q = self.q
        slowest = 1 - float(q.topk(self.n - 1).values.sum())
        grid = torch.arange(math.log(1e-7), math.log(32 / max(slowest, 1e-12)), _STEP, dtype=torch.float64)
        t = grid.exp().to(q.device)
        everything = torch.tensor([len(q)], device=q.device)
        arrived = self._arrivals(everything, t[None])[:, 0]
        result = []
        for part in q.split(2048):
            odds = torch.expm1((part[:, None] * t).clamp(max=50))
            others, total = torch.zeros_like(odds), torch.zeros_like(odds)
            for j in range(self.n):  # without the token itself: the convolution undone
                others = arrived[j] - odds * others
                total += others
            result.append(part * (total @ (_STEP * t)))
        included = torch.cat(result)
        for token in self.heavy.tolist():
            others = self._arrivals(everything, t[None], without=token)[:, 0].sum(0)
            included[token] = q[token] * (others * (-q[token] * t).exp()) @ (_STEP * t)
        return included


def _series(power: int, k: int) -> float:
    """Coefficient of x^power in (exp(x) - 1)^k."""
    return sum((-1) ** (k - j) * math.comb(k, j) * j**power for j in range(k + 1)) / math.factorial(power)


def _newton(sums: list[Tensor], n: int, like: Tensor) -> Tensor:
    """Elementary symmetric polynomials 0 to n - 1 from power sums 1 to n - 1, [n, ...]."""
    e = [torch.ones_like(like)]
    for k in range(1, n):
        e.append(sum(((-1) ** (i - 1) * e[k - i] * sums[i - 1] for i in range(1, k + 1)), torch.zeros_like(like)) / k)
    return torch.stack(e)


def _minimum(inside: Tensor, races: _Races) -> float:
    """Least of P(H) - Q(H) over all prefixes H, by a grid that closes in on its lows.

    Drafts without replacement are less often all in H than with it, which leaves few prefixes to try.
    """
    below = inside - races.mass**races.n
    start = below.argmin()[None]
    best = float((inside[start] - races.prefixes(start))[0])
    possible = torch.nonzero(below < best).flatten()
    while len(possible):
        places = torch.linspace(0, len(possible) - 1, _GRID, dtype=torch.float64, device=inside.device).round().long()
        places = torch.unique(places)
        seen = possible[places]
        values = inside[seen] - races.prefixes(seen)
        low = int(values.argmin())
        best = min(best, float(values[low]))
        # P and Q grow with the prefix: none between two seen ones is lower than P of the one less Q of the other.
        floor = inside[seen[:-1]] - (inside[seen[1:]] - values[1:])
        gaps = torch.diff(places) > 1
        near = torch.zeros_like(gaps)
        near[max(low - 1, 0) : low + 1] = True
        open_ = gaps & (floor < best - _TOLERANCE) & near
        kept = [possible[a + 1 : b] for a, b, more in zip(places[:-1], places[1:], open_) if more]
        possible = torch.cat(kept) if kept else possible[:0]
    return best
