"""The doctor tries what it reports."""

import importlib.metadata
import json
import re
import subprocess
import sys

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


def test_what_is_required_and_not_there_is_told_by_how_to_install_it(findings, monkeypatch):
    assert findings["missing"] == [] and set(findings["extras"]) == {"llm", "metrics", "plots", "ui"}
    stock = importlib.metadata.version
    old = {"transformers": "4.57.0", "einops": None}

    def version(name):
        if old.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return old.get(name) or stock(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    found = examine()
    assert found["missing"] == ["einops>=0.8"] and found["extras"]["llm"] == ["transformers>=5.8"]
    assert re.search(r"required +missing: pip install 'einops>=0.8'\n", to_text(found)) and not is_healthy(found)


WITHOUT = """
import importlib.metadata, sys
absent = set(sys.argv[1].split(","))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
stock = importlib.metadata.version
def version(name):
    if name.replace("-", "_") in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return stock(name)
importlib.metadata.version = version
from draftdiff.cli import main
raise SystemExit(main(sys.argv[2:]))
"""


ABSENT = [
    "diffusers",
    "torch",
    "diffusers,imageio_ffmpeg,imageio,triton",
    "einops,packaging",
    "transformers,accelerate",
]


@pytest.mark.parametrize("absent", ABSENT)
def test_it_works_where_packages_are_missing_and_says_which(absent):
    run = [sys.executable, "-c", WITHOUT, absent]
    done = subprocess.run([*run, "doctor", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    if "packaging" not in absent:
        missing = " ".join(found["missing"])
        assert all(name in missing for name in absent.split(",") if name != "imageio_ffmpeg")
    assert found["unknown"] or found["missing"]
    if "torch" not in absent and "einops" not in absent:
        assert found["backends"]["cpu"]["reference"] == "ok"
    image = subprocess.run([*run, "image", "--class", "1", "-o", "x.png"], capture_output=True, text=True, check=False)
    (line,) = image.stderr.splitlines()
    assert image.returncode == 1 and re.fullmatch(r"draftdiff: error: the package '\S+' is not installed; .*", line)


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
