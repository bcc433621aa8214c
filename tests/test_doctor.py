"""The doctor tries what it reports."""

import json
import re

import pytest
import torch

from draftdiff.cli import main
from draftdiff.doctor import examine, is_healthy, to_text, try_backend
from draftdiff.kernels import torch_backend
from draftdiff.kernels.block_sparse import BACKENDS
from draftdiff.video.layouts import supported_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def findings():
    return examine()


def test_every_backend_and_model_is_listed_and_nothing_is_broken(findings):
    assert set(findings["backends"]["cpu"]) == set(BACKENDS)
    assert findings["backends"]["cpu"]["reference"] == findings["backends"]["cpu"]["torch"] == "ok"
    assert len(findings["models"]) == len(supported_models())
    assert is_healthy(findings)


def test_the_text_names_each_finding(findings):
    text = to_text(findings)
    for name in (*BACKENDS, torch.__version__, "libvmaf", "extra metrics", "mini-video", "WanTransformer3DModel"):
        assert name in text


def test_each_device_is_listed_with_the_backend_that_auto_takes(monkeypatch, findings):
    assert findings["auto"]["cpu"] in ("cpu", "torch")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _device: "an Arc")
    monkeypatch.setattr("draftdiff.doctor.try_backend", lambda name, device: "ok")
    found = examine()
    assert {"cpu", "xpu:0", "xpu:1"} <= set(found["devices"]) and found["devices"]["xpu:1"] == "an Arc"
    assert found["auto"]["xpu:0"] == "torch" and "xpu:1" not in found["auto"]  # the first of a kind is tried
    assert re.search(r"backends on xpu:0\n  auto +torch\n", to_text(found))


def test_it_is_told_whether_wans_image_to_video_can_run(findings):
    assert findings["ftfy"] is True
    assert re.search(r"ftfy +ok\n", to_text(findings))
    assert re.search(r"ftfy +missing: Wan's image-to-video needs it", to_text({**findings, "ftfy": False}))


def test_json_and_exit_code(findings, capsys, monkeypatch):
    monkeypatch.setattr("draftdiff.doctor.examine", lambda: findings)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == findings
    missing = {"mini-video": {"status": "mini video weights are missing", "bytes": 0}}
    broken = {**findings, "embedded_models": missing}
    monkeypatch.setattr("draftdiff.doctor.examine", lambda: broken)
    assert main(["doctor"]) == 1
    assert "weights are missing" in capsys.readouterr().out


def test_a_backend_that_fails_is_broken_with_its_reason(monkeypatch):
    def fail(*_args):
        raise RuntimeError("no compiler\nin sight")

    monkeypatch.setattr(torch_backend, "run", fail)
    assert try_backend("torch", CPU) == "broken: RuntimeError: no compiler in sight"


def test_a_backend_that_is_wrong_is_broken(monkeypatch, findings):
    stock = torch_backend.run

    def wrong(*args):
        out, lse = stock(*args)
        return out * 1.1, lse

    monkeypatch.setattr(torch_backend, "run", wrong)
    assert try_backend("torch", CPU).startswith("broken: differs from the reference by")
    states = {"cpu": {**findings["backends"]["cpu"], "torch": try_backend("torch", CPU)}}
    assert not is_healthy({**findings, "backends": states})


def test_a_backend_without_its_machine_is_unavailable_but_not_broken(monkeypatch, findings):
    monkeypatch.setattr("draftdiff.kernels.triton_backend._INTERPRETED", False)
    state = try_backend("triton", CPU)
    assert state.startswith("unavailable: needs")
    assert is_healthy({**findings, "backends": {"cpu": {"triton": state}}})


def test_missing_weights_are_told(monkeypatch):
    def missing(*_args):
        raise FileNotFoundError("mini video weights are missing: transformer")

    monkeypatch.setattr("draftdiff.pipelines.mini.video.load_mini_video", missing)
    findings = examine()
    assert "weights are missing" in findings["embedded_models"]["mini-video"]["status"] and not is_healthy(findings)
