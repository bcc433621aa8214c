"""A number that is added to the scores of a group of keys: against dense attention with the whole mask."""

import pytest
import torch

from draftdiff.attention.attend import attend, attend_op, packed_places
from draftdiff.attention.key_groups import MOST, KeyGroups
from draftdiff.attention.rule import Rule
from draftdiff.core.grid import LatentGrid
from tests.attention.test_attend import BACKENDS, close, dense, half, made

GRID = LatentGrid(2, 9, 11)
LEAD, TEXT = 30, 200  # text tiles with keys of one group, of several, and of none


def a_mask(batch=2):
    """Groups in front of the grid and behind it, not side by side, with another number for each query."""
    generator = torch.Generator().manual_seed(7)
    tokens = GRID.tokens + TEXT
    mask = torch.randn(batch, tokens, 1, generator=generator).expand(batch, tokens, tokens).clone()
    for keys in (slice(5, 25), slice(LEAD + GRID.tokens + 130, None, 2)):
        mask[..., keys] += 2 * torch.randn(batch, tokens, 1, generator=generator)
    mask[:, 3:, 2] -= 5000  # the numbers of LTX-2
    mask[:, LEAD, :] += 9000
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_everything_kept_is_dense_attention_with_the_mask(backend, batch):
    q, k, v = made(GRID.tokens + TEXT)
    mask = a_mask(batch)
    groups = KeyGroups.found_in(mask, LEAD)
    assert groups is not None and groups.bias.shape[-1] == 4
    out, _ = attend(q, k, v, half(), Rule("full", backend=backend), grid=GRID, lead=LEAD, groups=groups)
    close(out, dense(q, k, v, mask[:, None].double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stretches", [(), [(0, 40), (100, 300)]], ids=["all queries", "some"])
def test_groups_of_one_number_are_as_one_group(backend, stretches):
    q, k, v = made(GRID.tokens + TEXT)
    q = q if not stretches else torch.cat([q[:, start:stop] for start, stop in stretches], dim=1)
    of = torch.zeros(GRID.tokens + TEXT, dtype=torch.long)
    of[:10], of[-70:] = 1, 2
    groups = KeyGroups(of, torch.full((2, len(of), 3), 0.7))
    flags = torch.arange(TEXT).expand(2, -1) % 7 != 0
    given = {"grid": GRID, "lead": LEAD, "queries": stretches, "text_mask": flags}
    rule = Rule("error", single=0.06, backend=backend)
    out, stats = attend(q, k, v, half(), rule, groups=groups, **given)
    expected, same = attend(q, k, v, half(), rule, **given)
    close(out, expected.double())
    assert torch.equal(stats, same)


def test_gradients_are_those_of_dense_attention_with_the_mask():
    parts = [x.requires_grad_() for x in made(GRID.tokens + TEXT)]
    mask = a_mask(1)
    groups = KeyGroups.found_in(mask, LEAD)
    assert groups is not None
    given = (half(), None, packed_places(GRID.shape, LEAD), None, Rule("full").packed, groups.of, groups.bias)
    out, _ = attend_op(*parts, *given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, parts, weights)
    wide = [x.detach().double().requires_grad_() for x in parts]
    expected = torch.autograd.grad(dense(*wide, mask[:, None].double()), wide, weights.double())
    for gradient, wanted in zip(found, expected):
        close(gradient, wanted, times=64)
    torch.library.opcheck(attend_op, (*parts, *given), test_utils=("test_schema", "test_faketensor"))


def test_groups_are_the_keys_to_which_every_query_of_every_item_adds_the_same():
    mask = torch.zeros(2, 3, 6)
    mask[0, 1, [0, 3]], mask[1, 2, 5] = 1.0, -1.0
    groups = KeyGroups.found_in(mask, 2)
    assert groups is not None
    assert groups.of.tolist() == [1, 0, 0, 1, 0, 2]
    bias = groups.bias[..., groups.of]
    assert torch.equal(bias - bias[..., :1], mask - mask[..., :1]) and bool((bias.amax(-1) == 0).all())
    assert groups.is_first(1, LatentGrid(1, 1, 2)) and not groups.is_first(1, LatentGrid(1, 1, 3))


@pytest.mark.parametrize("fault", ["more groups than may be", "NaN", "infinity"])
def test_a_mask_that_is_more_has_no_groups(fault):
    mask = torch.zeros(1, 2, MOST + 1)
    if fault == "more groups than may be":
        mask[0, 1] = torch.arange(MOST + 1)
        assert KeyGroups.found_in(mask[..., :-1], 0) is not None
    else:
        mask[0, 1, 3] = float(fault)
    assert KeyGroups.found_in(mask, 0) is None
