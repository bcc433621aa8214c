"""What works here: devices, versions, backends (each tried on a tiny call), ffmpeg, extras, weights, models."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch

from draftdiff.core.draft import Tail, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.errors import UserError
from draftdiff.kernels.block_sparse import BACKENDS, block_sparse_attention, resolve, unavailable
from draftdiff.kernels.problem import Problem
from draftdiff.models.devices import device_name, devices, versions
from draftdiff.models.loading import quiet_diffusers

# Import names of what each extra of the package installs.
_EXTRAS = {"metrics": ("stlpips_pytorch",), "plots": ("matplotlib",)}
# Largest error of a tiny call, by dtype: products of the half-precision types round at 2**-11 and 2**-8.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}


def examine() -> dict[str, Any]:
    """All findings, ready for JSON. A value of None or "ok" is fine; other strings in `backends` are reasons."""
    here = devices()
    tried = list({device.type: device for device in reversed(here)}.values())[::-1]  # the first of each kind
    from draftdiff.video.layouts import supported_models

    return {
        "versions": versions(),
        "devices": {str(device): device_name(device) for device in here},
        "auto": {str(device): _auto(device) for device in tried},
        "backends": {str(device): {name: try_backend(name, device) for name in BACKENDS} for device in tried},
        "ffmpeg": _ffmpeg(),
        "ftfy": importlib.util.find_spec("ftfy") is not None,
        "extras": {extra: _missing(names) for extra, names in _EXTRAS.items()},
        "embedded_models": _embedded_models(),
        "models": [{"family": family, "class": name, "note": note} for family, name, note in supported_models()],
    }


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _auto(device: torch.device) -> str:
    """The backend that `auto` takes on the device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not the first choice: the reasons are listed
            return resolve("auto", device, _dtype(device), 64)
    except ValueError as none:
        return str(none)


def try_backend(name: str, device: torch.device) -> str:
    """ "ok", "unavailable: ..." or "broken: ...", after a tiny call checked against the reference."""
    dtype = _dtype(device)
    reason = unavailable(name, device, dtype, 64)
    if reason:
        return f"unavailable: {reason}"
    generator = torch.Generator().manual_seed(0)
    tiling = tiling_for(LatentGrid(3, 8, 10), (1, 8, 8), 64, text=5, device=device)
    q, k, v = torch.randn(3, 1, tiling.tokens, 2, 64, generator=generator).to(device, dtype)
    keep = torch.rand(1, 2, tiling.tiles, tiling.tiles, generator=generator) < 0.5
    keep = (keep | torch.eye(tiling.tiles, dtype=torch.bool)).to(device)
    problem = Problem(q, k, v, keep, tiling, tail=Tail(pool(k, tiling), pool(v, tiling)))

    def run(backend: str) -> torch.Tensor:
        return block_sparse_attention(problem, backend=backend).float()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as flex's, that it is slow on a CPU
            error = float((run(name) - run("reference")).abs().max())
    except Exception as failure:  # a compiler or driver that fails is a finding, whatever it raises
        return f"broken: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if not error <= _TOLERANCE[dtype]:
        return f"broken: differs from the reference by {error:.2g}"
    return "ok"


def _ffmpeg() -> dict[str, Any]:
    from draftdiff.compare.metrics import has_libvmaf
    from draftdiff.models.frames import ffmpeg

    try:
        executable = ffmpeg()
    except UserError as error:
        return {"found": False, "libvmaf": False, "reason": str(error).splitlines()[0]}
    return {"found": True, "libvmaf": has_libvmaf(executable), "path": executable}


def _missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _embedded_models() -> dict[str, dict[str, Any]]:
    from draftdiff.pipelines.mini import image as mini_image
    from draftdiff.pipelines.mini import llm as mini_llm
    from draftdiff.pipelines.mini import video as mini_video

    def load_pair() -> None:
        mini_image.load_mini_image()
        mini_image.load_mini_refiner()

    found = {}
    for name, folder, load in (
        ("mini-video", mini_video.WEIGHTS, lambda: mini_video.load_mini_video()),
        ("mini-image", mini_image.WEIGHTS, load_pair),
        ("mini-llm", mini_llm.WEIGHTS, lambda: mini_llm.load_mini_llm()),
    ):
        status = "ok"
        try:
            with quiet_diffusers():
                load()
        except (OSError, ValueError) as error:
            status = str(error)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found[name] = {"status": status, "bytes": size}
    return found


def is_healthy(findings: dict[str, Any]) -> bool:
    """Whether nothing that should work is broken; what is merely not there does not count."""
    backends = [state for states in findings["backends"].values() for state in states.values()]
    works = all(model["status"] == "ok" for model in findings["embedded_models"].values())
    return works and not any(state.startswith("broken") for state in backends)


def to_text(findings: dict[str, Any]) -> str:
    """The findings for a terminal."""
    sections = {
        "versions": {name: value or "not installed" for name, value in findings["versions"].items()},
        "devices": findings["devices"],
    }
    for device, states in findings["backends"].items():
        sections[f"backends on {device}"] = {"auto": findings["auto"][device], **states}
    ffmpeg = findings["ffmpeg"]
    sections["tools"] = {
        "ffmpeg": ffmpeg["path"] if ffmpeg["found"] else f"missing: {ffmpeg['reason']}",
        "libvmaf": "ok" if ffmpeg["libvmaf"] else "missing: no VMAF scores",
        "ftfy": "ok" if findings["ftfy"] else "missing: Wan's image-to-video needs it: pip install ftfy",
    }
    for extra, missing in findings["extras"].items():
        hint = f"missing {', '.join(missing)}: pip install 'draftdiff[{extra}]'"
        sections["tools"][f"extra {extra}"] = hint if missing else "ok"
    sections["embedded models"] = {
        name: f"{model['status']}, {model['bytes'] / 1e6:.1f} MB" for name, model in findings["embedded_models"].items()
    }
    sections["supported transformers"] = {
        entry["class"]: entry["family"] + (f" ({entry['note']})" if entry["note"] else "")
        for entry in findings["models"]
    }
    lines = []
    for title, entries in sections.items():
        width = max(map(len, entries))
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in entries.items())]
    return "\n".join(lines)
