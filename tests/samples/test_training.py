"""The loop of the training scripts: clock, checkpoints, running average, settings; and phases of the models."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from draftdiff.errors import UserError
from draftdiff.llm.workloads.named import WORKLOADS
from draftdiff.pipelines.mini.video import load_mini_video

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "training"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    return importlib.import_module


@pytest.fixture
def line(script, tmp_path):
    """Makes a phase that fits a line through the origin, with a matrix for Muon; each begins where the last ended."""
    loop = script("loop")

    class Line(loop.Phase):
        stop_at = 0

        def train_step(self, part):
            if self.stop_at and self.step == self.stop_at:
                raise KeyboardInterrupt
            x = torch.randn(16, 4)
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            self.descend(loss)
            return f"loss={self.smoothed(loss.item()):.3f}"

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 1))
        optimizer = loop.Optimizer(model.parameters(), 1e-2, [model[0].weight])
        return Line(tmp_path / "work" / "line.pt", model, optimizer, average=True)

    return make


def test_a_phase_trains_on_the_clock_and_learns(line):
    phase = line()
    x = torch.randn(64, 4)

    def error():
        with torch.no_grad():
            return float((phase.model(x) - x.sum(1, keepdim=True)).square().mean())

    before = error()
    phase.run(1 / 60)
    assert phase.step > 0
    assert phase.seconds >= 1
    assert error() < before
    assert not torch.equal(phase.average[0].weight, phase.model[0].weight)


def test_an_interrupted_phase_goes_on_where_it_stopped(line):
    first = line()
    first.stop_at, first.kept["best"] = 5, 0.5
    with pytest.raises(KeyboardInterrupt):
        first.run(10)
    second = line()
    assert (second.step, second.seconds, second.kept) == (5, first.seconds, {"best": 0.5})
    for name in ("model", "average"):
        pairs = zip(getattr(first, name).parameters(), getattr(second, name).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    for own, other in zip(first.optimizer.state_dict(), second.optimizer.state_dict()):
        torch.testing.assert_close(own["state"], other["state"], rtol=0, atol=0)


def test_the_rate_warms_up_and_ends_near_zero(line):
    phase = line()
    assert phase.rate(0) == 1 and phase.rate(1) == pytest.approx(0.01)


def test_settings_name_the_digest_of_every_weight_and_keep_long_values_on_a_line(script, tmp_path):
    loop = script("loop")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model.safetensors").write_bytes(b"weights")
    loop.write_settings(tmp_path, {"about": "x"}, long={"counts": [1, 2, 3]})
    text = (tmp_path / loop.DEFAULTS_FILE).read_text()
    found = json.loads(text)
    assert found["counts"] == [1, 2, 3] and '"counts": [1, 2, 3]' in text
    assert found["sha256"] == {
        "part/model.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    }


def test_the_image_phases_follow_one_another(script, tmp_path):
    train = script("train_mini_image")
    with pytest.raises(UserError, match="run the phase 'vq' first"):
        train.PHASES["drafter"](tmp_path)
    for name, shown in (("vq", "quantiser="), ("decoder", "L1="), ("drafter", "cross-entropy="), ("refiner", "cross-")):
        phase = train.PHASES[name](tmp_path)
        assert shown in phase.train_step(0.5)
        phase.save()
    train.export(tmp_path, tmp_path / "pair")
    settings = json.loads((tmp_path / "pair" / "draftdiff.json").read_text())
    assert set(settings["training"]) == set(train.PHASES) and len(settings["sha256"]) == 3


def test_a_phase_of_the_video_autoencoder_takes_a_step(script, tmp_path):
    phase = script("train_mini_video").VaePhase(tmp_path)
    assert "fit=" in phase.train_step(0.5)
    phase.save()
    assert phase.file.is_file() and phase.average is not None


def test_the_video_pipeline_is_trained_on_from_what_ships_and_exported_without_a_trace_of_where(
    script, tmp_path, monkeypatch
):
    train = script("train_mini_video_large")
    monkeypatch.setattr(train, "GRIDS", {(2, 4, 4): (1.0, 2)})
    monkeypatch.setattr(train, "CLIPS", 4)
    monkeypatch.setattr(train, "AT_ONCE", 2)
    monkeypatch.setattr(train, "CROPS", ((5, 32, 2),))
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "video")
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="run the phase 'dit' first"):
        train.export(tmp_path)
    decoder, dit = train.DecoderPhase(tmp_path, cpu, 0), train.DitPhase(tmp_path, cpu, 0)
    assert "error=" in decoder.train_step(0.5)
    torch.save(decoder.result(), tmp_path / "large-vae.pt")
    for _ in range(3):
        assert dit.train_step(0.5).startswith("loss 2x4x4=")
        dit.step += 1
    assert dit.pools[2, 4, 4].full and not hasattr(dit.pools[2, 4, 4], "clips")
    dit.save()
    train.export(tmp_path)
    pipe = load_mini_video(folder=tmp_path / "video")
    for name, own in pipe.transformer.named_parameters():
        torch.testing.assert_close(own, dict(dit.average[0].named_parameters())[name], rtol=1e-2, atol=1e-4)
    text = "".join(file.read_text() for file in (tmp_path / "video").rglob("*.json"))
    assert str(SAMPLES.parents[1]) not in text and "name_or_path" not in text
    told = json.loads((tmp_path / "video" / "draftdiff.json").read_text())
    assert told["training"]["on a GPU"]["steps"] == 3 and told["generate"]["height"] == 128


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_phases_of_a_workload_follow_one_another(workload, script, tmp_path, monkeypatch):
    train = script("train_mini_workload")
    pair = replace(train.PAIRS[workload], batch=2)
    with pytest.raises(UserError, match="run the phase 'tokenizer' first"):
        train.Pretraining(pair, "draft", tmp_path)
    monkeypatch.setattr(train, "WRITTEN", 3)
    monkeypatch.setattr(train, "JUDGED", 2)
    monkeypatch.setattr(
        type(pair.workload), "tokens", property(lambda work: 8, lambda work, tokens: None), raising=False
    )
    train.train_tokenizer(pair, tmp_path, 300)
    for kind in train.KINDS:
        phase = train.Pretraining(pair, kind, tmp_path)
        assert "right=" in phase.train_step(0.5)
        phase.save()
    train.export(pair, tmp_path, tmp_path / "pair")
    settings = json.loads((tmp_path / "pair" / "draftdiff.json").read_text())
    assert set(settings["workload"]) == {"target", "draft"} and len(settings["sha256"]) == 2
