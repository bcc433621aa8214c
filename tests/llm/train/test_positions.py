"""Positions of short texts far away: as written, as drawn, and in a batch."""

import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.llm import AnchorOffset, anchor_offset_positions
from draftdiff.llm.train.data import DistillationSet
from draftdiff.llm.train.positions import offset_positions
from tests.llm.tiny_models import prompt


def test_the_first_tokens_stay_and_the_others_move():
    assert offset_positions(8, 4, 100).tolist() == [0, 1, 2, 3, 104, 105, 106, 107]
    assert offset_positions(3, 0, 7).tolist() == [7, 8, 9]
    assert offset_positions(3, 4, 7).tolist() == [0, 1, 2]


def test_sinks_and_offset_are_drawn_from_all_that_are_allowed():
    generator = torch.Generator().manual_seed(0)
    drawn = set()
    for _ in range(600):
        positions = anchor_offset_positions(9, sinks=3, max_offset=5, generator=generator)
        offset = int(positions[-1]) - 8
        drawn.add((int((positions == torch.arange(9)).sum()) if offset else 0, offset))
    assert drawn == {(0, 0)} | {(sinks, offset) for sinks in range(4) for offset in range(1, 6)}
    with pytest.raises(UserError, match="max_offset must be a whole number from 0 on, got -1"):
        anchor_offset_positions(4, max_offset=-1)


def test_a_batch_has_positions_within_reach_and_long_rows_keep_theirs():
    rows = DistillationSet([prompt(n)[0] for n in (20, 7)], [torch.ones(n, dtype=torch.bool) for n in (20, 7)])
    torch.manual_seed(0)
    far = 0
    for _ in range(20):
        batch = AnchorOffset(reach=50, longest=10)([rows[0], rows[1]])
        assert batch["position_ids"][0].tolist() == list(range(20))
        assert batch["position_ids"].shape == batch["input_ids"].shape and int(batch["position_ids"].max()) < 50
        far = max(far, int(batch["position_ids"][1, -1]))
    assert far > 40
