"""What works here: packages, devices, backends (each tried on a tiny call), ffmpeg, weights, models.

It is asked where things do not work: no package is needed to ask it, and a part that fails is a finding.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from draftdiff._version import __version__
from draftdiff.errors import UserError

if TYPE_CHECKING:
    import torch

# Largest error of a tiny call on a CPU in float32, and elsewhere in bfloat16, whose products round at 2**-8.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}


def examine() -> dict[str, Any]:
    """All findings, ready for JSON. A value of None or "ok" is fine; other strings in `backends` are reasons.

    missing: requirements that are not met, and `extras` those of each extra.  unknown: why a part has no findings.
    """
    parts: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "devices": _devices,
        "auto": lambda: {str(device): _auto(device) for device in _of_each_kind()},
        "backends": _backends,
        "ffmpeg": _ffmpeg,
        "embedded_models": _embedded_models,
        "models": _models,
    }
    findings: dict[str, Any] = {"missing": [], "extras": {}}
    unknown = {}
    for name, part in ({"packages": _packages} | parts).items():
        try:
            found = part()
        except Exception as error:  # a package that is not there, or does not go with another, fails in any way
            found, unknown[name] = {}, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        findings |= found if name == "packages" else {name: found}
    return findings | {"unknown": unknown}


def _packages() -> dict[str, Any]:
    """Requirements of this package, and of its extras, that are not met."""
    from packaging.requirements import Requirement

    unmet: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("draftdiff") or []:
        requirement = Requirement(line)
        for extra in ("", "llm", "metrics", "plots", "ui"):
            marker = requirement.marker
            # One that says nothing of extras holds for all of them.
            if extra == "" or (marker and "extra" in str(marker)):
                wanted = unmet.setdefault(extra, [])
                if (marker is None or marker.evaluate({"extra": extra})) and not _is_met(requirement):
                    wanted.append(f"{requirement.name}{requirement.specifier}")
    return {"missing": unmet.pop("", []), "extras": unmet}


def _is_met(requirement: Any) -> bool:
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def _versions() -> dict[str, str | None]:
    from draftdiff.models.devices import versions

    return versions()


def _devices() -> dict[str, str]:
    from draftdiff.models.devices import device_name, devices

    return {str(device): device_name(device) for device in devices()}


def _of_each_kind() -> list[torch.device]:
    """The first device of each kind."""
    from draftdiff.models.devices import devices

    return list({device.type: device for device in reversed(devices())}.values())[::-1]


def _backends() -> dict[str, dict[str, str]]:
    from draftdiff.kernels.block_sparse import BACKENDS

    return {str(device): {name: try_backend(name, device) for name in BACKENDS} for device in _of_each_kind()}


def _models() -> list[dict[str, str]]:
    from draftdiff.video.layouts import supported_models

    return [{"family": family, "class": name, "note": note} for family, name, note in supported_models()]


def _dtype(device: torch.device) -> torch.dtype:
    import torch

    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _auto(device: torch.device) -> str:
    """The backend that `auto` takes on the device."""
    from draftdiff.kernels.block_sparse import resolve

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not the first choice: the reasons are listed
            return resolve("auto", device, _dtype(device), 64)
    except ValueError as none:
        return str(none)


def try_backend(name: str, device: torch.device) -> str:
    """ "ok", "unavailable: ..." or "broken: ...", after a tiny call checked against the reference."""
    import torch

    from draftdiff.core.draft import Tail, pool
    from draftdiff.core.grid import LatentGrid, tiling_for
    from draftdiff.kernels.block_sparse import block_sparse_attention, unavailable
    from draftdiff.kernels.problem import Problem

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
    if not error <= _TOLERANCE[str(dtype).removeprefix("torch.")]:
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


def _embedded_models() -> dict[str, dict[str, Any]]:
    from draftdiff.models.loading import quiet_diffusers
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
    known = not findings["missing"] and not findings["unknown"]
    return known and works and not any(state.startswith("broken") for state in backends)


def to_text(findings: dict[str, Any]) -> str:
    """The findings for a terminal."""
    unmet = {"required": findings["missing"]} | {f"extra {name}": found for name, found in findings["extras"].items()}
    sections: dict[str, dict[str, str]] = {
        "packages": {
            name: f"missing: pip install {' '.join(map(repr, found))}" if found else "ok"
            for name, found in unmet.items()
        },
        "versions": {
            name: version or "not installed"
            for name, version in (findings["versions"] or {"draftdiff": __version__}).items()
        },
        "devices": findings["devices"],
    }
    for device, states in findings["backends"].items():
        sections[f"backends on {device}"] = {"auto": findings["auto"].get(device, "?"), **states}
    ffmpeg = findings["ffmpeg"]
    if ffmpeg:
        sections["tools"] = {
            "ffmpeg": ffmpeg["path"] if ffmpeg["found"] else f"missing: {ffmpeg['reason']}",
            "libvmaf": "ok" if ffmpeg["libvmaf"] else "missing: no VMAF scores",
        }
    sections["embedded models"] = {
        name: f"{model['status']}, {model['bytes'] / 1e6:.1f} MB" for name, model in findings["embedded_models"].items()
    }
    sections["supported transformers"] = {
        entry["class"]: entry["family"] + (f" ({entry['note']})" if entry["note"] else "")
        for entry in findings["models"]
    }
    sections["could not be examined"] = findings["unknown"]
    lines = []
    for title, entries in sections.items():
        if entries:
            width = max(map(len, entries))
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in entries.items())]
    return "\n".join(lines)
