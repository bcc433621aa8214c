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

from draftdiff.errors import UserError
from draftdiff.llm.verify import SAMPLERS, check_verifier, k_seq_rate

_HEAVIEST = 4  # per draft: tokens that are convolved one by one, see `_Races`
_TERMS = 8  # and n more of the exponential's series for light tokens
_LIGHT = 0.5  # the largest exponent that the series is used for
_STEP = 0.5  # of the sum over log time
_CHUNK = 256  # tokens at once, few enough for a CPU's cache
_SURE = 1e-9  # chance of a draw outside a prefix that counts as none
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
    order = torch.argsort(q / p.clamp(min=1e-300), descending=True)
    sorted_p, sorted_q = p[order], q[order]
    inside = F.pad(sorted_p.cumsum(0), (1, 0))
    if sampler == "without_replacement" and n > 2:
        return 1 + _minimum(inside, _Races(sorted_q, n))
    both = _pairs(sorted_q) if sampler == "without_replacement" and n == 2 else F.pad(sorted_q.cumsum(0), (1, 0)) ** n
    return 1 + float((inside - both).min())


def _pairs(q: Tensor) -> Tensor:
    """Chance that two draws without replacement are among the first k tokens, for every k: sum of q_i / (1 - q_i) times
    the mass of the others. The likeliest token is kept apart, as it may leave less to the others than rounding would.
    """
    top = int(q.argmax())
    light = q.index_fill(0, torch.tensor(top, device=q.device), 0)
    odds = light / (1 - light)
    others, odds, squares = F.pad(torch.stack([light, odds, odds * light]).cumsum(1), (1, 0))
    top_in = torch.arange(len(q) + 1, device=q.device) > top
    return others * odds - squares + top_in * q[top] * (odds + others / others[-1])


