"""The one oracle of the tests: attention written out from its definition in fp64, and what rounding may add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from draftdiff.core.grid import Tiling
from draftdiff.kernels.problem import Problem


def attention_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    tiling: Tiling,
    row: int,
    tail: bool,
    text_mask: Tensor | None,
    singles: Tensor | None = None,
):
    """Output and log-sum-exp of one query of one head.

    q, k, v [tokens, head_dim] in model order, keep [tiles, tiles], row in model order, text_mask [text], singles
    [video_tiles, any].
    """
    q, k, v = q.double(), k.double(), v.double()
    members = [[int(s) for s in slots if s >= 0] for slots in tiling.slots]
    own = next(i for i, tokens in enumerate(members) if row in tokens)
    logits, values, weights = [], [], []
    taken = [] if singles is None or own >= len(singles) else [t for t in singles[own].tolist() if t >= 0]
    for t in taken:
        logits.append(q[row] @ k[t])
        values.append(v[t])
        weights.append(1.0)
    for i, tokens in enumerate(members):
        if keep[own, i]:
            for t in tokens:
                text = text_of(tiling)
                if text_mask is not None and t in text and not text_mask[text.index(t)]:
                    continue
                logits.append(q[row] @ k[t])
                values.append(v[t])
                weights.append(1.0)
        elif tail and len(set(tokens) - set(taken)):
            logits.append(q[row] @ k[tokens].mean(0))
            values.append(v[tokens].mean(0))
            weights.append(float(len(set(tokens) - set(taken))))
    if not logits:
        return torch.zeros_like(q[row]), torch.tensor(-math.inf, dtype=torch.float64)
    scores = torch.stack(logits) / math.sqrt(q.shape[-1]) + torch.tensor(weights, dtype=torch.float64).log()
    return scores.softmax(0) @ torch.stack(values), scores.logsumexp(0)


@dataclass(frozen=True)
class Expected:
    """fp64 output [batch, heads, rows, head_dim] and log-sum-exp [batch, heads, rows] of attention, and how far from
    them a kernel may end that multiplies and sums in fp32 and rounds inputs, weights and output to its dtype."""

    out: Tensor
    lse: Tensor
    out_bound: Tensor
    lse_bound: Tensor

    def after(self, row: int) -> Expected:
        """Of the rows from this one on."""
        return Expected(*(part[:, :, row:] for part in (self.out, self.lse, self.out_bound, self.lse_bound)))

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        """Raise AssertionError, with the worst excess, unless out and lse are within the bounds."""
        found = [("output", out, self.out, self.out_bound)]
        if lse is not None:
            found.append(("log-sum-exp", lse, self.lse, self.lse_bound))
        for name, got, want, bound in found:
            assert got.shape == want.shape
            error = (got.double() - want).abs().where(got.double() != want, 0.0)  # equal infinities differ by nothing
            excess = float((error / bound).nan_to_num(math.inf).max())
            assert excess <= 1, f"{name}: an error is {excess:.3g} times what rounding allows"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    dtype: torch.dtype,
    rounded: int = 0,
    times: float = 4,
    noise: Tensor | None = None,
) -> Expected:
    """Softmax attention of q [batch, heads, rows, head_dim] over k, v [batch, heads, keys, head_dim] in fp64.

    bias: [batch, heads, rows, keys], -inf for what is not read; a row that reads nothing gives 0.
    rounded: number of keys, the last ones, whose k and v the kernel rounds to its dtype first.
    noise: standard deviation of what each score of a row is off by besides, [batch, heads, rows], independent of the
    others'; six deviations of what that makes of output and log-sum-exp are allowed.
    The bounds are first-order rounding errors of these very numbers, `times` over. An error e of the scores moves the
    output by at most e times the spread of the values under the weights.
    """
    q, k, v, bias = (x.double() for x in (q, k, v, bias))
    scores = q @ k.mT * scale + bias
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    out, lse = weights @ v, scores.logsumexp(-1)

    single, own = (torch.finfo(kind).eps / 2 for kind in (torch.float32, dtype))
    sizes = (q.abs() @ k.mT.abs() * abs(scale)).where(bias > -math.inf, 0.0)
    of_scores = 4 * single * (sizes.amax(-1) + bias.where(bias > -math.inf, 0.0).abs().amax(-1))
    if rounded:
        of_scores = of_scores + own * sizes[..., -rounded:].amax(-1)
    spread = (weights @ v**2 - out**2).clamp(min=0).sqrt()
    of_out = of_scores[..., None] * spread + (own + 4 * single) * (weights @ v.abs())
    tiny = torch.finfo(dtype).tiny
    out_bound, lse_bound = times * of_out + tiny, times * (of_scores + 4 * single * (1 + lse.abs()))
    if noise is not None:
        squared = weights**2
        around = squared @ v**2 - 2 * out * (squared @ v) + out**2 * squared.sum(-1, keepdim=True)
        out_bound = out_bound + 6 * noise[..., None] * around.clamp(min=0).sqrt()
        lse_bound = lse_bound + 6 * noise * squared.sum(-1).sqrt()
    return Expected(out, lse, out_bound, lse_bound)


def text_of(tiling: Tiling) -> list[int]:
    """Positions of the tokens in no grid, ascending."""
    grids = [range(part.start, part.start + part.grid.tokens) for part in tiling.parts]
    return [t for t in range(tiling.tokens) if not any(t in grid for grid in grids)]


def tile_of(tiling: Tiling) -> Tensor:
    """The tile of each token, in the model's order, int64 [tokens]."""
    own = torch.empty(tiling.tokens, dtype=torch.long)
    for tile, slots in enumerate(tiling.slots):
        own[slots[slots >= 0]] = tile
    return own


