"""The page holds everything in one file, and its charts put things where they belong."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from draftdiff import DraftAttentionConfig
from draftdiff.compare.charts import bars, heat_map, scatter, ticks
from draftdiff.compare.clips import STRIP, contact_sheet, file_name, side_by_side
from draftdiff.compare.metrics import Quality
from draftdiff.compare.timing import Timing
from draftdiff.compare.video import Clip, SettingResult, VideoComparison
from draftdiff.compare.video_page import page, write_videos

PROMPT = "a <b>bold</b> circle & a square"


def comparison(frames: int) -> VideoComparison:
    clip = np.random.default_rng(0).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)
    seen = {
        "density": 0.5,
        "missed_mass": 0.1,
        "sparse_steps": 1,
        "selection": "error",
        "tokens": 128,
        "density_by_step_and_layer": [[1.0, 0.5], [None, 0.5]],
    }
    dense = SettingResult("dense", None, [[Timing(2.0)]], [Clip(clip, [])])
    dense.clocked = [[Timing(2.0, {"dense attention": 1.0, "dense forward": 1.5})]]
    timing = Timing(1.6, {"draft": 0.1, "select": 0.1, "kernel": 0.4, "sparse forward": 1.1})
    quality = Quality(30.0, 0.9, 91.0, None, 0.1, {"lpips": "needs <something>"})
    sparse = SettingResult(
        "half & half",
        DraftAttentionConfig(),
        [[timing]],
        [Clip(clip, [seen], quality, {"shape": True, "colour": False})],
    )
    return VideoComparison(
        "WanPipeline", [PROMPT], 0, {"num_frames": frames}, [dense, sparse], about={"device": "a <CPU>"}
    )


@pytest.fixture(params=[3, 1], ids=["video", "image"])
def written(request, tmp_path):
    result = comparison(request.param)
    write_videos(result, tmp_path / "videos")
    return result, page(result, tmp_path / "videos"), tmp_path / "videos"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "rect", "line", "circle", "image", "small"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("rect", "circle", "small", "line", "image"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_loads_nothing_from_elsewhere(written):
    tags = Tags(written[1])
    links = [attrs[name] for _, attrs in tags.found for name in ("src", "href") if name in attrs]
    assert links and all(link.startswith("data:") for link in links)
    assert "http" not in written[1] and not tags.open


def test_the_page_embeds_the_files_of_the_folder(written):
    result, text, videos = written
    for setting in result.results:
        data = (videos / file_name(0, setting.name, len(setting.clips[0].frames))).read_bytes()
        assert base64.b64encode(data).decode() in text


def test_the_page_shows_names_and_words_as_they_are(written):
    words = " ".join(Tags(written[1]).words)
    for expected in (PROMPT, "half & half", "a <CPU>", "needs <something>", "wrong: colour", "30.0 dB", "1.25x", "50%"):
        assert expected in words


def test_a_clip_of_one_frame_is_an_image(tmp_path):
    write_videos(comparison(1), tmp_path / "videos")
    assert {file.suffix for file in (tmp_path / "videos").iterdir()} == {".png"}


def test_side_by_side_puts_each_clip_under_its_name():
    clips = {"left": np.full((2, 32, 48, 3), 10, np.uint8), "right": np.full((2, 32, 48, 3), 200, np.uint8)}
    both = side_by_side(clips)
    _, height, width, _ = both.shape
    assert height % 2 == 0 and width % 2 == 0 and width == 2 * 48 * 6
    assert (both[:, 40:, : width // 2] == 10).all() and (both[:, 40:, width // 2 :] == 200).all()
    labels = both[0, :34].astype(int)
    assert labels[:, : width // 2].std() > 5 and labels[:, width // 2 :].std() > 5
    assert not np.array_equal(labels[:, : width // 2], labels[:, width // 2 :])


def test_side_by_side_stays_within_its_width():
    clips = {str(i): np.zeros((1, 100, 1000, 3), np.uint8) for i in range(6)}
    assert side_by_side(clips, widest=1200).shape[2] == 1200


def test_file_names_are_plain():
    assert file_name(0, "sparsity 0.5", 9) == "01-sparsity-0.5.mp4"
    assert file_name(11, "../Über/uns", 1) == "12-ber-uns.png"


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.9), (0.97, 1.01), (30, 30), (0.001, 0.0042), (-3, 250)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert np.allclose(np.diff(found), found[1] - found[0])


def positions(svg: str, tag: str, *names: str) -> list[tuple[float, ...]]:
    found = []
    for attributes in re.findall(rf"<{tag} ([^>]*)>", svg):
        values = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        if all(name in values for name in names):
            found.append(tuple(float(values[name]) for name in names))
    return found


def test_the_scatter_puts_faster_to_the_right_and_better_above():
    speed = {"median": 1.2, "min": 1.1, "max": 1.3}
    faster = {"median": 1.6, "min": 1.5, "max": 1.7}
    (x1, y1), (x2, y2) = positions(
        scatter([("a", speed, 40.0), ("b", faster, 30.0)], "PSNR", 2.0), "circle", "cx", "cy"
    )
    assert x2 > x1 and y2 > y1  # y grows downwards
    assert "ceiling 1.80x" in scatter([("a", speed, 40.0)], "PSNR", 1.8)
    assert "ceiling" not in scatter([("a", speed, 40.0)], "PSNR", 50.0)


def test_bars_are_as_long_as_their_seconds():
    svg = bars([("dense", {"attention": 3.0, "rest": 1.0}), ("sparse", {"attention": 1.0, "rest": 1.0})])
    lengths = [width for width, height in positions(svg, "rect", "width", "height") if height == 24]
    assert np.allclose(np.array(lengths) / lengths[1], [3, 1, 1, 1], atol=0.01)


def test_the_heat_map_has_a_pixel_per_step_and_layer():
    data = re.search(r"base64,([^\"]+)", heat_map("half", [[1.0, 0.0, None], [0.5, 0.5, 0.5]]))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.group(1)))).convert("RGB")).astype(int)
    assert image.shape == (2, 3, 3)
    assert image[0, 0].sum() < image[1, 0].sum() < image[0, 1].sum()  # denser is darker
    assert len(set(image[0, 2])) == 1 and (image[1] == image[1, 0]).all()


def test_a_contact_sheet_shows_the_first_and_the_last_frame_under_one_row_of_names():
    clips = {name: np.random.default_rng(i).integers(0, 255, (5, 64, 64, 3), np.uint8) for i, name in enumerate("ab")}
    together = side_by_side(clips)
    sheet = contact_sheet(together, moments=2)
    height = together.shape[1]
    assert sheet.shape == (2 * height - STRIP, together.shape[2], 3)
    assert np.array_equal(sheet[:height], together[0])
    assert np.array_equal(sheet[height:], together[-1, STRIP:])


def test_names_in_the_scatter_do_not_cover_each_other():
    speed = {"median": 1.2, "min": 1.1, "max": 1.3}
    svg = scatter([(name * 5, speed, 40.0 + i / 10) for i, name in enumerate("abc")] + [("far", speed, 60.0)], "PSNR")
    heights = [float(y) for y, name in re.findall(r'y="([\d.]+)"[^>]*>(\w+)<', svg) if name[0] in "abc"]
    assert len(heights) == 3 and min(np.diff(sorted(heights))) >= 13