def expected_acceptance(p: Tensor, q: Tensor, n: int, sampler: str, verifier: str) -> float:
    """The chance that `verify.reject(p, q, ..., sampler, verifier)` emits one of n drafts by accepting it.

    Arguments and errors as for `acceptance_upper_bound`; verifier: one of `verify.VERIFIERS[sampler]`, which are exact.
    Exact but for rounding; "rrs" for more than two drafts without replacement is a quasi-random mean, to a few 1e-4.
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
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}")
    if p.shape != q.shape or p.ndim != 1:
        raise UserError(f"p and q must be vectors of one size, got {list(p.shape)} and {list(q.shape)}")
    if n > int((q > 0).sum()) and sampler != "with_replacement":
        raise UserError(f"n must be at most the {int((q > 0).sum())} tokens that q can give, got {n}")
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
    order = q.argsort()  # sums over the lightest tokens first keep what they add
    p, q = p[order], q[order]
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
    left = torch.ones_like(rejected)
    c = torch.zeros_like(rejected)
    for k, draft in enumerate(first.T):
        before = z(c)
        residual = (p[draft] - c * q[draft]).clamp(min=0) / before.clamp(min=1e-300)
        rejected = rejected * (1 - residual * left / q[draft].clamp(min=1e-300)).clamp(min=0)
        c = c + before / left
        left = _left(q, first[:, : k + 1])
    before, after = z(c), z(c + z(c) / left)
    rejected = rejected * after / before.clamp(min=1e-300)
    return 1 - float((weight.to(q.device) * rejected).sum())


def _left(q: Tensor, drawn: Tensor) -> Tensor:
    """Mass of the tokens that were not drawn, [samples].  q: ascending.  drawn: int64 [samples, draws], no token twice.

    Not 1 less the others' mass, of which nothing is left where q is peaked. The heaviest tokens are added one by one;
    of the lighter ones' sum no more is subtracted than the heavy ones that were not drawn weigh.
    """
    light = max(len(q) - 2 * drawn.shape[1], 0)
    heavy = torch.arange(light, len(q), device=q.device)
    stays = (drawn[:, :, None] != heavy).all(1)
    return q[:light].sum() - torch.where(drawn < light, q[drawn], 0.0).sum(1) + (stays * q[light:]).sum(1)


def _sequences(q: Tensor, points: Tensor) -> Tensor:
    """Draws without replacement from uniform points [samples, draws], int64 of the same shape.  q: ascending."""
    sums = F.pad(q.cumsum(0), (1, 0))
    drawn = torch.empty(len(points), 0, dtype=torch.long, device=q.device)
    for u in points.T:
        v = u * _left(q, drawn)
        for token in drawn.sort(1).values.T:
            v = torch.where(v >= sums[token], v + q[token], v)
        found = torch.searchsorted(sums[1:], v, right=True).clamp(max=len(q) - 1)
        drawn = torch.cat([drawn, found[:, None]], 1)
    return drawn


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
        self._light = self.q.index_fill(0, self.heavy, 0)
        self._light_mass = F.pad(self._light.cumsum(0), (1, 0))
        self.mass = F.pad(self.q.cumsum(0), (1, 0))
        # Not 1 - mass, of which nothing is left where few tokens have it all.
        self._behind = F.pad(self.q.flip(0).cumsum(0).flip(0), (0, 1))
        self._latest = 0.0
        degrees = range(1, _TERMS + self.n + 1 if self.n > 1 else 2)
        series = [[_series(degree, k) for degree in degrees] for k in range(1, self.n)]
        self._degrees = torch.tensor(degrees, device=self.q.device)
        self._series = self.q.new_tensor(series).reshape(-1, len(degrees))

    def prefixes(self, ends: Tensor) -> Tensor:
        """Chance that all draws are among the first `end` tokens, for each of `ends` [m]."""
        behind = self._behind[ends]
        heavy = self.heavy < ends[:, None]
        # Even without its n - 1 heaviest tokens the prefix outweighs what is behind it.
        lighter = (heavy & (heavy.cumsum(1) >= self.n)) * self.q[self.heavy]
        sure = self.n * behind <= _SURE * (self._light_mass[ends] + lighter.sum(1))
        result = sure.to(behind)
        open_ = ~sure & (ends >= self.n)
        if bool(open_.any()):
            result[open_] = self._integrate(ends[open_], behind[open_])
        return result

    def _integrate(self, ends: Tensor, rest: Tensor) -> Tensor:
        grid = torch.arange(math.log(1e-6), math.log(24.0), _STEP, dtype=torch.float64, device=self.q.device)
        t = grid.exp() / rest[:, None]  # [prefixes, times]
        weight = _STEP * (t * rest[:, None]) * (-t * rest[:, None]).exp()
        return (weight * (1 - self._arrivals(ends, t).sum(0))).sum(1)

    def _arrivals(self, ends: Tensor, t: Tensor, without: int | None = None) -> Tensor:
        """Chance that 0 to n - 1 tokens of each prefix have arrived at its times t, [n, prefixes, times].

        without: one of the heavy tokens, which never arrives.
        """
        middle, sums = self._light_sums(ends, t)
        for part in middle.split(_CHUNK):
            inside = self.q[part] * (part < ends[:, None])
            # Where this is cut, so many heavier tokens have arrived that nothing is left of it.
            odds = torch.expm1((t[:, :, None] * inside[:, None]).clamp_(max=50))
            power = torch.ones_like(odds)
            for total in sums:
                total += power.mul_(odds).sum(-1)
        # Odds turn into chances times the chance that none at all has arrived.
        arrivals = _newton(sums, self.n, t) * (-self._light_mass[ends][:, None] * t).exp()
        heavy = self.heavy[self.heavy != without] if without is not None else self.heavy
        for stays in (-t * (self.q[heavy] * (heavy < ends[:, None])).T[:, :, None]).exp():
            comes = arrivals * (1 - stays)
            arrivals = arrivals * stays
            arrivals[1:] += comes[:-1]
        return arrivals

    def _light_sums(self, ends: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens whose odds must be summed one by one; sums of powers 1 to n - 1 of the odds of lighter ones."""
        latest = float(t.max())
        if latest > self._latest:
            self._latest = 2 * latest  # later prefixes are longer and wait for longer: once is enough for most
            scaled = self._light * self._latest  # powers of q alone would leave the range of fp64
            self._middle = torch.nonzero(scaled > _LIGHT).flatten()
            scaled = scaled.index_fill(0, self._middle, 0)
            power = torch.ones_like(scaled)
            self._powers = [power.mul_(scaled).cumsum(0) for _ in self._degrees]
        powers = torch.stack([power[ends - 1] for power in self._powers])
        moments = powers[:, :, None] * (t / self._latest) ** self._degrees[:, None, None]
        return self._middle, torch.tensordot(self._series, moments, 1)

    def included(self) -> Tensor:
        """Chance of each token to be drawn, [vocabulary]: fewer than n others arrive before it."""
        q = self.q
        slowest = float(q.index_fill(0, q.topk(self.n - 1).indices, 0).sum())
        grid = torch.arange(math.log(1e-7), math.log(32 / slowest), _STEP, dtype=torch.float64)
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


def _newton(sums: Tensor, n: int, like: Tensor) -> Tensor:
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
