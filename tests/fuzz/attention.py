"""Random attention calls: every backend against fp64, and what must hold of any selection and any input."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

from draftdiff.attention import attend as attend_module
from draftdiff.attention.attend import attend
from draftdiff.attention.rule import Rule
from draftdiff.core.budget import Budget
from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError
from draftdiff.kernels.block_sparse import block_sparse_attention, block_sparse_attention_lse, unavailable
from draftdiff.video.attention import draft_attention
from draftdiff.video.config import DraftAttentionConfig
from tests.fuzz.engine import Case, Family
from tests.oracle import attention_of, reads

CPU = torch.device("cpu")
# In two hundred cases.
OFTEN = {"cpu": 95, "torch": 70, "reference": 33, "flex": 1, "triton": 1}
BACKENDS = [name for name, times in OFTEN.items() for _ in range(times)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "channels first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every other token": lambda x: torch.stack([x, x], dim=2)[:, :, 0],
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one item expanded": lambda x: x[:1].expand(x.shape),
    "one head expanded": lambda x: x[:, :, :1].expand(x.shape),
}


@dataclass(frozen=True, repr=False)
class AttentionCase(Case):
    """A call of `draft_attention`; what its fields mean is there and in its config.

    valid: text tokens of each item that are no padding, None for no mask.  loud: what q is multiplied by.
    poison: (tensor, value, place as a share of all its numbers).  only_video: text first, without queries of its own.
    gradient: also through the op that has one.
    """

    seed: int
    backend: str
    grid: tuple[int, int, int]
    dtype: str = "float32"
    batch: int = 1
    heads: int = 1
    head_dim: int = 32
    text: int = 0
    lead: int = 0
    valid: tuple[int, ...] | None = None
    only_video: bool = False
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    loud: float = 1.0
    scale: float | None = None
    selection: str = "draft"
    tokens: float = 0.0
    sparsity: float = 0.5
    head_weights: tuple[float, ...] = ()
    tail: bool = True
    tile: tuple[int, int, int] | None = None
    block_size: int | None = None
    poison: tuple[str, float, float] | None = None
    gradient: bool = False

    @property
    def config(self) -> DraftAttentionConfig:
        return DraftAttentionConfig(
            sparsity=Budget(self.sparsity, heads=self.head_weights) if self.head_weights else self.sparsity,
            selection=self.selection,
            tokens=self.tokens,
            tail=self.tail,
            tile=self.tile,
            block_size=self.block_size,
            backend=self.backend,
        )


def _shares(least: float, most: float) -> st.SearchStrategy[float]:
    """Plain numbers: with those below the smallest normal one a processor takes a hundred times as long."""
    return st.integers(math.ceil(least * 1000), math.floor(most * 1000)).map(lambda n: n / 1000)


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    backend = draw(st.sampled_from(BACKENDS))
    tiny = backend == "triton"
    most = {"triton": 70, "flex": 150}.get(backend, 300)
    sizes = [1, 1, 1]
    for axis in draw(st.permutations(range(3))):
        room = most // math.prod(sizes)
        sizes[axis] = draw(st.integers(1, room) | st.integers(1, min(room, 16)))
    batch = 1 if tiny else draw(st.integers(1, 2))
    heads = 1 if tiny else draw(st.integers(1, 3))
    text = draw(st.just(0) | st.integers(0, 20) | st.integers(0, 20 if tiny else 140))
    lead = draw(st.sampled_from([0, text]) | st.integers(0, text))
    sides = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
    selection = draw(st.sampled_from(["draft", "draft", "error", "upstream", "full"]))
    may_be_single = selection in ("draft", "error")
    tile = draw(st.none() | st.tuples(sides, sides, sides).filter(lambda t: math.prod(t) in range(16, 65)))
    block_size = draw(st.sampled_from([None, 128] if tile is None and selection == "upstream" else [None, 64, 128]))
    grid = LatentGrid(sizes[0], sizes[1], sizes[2])
    box, slots = Rule(selection=selection, tile=tile, block_size=block_size).tile_for(grid)
    assume(
        slots * math.prod(math.ceil(n / t) for n, t in zip(grid.shape, box)) <= 2048
    )  # thin grids are mostly padding
    masked = text > 0 and draw(st.booleans())
    share = st.sampled_from([0.0, 0.5, 0.9, 0.99]) | _shares(0, 0.999)
    weights = st.tuples(*[_shares(0.05, 4.0)] * heads)
    values = st.sampled_from([math.nan, math.nan, math.inf, -math.inf])
    return AttentionCase(
        seed=draw(st.integers(0, 2**20)),
        backend=backend,
        grid=grid.shape,
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16", "float64"])),
        batch=batch,
        heads=heads,
        head_dim=draw(
            st.sampled_from([32, 64, 128, 32, 64, 96]) | st.sampled_from([1, 3, 8, 16, 20, 40, 48, 80, 96, 160])
        ),
        text=text,
        lead=lead,
        gradient=draw(st.sampled_from([False] * 9 + [True])),
        valid=draw(st.tuples(*[st.integers(0, text)] * batch)) if masked else None,
        only_video=lead == text and draw(st.booleans()),
        layouts=draw(st.tuples(*[st.just("contiguous") | st.sampled_from(list(LAYOUTS))] * 3)),
        loud=draw(st.sampled_from([1.0, 1.0, 0.0, 1e-3, 4.0, 30.0])),
        scale=draw(st.none() | st.sampled_from([0.0, -0.2, 1.0, 20.0]) | _shares(-2, 2)),
        selection=selection,
        tokens=draw(st.sampled_from([0.0, 0.125, 0.5]) | _shares(0, 0.999)) if may_be_single else 0.0,
        sparsity=draw(share),
        head_weights=draw(st.just(()) | weights),
        tail=draw(st.booleans()),
        tile=tile,
        block_size=block_size,
        poison=draw(st.none() | st.none() | st.tuples(st.sampled_from("qkv"), values, _shares(0, 0.999))),
    )


@contextmanager
def _seen():
    """The problems that reach a kernel inside."""
    problems = []

    def keep(problem, *, backend):
        problems.append(problem)
        return block_sparse_attention(problem, backend=backend)

    with mock.patch.object(attend_module, "block_sparse_attention", keep):
        yield problems


def _inputs(case: AttentionCase) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    generator = torch.Generator().manual_seed(case.seed)
    tokens = math.prod(case.grid) + case.text
    shape = (case.batch, tokens, case.heads, case.head_dim)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float32) for _ in "qkv"]
    tensors[0] *= case.loud
    tensors = [LAYOUTS[layout](x.to(getattr(torch, case.dtype))) for x, layout in zip(tensors, case.layouts)]
    if case.only_video:
        tensors[0] = tensors[0][:, case.text :]
    mask = None if case.valid is None else torch.arange(case.text) < torch.tensor(case.valid)[:, None]
    return tensors, mask


def _call(case: AttentionCase, tensors, mask):
    """Output and the problem that the kernel got."""
    with _seen() as problems:
        if case.only_video:
            density = case.config.budget.density(1, case.heads)[0]
            given = {"grid": LatentGrid(*case.grid), "lead": case.lead, "text_mask": mask, "scale": case.scale}
            out, _ = attend(*tensors, density, case.config.rule, **given)
        else:
            given = {"lead": case.lead, "text_mask": mask, "scale": case.scale}
            out = draft_attention(*tensors, grid=case.grid, config=case.config, **given)
    return out, problems[0]


def check_attention(case: AttentionCase) -> str:
    """Raise unless a case is attention; returns its backend."""
    tensors, mask = _inputs(case)
    reason = unavailable(case.backend, CPU, tensors[0].dtype, case.head_dim)
    if reason:
        with pytest.raises(UserError) as error:
            _call(case, tensors, mask)
        assert reason in str(error.value) and "\n" not in str(error.value)
        return f"{case.backend} refused"
    before = [x.clone() for x in tensors]
    out, problem = _call(case, tensors, mask)
    assert out.shape == tensors[0].shape and out.dtype == tensors[0].dtype
    assert all(torch.equal(x, y) for x, y in zip(tensors, before)), "inputs were changed"
    _check_keep(case, problem)
    _check_values(case, out, problem)
    if case.gradient and not case.only_video:
        _check_gradient(case, tensors, mask, out)
    if case.poison is not None:
        _check_poison(case, tensors, mask, out)
        return f"{case.backend} poisoned"
    return case.backend


def _check_keep(case: AttentionCase, problem) -> None:
    tiling = problem.tiling
    video = problem.keep[:, :, : tiling.video_tiles, : tiling.video_tiles]
    density = case.config.budget.density(1, case.heads)[0]
    if case.selection == "draft":
        budget = (density * tiling.video_tiles**2).clamp(min=tiling.video_tiles).long()
        assert bool((video.sum((-1, -2)) <= budget).all()), "more kept than the budget"
        assert bool(video.diagonal(dim1=-2, dim2=-1).all()), "a tile that does not read itself"
    if case.selection == "error":
        single = 0 if problem.tokens is None else problem.tokens.shape[-1]
        most = ((density - single / tiling.grid.tokens).where(density < 1, density) * tiling.video_tiles).clamp(min=1)
        kept = video.sum(-1)
        assert bool((kept.amax(-1) < most + 1).all()), "more kept in a row than the budget"
        assert bool((kept.sum(-1) <= most * tiling.video_tiles + 1e-3).all()), "more kept than the budget"
        assert bool(video.diagonal(dim1=-2, dim2=-1).all()), "a tile that does not read itself"
    if problem.tokens is not None:
        _check_tokens(case, problem, video)
    if case.selection == "full" or bool((density == 1).all()):
        assert bool(video.all()), "not all kept at density 1"
    if not case.only_video:
        rest = problem.keep.clone()
        rest[:, :, : tiling.video_tiles, : tiling.video_tiles] = True
        assert bool(rest.all()), "text is not kept"


def _check_tokens(case: AttentionCase, problem, video) -> None:
    tiling, tokens = problem.tiling, problem.tokens
    found = tokens >= 0
    assert tokens.shape[-1] == round(case.config.rule.single * tiling.grid.tokens)
    tiles = problem.tile_of[tokens.clamp(min=0)]
    assert bool((tiles < tiling.video_tiles)[found].all()), "a single token of the text"
    assert not bool((video.gather(-1, tiles.clamp(max=tiling.video_tiles - 1)) & found).any()), "read twice"
    once = torch.zeros(*tokens.shape[:3], tiling.tokens + 1)
    once.scatter_add_(-1, tokens.where(found, tiling.tokens), torch.ones(tokens.shape))
    assert float(once[..., :-1].amax()) <= 1, "a token is taken twice"


def _check_values(case: AttentionCase, out, problem) -> None:
    absent = problem.q.shape[1] - out.shape[1]
    whole, lse = block_sparse_attention_lse(problem, backend=case.backend)
    assert torch.equal(whole[:, absent:], out)
    expected = attention_of(problem)
    expected.after(absent).check(*_of_rows(absent, whole, lse))  # what nobody asked for is undefined
    if bool(problem.keep.all()):
        valid = problem.text_mask
        if valid is not None:
            seen = torch.ones(len(valid), problem.tiling.tokens, dtype=torch.bool)
            seen[:, problem.tiling.order[problem.tiling.grid.tokens :]] = valid
            valid = seen[:, None, None]
        q, k, v = (x.double().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=valid, scale=case.scale)
        assert float((dense - expected.out).abs().max()) <= 1e-9 * (1 + float(dense.abs().max()))
    if case.batch > 1:
        last = slice(case.batch - 1, case.batch)
        tail = problem.tail and replace(
            problem.tail, k_mean=problem.tail.k_mean[last], v_mean=problem.tail.v_mean[last]
        )
        parts = {name: getattr(problem, name)[last] for name in ("q", "k", "v", "keep")}
        parts["tokens"] = None if problem.tokens is None else problem.tokens[last]
        text_mask = None if problem.text_mask is None else problem.text_mask[last]
        alone = replace(problem, **parts, tail=tail, text_mask=text_mask)
        found, found_lse = block_sparse_attention_lse(alone, backend=case.backend)
        attention_of(alone).after(absent).check(*_of_rows(absent, found, found_lse))


def _of_rows(start: int, out, lse):
    """Both from a token on, as the oracle has them."""
    return out.transpose(1, 2)[:, :, start:], lse.transpose(1, 2)[:, :, start:]


def _check_gradient(case: AttentionCase, tensors, mask, clean) -> None:
    """The op gives what the call without gradients gives, and numbers as gradients."""
    parts = [x.detach().requires_grad_() for x in tensors]
    given = {"lead": case.lead, "text_mask": mask, "scale": case.scale}
    out = draft_attention(*parts, grid=case.grid, config=case.config, **given)
    assert torch.equal(out, clean)
    for gradient, x in zip(torch.autograd.grad(out.sum(), parts), parts):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        assert case.dtype == "float16" or bool(gradient.isfinite().all())


def _check_poison(case: AttentionCase, tensors, mask, clean) -> None:
    """What a value that is not finite reaches."""
    which, value, place = case.poison
    index = "qkv".index(which)
    x = tensors[index].clone()
    at = [int(i) for i in np.unravel_index(int(place * x.numel()), x.shape)]
    item, token, head, feature = at
    x[tuple(at)] = value
    poisoned = [x if i == index else y for i, y in enumerate(tensors)]
    out, problem = _call(case, poisoned, mask)
    others = torch.ones(case.batch, case.heads, dtype=torch.bool)
    others[item, head] = False
    same = (out == clean).transpose(1, 2).flatten(2).all(-1)
    assert bool(same[others].all()), "another head or item has changed"
    _check_keep(case, problem)

    absent = problem.q.shape[1] - out.shape[1]
    reading = reads(problem)[item, head, absent:]
    found = out[item, :, head]
    assert not bool(found[~reading.any(-1)].any()), "a row that reads nothing is not 0"
    if which == "q":
        spoilt = torch.zeros(out.shape[1], dtype=torch.bool)
        spoilt[token] = True
    else:
        spoilt = reading[:, token].clone()
    spoilt &= reading.any(-1)
    bad = ~found.isfinite()
    if case.backend == "flex" and which == "v":  # unfused: within its feature it reaches the whole head
        assert not bool(bad.any(0)[torch.arange(case.head_dim) != feature].any())
        assert bool(bad[spoilt, feature].all())
        return
    assert not bool(bad[~spoilt].any()), "a row that does not read it is not finite"
    if which == "v":
        assert not bool(bad[:, torch.arange(case.head_dim) != feature].any()), "another feature is not finite"
        assert bool(bad[spoilt, feature].all()), "hidden from a row that reads it"
    elif math.isnan(value):
        assert bool(found[spoilt].isnan().all()), "a NaN is hidden from a row that reads it"


ATTENTION = Family("attention", attention_cases(), check_attention, batch=100)