def reads(problem: Problem) -> Tensor:
    """Whether a row reads a key, itself or in a mean, bool [batch, heads, rows, keys]."""
    tiling, exactly = problem.tiling, reads_exactly(problem)
    video = torch.ones(tiling.tokens, dtype=torch.bool)
    video[text_of(tiling)] = False
    return exactly if problem.tail is None else exactly | video


def reads_exactly(problem: Problem) -> Tensor:
    """Whether a row reads a key itself, in a kept tile or as a single token, bool [batch, heads, rows, keys]."""
    tiling, own = problem.tiling, tile_of(problem.tiling)
    read = problem.keep[:, :, own][..., own].clone()
    if problem.text_mask is not None:
        read[..., text_of(tiling)] &= problem.text_mask[:, None, None]
    return read if problem.tokens is None else read | reads_singly(problem)


def reads_singly(problem: Problem) -> Tensor:
    """Whether a row reads a key as a single token, bool [batch, heads, rows, keys]."""
    tiling, tokens = problem.tiling, problem.tokens
    read = torch.zeros(*problem.keep.shape[:2], tiling.tokens, tiling.tokens, dtype=torch.bool)
    for tile, slots in enumerate(tiling.slots[: tiling.video_tiles]):
        for b, h, position in (tokens[:, :, tile] >= 0).nonzero().tolist():
            read[b, h, slots[slots >= 0], tokens[b, h, tile, position]] = True
    return read


def attention_of(problem: Problem) -> Expected:
    """A problem's attention, in the layout of `attention`."""
    tiling, keep, own = problem.tiling, problem.keep, tile_of(problem.tiling)
    read = reads_exactly(problem)
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    bias = torch.zeros(read.shape).masked_fill(~read, -math.inf)
    pooled = 0
    if problem.tail is not None:
        pooled = tiling.video_tiles
        k, v = torch.cat([k.float(), problem.tail.k_mean], 2), torch.cat([v.float(), problem.tail.v_mean], 2)
        members = torch.stack([(own == tile) for tile in range(pooled)], -1).double()
        singly = torch.zeros_like(read) if problem.tokens is None else reads_singly(problem)
        left = (~singly).double() @ members  # of each tile, for each row
        skipped = left.log().masked_fill(keep[:, :, own, :pooled], -math.inf)
        bias = torch.cat([bias, skipped], -1)
    scale = 1 / math.sqrt(q.shape[-1]) if problem.scale is None else problem.scale
    noise = noise_of_8_bits(problem) * abs(scale) if problem.precision == "int8" else None
    return attention(q, k, v, bias, scale, problem.q.dtype, rounded=pooled, noise=noise)


def noise_of_8_bits(problem: Problem) -> Tensor:
    """Standard deviation of a product of q and k, [batch, heads, rows], where both are 8-bit numbers.

    A query has a scale of its own, the keys of a video tile one for all, after the head's mean key is taken off; each
    entry is off by up to half a scale, evenly, and one does not depend on another.
    """
    tiling = problem.tiling
    q, k = (x.transpose(1, 2).double() for x in (problem.q, problem.k))
    tiles = [slots[slots >= 0] for slots in tiling.slots[: tiling.video_tiles]]
    k = k - torch.stack([k[:, :, tokens].mean(2) for tokens in tiles]).mean(0)[:, :, None]
    of_q = (q.abs().amax(-1) / 254) ** 2 / 3  # variances
    of_k = torch.stack([(k[:, :, tokens].abs().amax((-1, -2)) / 254) ** 2 / 3 for tokens in tiles], -1).amax(-1)
    k_size = torch.stack([(k[:, :, tokens] ** 2).sum(-1).amax(-1) for tokens in tiles], -1).amax(-1)
    variance = (q**2).sum(-1) * of_k[..., None] + of_q * k_size[..., None]
    return (variance + q.shape[-1] * of_q * of_k[..., None]).sqrt()
