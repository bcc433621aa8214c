"""A result as HTML: clips that are inside the page, figures, charts, and nothing of a prompt that is read as HTML."""

import base64
import re
from dataclasses import replace

import numpy as np
import pytest

from draftdiff.ui import view
from tests.ui.conftest import new_session


@pytest.fixture(scope="module")
def shown(pipeline, asked):
    return new_session(pipeline).run(replace(asked, prompt='a red <b onclick="x">circle'))


def test_a_clip_and_a_picture_are_inside_the_page(shown):
    html = view.clips(shown, 8)
    videos = re.findall(r'<video class="(\w+)" src="data:video/mp4;base64,([^"]+)"', html)
    assert [name for name, _ in videos] == ["dense", "sparse", "difference"]
    assert all(base64.b64decode(data)[4:8] == b"ftyp" for _, data in videos)
    assert 'data-frames="9" data-fps="8"' in html and "--ratio:128/128" in html
    assert 'download="a-red-b-onclick-x-circle-dense.mp4"' in html
    still = replace(
        shown,
        dense=replace(shown.dense, frames=shown.dense.frames[:1]),
        sparse=replace(shown.sparse, frames=shown.sparse.frames[:1]),
    )
    html = view.clips(still, 8)
    assert html.count('src="data:image/png;base64,') == 3
    assert "<video" not in html and "moment" not in html


def test_the_difference_is_shown_larger(shown, monkeypatch):
    seen = []
    monkeypatch.setattr(view, "_encoded", lambda frames, fps: seen.append(frames) or "data:")
    view.clips(shown, 8)
    dense, sparse, apart = (frames.astype(int) for frames in seen)
    assert np.array_equal(apart, np.minimum(255, 8 * np.abs(dense - sparse)))


def test_figures_tell_what_was_measured(shown):
    html = view.figures(shown)
    assert f"<b>{shown.speedup:.2f}x</b>" in html and f"<b>{shown.attention_speedup:.2f}x</b>" in html
    assert f"<b>{shown.psnr:.1f} dB</b>" in html and f"<b>{shown.ssim:.3f}</b>" in html
    assert "2 sparse, 1 dense steps" in html and "<ul" not in html
    assert "<li>1 &lt; 2</li>" in view.figures(replace(shown, notes=["1 < 2"]))


def test_where_shows_a_map_and_both_times(shown):
    html = view.where(shown)
    assert html.count("<svg") == 3 and "sparsity 0.5" in html
    for timing in (shown.dense.timing, shown.sparse.timing):
        assert f"{timing.seconds:.3g} s" in html
    named = replace(shown, asked=replace(shown.asked, sparsity=None))
    assert "profile" in view.where(named) and "profile" in view.clips(named, 8)


def test_nothing_of_the_prompt_is_html(shown):
    assert "<b onclick" not in view.clips(shown, 8) + view.figures(shown) + view.where(shown)
