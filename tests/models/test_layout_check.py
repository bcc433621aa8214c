"""`draftdiff doctor --model`: three facts about each transformer of a saved folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from draftdiff.cli import main
from draftdiff.models.layout_check import check_model
from draftdiff.video.layouts import LAYOUTS, layout_name
from tests.cli.one_line import fails_in_one_line
from tests.tiny_pipeline import tiny_wan_pipeline
from tests.video.model_cases import MODEL_CASES

FACTS = ["all kept equals dense", "sparse is sparse", "disabled it is what it was"]
CPU = {"device": "cpu", "dtype": "float32"}
# A model that the table does not have, saved as diffusers saves its own.
MODULE = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from draftdiff import Layout


class OddModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width=32):
        super().__init__()
        layers = [Attention(width, heads=2, dim_head=16, processor=AttnProcessor2_0()) for _ in range(2)]
        self.blocks = torch.nn.ModuleList(layers)

    def forward(self, hidden_states, timestep):
        tokens = hidden_states.flatten(1, 3)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return (tokens.view_as(hidden_states),)


def grid(model, arguments):
    return tuple(arguments["hidden_states"].shape[1:4])


def example(model):
    latents = torch.randn(1, 4, 12, 12, model.config.width, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": latents, "timestep": torch.tensor([500.0])}


row = Layout("Odd", r"blocks\\.\\d+", grid, route="sdpa", example=example)
without_example = Layout("Odd", r"blocks\\.\\d+", grid, route="sdpa")
blind = Layout("Odd", r"blocks\\.\\d+", lambda model, arguments: None, route="sdpa", example=example)
number = 3
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    tiny_wan_pipeline().save_pretrained(place / "pipeline")
    for name in ("flux", "lumina2", "z_image"):
        if case := next((case for case in MODEL_CASES if case.name == name), None):
            case.build().save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def odd(folders, tmp_path_factory):
    """Where the module lies, and the folder of its model."""
    place = tmp_path_factory.mktemp("code")
    (place / "odd_model.py").write_text(MODULE)
    names: dict = {"__name__": "odd_model"}
    exec(compile(MODULE, "odd_model", "exec"), names)
    torch.manual_seed(0)
    names["OddModel"]().save_pretrained(folders / "odd")
    return place


@pytest.mark.parametrize("name", ["pipeline", "pipeline/transformer", "flux"])
def test_a_right_row_shows_three_facts(folders, name):
    found = check_model(str(folders / name), **CPU)
    assert [finding.fact for finding in found] == FACTS
    assert all(finding.holds for finding in found), "\n".join(map(str, found))


def test_a_wrong_row_shows_in_the_facts(folders, monkeypatch):
    name = layout_name(MODEL_CASES[0].build())
    monkeypatch.setitem(LAYOUTS, name, replace(LAYOUTS[name], grid=lambda model, arguments: (1, 5, 7)))
    assert [finding.holds for finding in check_model(str(folders / "pipeline"), **CPU)] == [
        True,
        False,
        True,
    ]  # all is dense


def test_a_row_of_ones_own_comes_from_a_module(folders, odd, monkeypatch, capsys):
    monkeypatch.chdir(odd)
    call = ["doctor", "--model", str(folders / "odd"), "--device", "cpu"]
    assert main([*call, "--layout", "odd_model:row", "--json"]) == 0
    assert [entry["fact"] for entry in json.loads(capsys.readouterr().out)] == FACTS
    assert "OddModel" not in LAYOUTS
    assert main([*call, "--layout", "odd_model:blind"]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("WRONG  OddModel: all kept") and third.startswith("ok     OddModel: disabled")
    assert "no sparse call" in second and "the grid of a call's tokens cannot be told" in second


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--layout", "odd_model:row"], "--layout is for --model"),
        (["--model", "{}/odd"], "is of class 'OddModel', which diffusers has not: give --layout"),
        (["--model", "{}/odd", "--layout", "odd_model:missing"], "must be module:NAME of a draftdiff.Layout"),
        (["--model", "{}/odd", "--layout", "odd_model:number"], "must name a draftdiff.Layout, got 'odd_model:number'"),
        (["--model", "{}/odd", "--layout", "odd_model:without_example"], "or `example` in its Layout"),
        (["--model", "{}"], "holds neither model_index.json nor config.json"),
        (["--model", "{}/z_image"], "cannot be called"),
    ],
)
def test_what_cannot_be_checked_is_told_in_one_line(folders, odd, monkeypatch, capsys, options, told):
    if "{}/z_image" in options and not (folders / "z_image").is_dir():
        pytest.skip("this version of diffusers has no Z-Image")
    monkeypatch.chdir(odd)
    options = [option.format(folders) for option in options]
    place = ["--device", "cpu"] if "--model" in options else []
    assert told in fails_in_one_line(capsys, "doctor", *options, *place)


def test_a_scheduler_is_no_model(folders, capsys):
    DDPMScheduler().save_pretrained(folders / "scheduler")
    (folders / "scheduler" / "config.json").write_text((folders / "scheduler" / "scheduler_config.json").read_text())
    fails_in_one_line(capsys, "doctor", "--model", folders / "scheduler", "--device", "cpu")
