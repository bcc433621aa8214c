"""Where tokens stand, where it is not as usual."""

import types

import pytest
import torch

from draftdiff.core.grid import LatentGrid
from draftdiff.integrations.call import Places
from draftdiff.integrations.comfyui.places import find

GRID = LatentGrid(5, 8, 11)
LATENT = torch.zeros(1, 4, 5, 15, 22)


def model(name: str, base: str | None = None, **attributes):
    bases = () if base is None else (type(base, (), {}),)
    return type(name, bases, {"patch_size": (1, 2, 2), "patchifier": None, **attributes})()


def where(of, tokens, options=None, **arguments):
    return find(of, {"x": LATENT, **arguments}, options or {}, tokens)


def test_gaps_are_what_is_in_no_grid():
    places = Places(LatentGrid(1, 2, 2), 3, ((7, LatentGrid(1, 1, 2)), (0, LatentGrid(1, 1, 1))))
    assert places.gaps(12) == [(0, 0), (1, 3), (7, 7), (9, 12)]


def test_a_subclass_is_found_by_its_base():
    assert where(model("VaceWanModel", "WanModel"), 440) == Places(GRID)


def test_whatever_has_the_frame_size_of_the_video_counts_as_frames_of_wan():
    wan = model("WanModel", ref_conv=object())
    assert where(wan, 528, reference_latent=torch.zeros(1, 4, 15, 22)) == Places(LatentGrid(6, 8, 11))
    assert where(wan, 880, {"grid_sizes": torch.Size([5, 8, 11])}) == Places(LatentGrid(10, 8, 11))
    concat = torch.zeros(1, 4, 2, 15, 22)
    assert where(wan, 616, time_dim_concat=concat) == Places(LatentGrid(7, 8, 11))


def test_other_tokens_of_wan_stand_behind_the_video_but_for_its_reference():
    wan = model("WanModel", ref_conv=object())
    assert where(wan, 447) == Places(GRID)
    assert where(wan, 450, reference_latent=torch.zeros(1, 4, 2, 13)) == Places(GRID, 7)
    assert where(model("WanModel", ref_conv=None), 447, reference_latent=torch.zeros(1, 4, 2, 14)) == Places(GRID)


def test_shorter_calls_are_not_over_the_video():
    for name in ("WanModel", "Flux", "HunyuanVideo", "LTXVModel"):
        assert where(model(name), 439) is None


def test_flux_reads_its_patch_size_as_a_number():
    flux = model("Flux", patch_size=2)
    assert find(flux, {"x": torch.zeros(1, 16, 20, 31), "ref_latents": None}, {}, 165) == Places(
        LatentGrid(1, 10, 16), 5
    )


def test_tokens_that_do_not_add_up_are_told():
    reference = [torch.zeros(1, 4, 15, 22)]
    assert "and its references" in where(model("Flux"), 445, ref_latents=reference)
    assert "its reference's 1x8x11" in where(model("HunyuanVideo"), 445, ref_latent=torch.zeros(1, 4, 1, 15, 22))
    ltx = model("LTXVModel", patch_size=None, patchifier=types.SimpleNamespace(patch_size=(1, 2, 2)))
    assert where(ltx, 441) == "441 tokens are not those of the video 5x8x11"
    assert where(ltx, 440) == Places(GRID)


def test_the_video_of_several_streams_is_the_first():
    ltx = model("LTXAVModel", "LTXVModel")
    assert find(ltx, {"x": [LATENT, torch.zeros(1, 8, 30, 16)]}, {}, 440) == Places(GRID)


@pytest.mark.parametrize(("tokens", "found"), [(460, Places(GRID, 20)), (459, None)])
def test_minimax_h3_tells_its_layout(tokens, found):
    segments = [(0, 12, "text"), (12, 20, "audio"), (20, 460, "video")]
    layout = types.SimpleNamespace(seq_len=460, signature=(12, 5, 16, 22, 4), segments=segments)
    assert where(model("MiniMaxH3Model"), tokens, {"minimax_h3_layout": layout}) == found


def test_a_layout_that_does_not_hold_together_is_told():
    layout = types.SimpleNamespace(seq_len=460, signature=(12, 5, 16, 22, 4), segments=[(0, 460, "text")])
    assert "is not where its segments say" in where(model("MiniMaxH3Model"), 460, {"minimax_h3_layout": layout})
