"""The figures that say what a selection is worth."""

import torch

from draftdiff.core import quality
from draftdiff.core.grid import LatentGrid, tiling_for


def test_density_counts_token_pairs_not_tiles():
    tiling = tiling_for(LatentGrid(1, 8, 10), (1, 8, 8), 64)  # tiles of 64 and 16 tokens
    keep = torch.tensor([[[[True, False], [False, True]]]])
    torch.testing.assert_close(quality.density(keep, tiling), torch.tensor([[(64**2 + 16**2) / 80**2]]))


def test_drafted_mass_is_what_the_map_gives_to_the_kept_tiles():
    probabilities = torch.tensor([[[[0.7, 0.3], [0.4, 0.6]], [[0.1, 0.9], [0.5, 0.5]]]])
    keep = torch.tensor([[[[True, False], [True, True]], [[False, False], [False, True]]]])
    torch.testing.assert_close(quality.drafted_mass(probabilities, keep), torch.tensor([[0.85, 0.25]]))
