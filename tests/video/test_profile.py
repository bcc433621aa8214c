"""A profile is what was written, and a file that is none, or for another model, is refused in one line."""

import json

import pytest

from draftdiff import DraftAttentionConfig
from draftdiff.core.budget import Budget
from draftdiff.errors import UserError
from draftdiff.video.config import MadeFor
from draftdiff.video.patch import check, enable
from draftdiff.video.profile import Profile
from tests.video.model_cases import tiny_wan

SHAPE = MadeFor("WanTransformer3DModel", 2, 2)
CONFIG = DraftAttentionConfig(
    Budget(0.0, heads=(((0.1, 0.35), (1.0, 1.0)), ((0.2, 0.05), (0.5, 0.7)))),
    selection="error",
    tokens=0.0625,
    tile=(1, 4, 4),
    dense_steps=0,
    dense_layers=(1,),
    dense_above=1.0,
    min_tokens=0,
    made_for=SHAPE,
)
PROFILE = Profile(CONFIG, (3, 8, 8), 10, "35 dB", {"psnr": [35.5, 36.0]}, {"torch": "2.13", "triton": None})


@pytest.fixture
def file(tmp_path):
    PROFILE.write(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_what_was_written_is_read_back(file):
    assert Profile.read(file) == PROFILE
    assert DraftAttentionConfig.from_profile(file) == CONFIG
    assert json.loads(file.read_text())["draftdiff_profile"] == 1
    assert [path.name for path in file.parent.iterdir()] == ["profile.json"]


def test_a_profile_is_taken_for_the_transformer_that_it_is_for_alone(file):
    config = DraftAttentionConfig.from_profile(file)
    enable(tiny_wan(layers=2)(), config)
    with pytest.raises(UserError) as error:
        check(tiny_wan(layers=3)(), config)
    assert str(error.value) == (
        "the profile was tuned for WanTransformer3DModel with 2 layers of 2 heads, "
        "not for WanTransformer3DModel with 3 layers of 2 heads"
    )


def test_a_profile_for_another_class_is_refused_however_alike_its_layers_are(file):
    content = json.loads(file.read_text()) | {"transformer": "MochiTransformer3DModel"}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="tuned for MochiTransformer3DModel with 2 layers of 2 heads, not for WanTr"):
        enable(tiny_wan(layers=2)(), DraftAttentionConfig.from_profile(file))


def test_a_profile_of_a_newer_draftdiff_is_told_as_such(file):
    file.write_text(json.dumps({"draftdiff_profile": 2}))
    with pytest.raises(UserError, match="is a profile of format 2; this draftdiff reads formats up to 1"):
        Profile.read(file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"draftdiff_profile": True}, "draftdiff_profile is not 1"),
        ({"draftdiff_profile": None}, "draftdiff_profile is not 1"),
        ({"layers": "two"}, "layers is missing or no int"),
        ({"config": {"speed": 11}}, "config has no field speed"),
        ({"config": {"sparsity": 2.0}}, "sparsity must be at least 0 and below 1, got 2.0"),
        ({"config": {"sparsity": {"sparsity": 0.5, "rows": []}}}, "its budget has no rows"),
        ({"config": {"sparsity": {"heads": [[0.1], [0.2, 0.3]]}}}, "budget weights must be a tuple of numbers"),
        ({"config": {"sparsity": {"heads": [-1.0]}}}, "budget weights must be positive"),
        ({"config": {"made_for": "x"}}, "made_for must be of type"),
        ({"grid": [3, "x", 8]}, "grid is not three whole numbers"),
    ],
)
def test_a_file_with_a_wrong_value_names_it_in_one_line(file, change, told):
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        DraftAttentionConfig.from_profile(file)
    assert told in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cut", range(0, 1000, 37))
def test_a_damaged_file_is_one_line(file, cut):
    whole = file.read_bytes()
    file.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(UserError) as error:
        Profile.read(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no profile at"):
        DraftAttentionConfig.from_profile(tmp_path / "nothing.json")
