"""A small folder in ComfyUI's custom_nodes that imports the nodes from the package, with example workflows."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from draftdiff.errors import UserError
from draftdiff.files import replacing_folder

_FOLDER = Path("custom_nodes", "draftdiff")
_WORKFLOWS = "example_workflows"  # where ComfyUI's template browser looks
_MARK = "# Written by `draftdiff comfyui install`; `draftdiff comfyui uninstall` removes this folder.\n"
_CODE = f'''{_MARK}"""Draft attention; the code is in the Python package draftdiff."""

try:
    import comfy_api.latest  # noqa: F401
except ImportError:
    from draftdiff.integrations.comfyui.v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: F401
else:
    from draftdiff.integrations.comfyui.v3 import comfy_entrypoint  # noqa: F401
'''


def workflows() -> dict[str, str]:
    """The example workflows, by file name."""
    folder = resources.files("draftdiff.integrations.comfyui") / "workflows"
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".json")}


def install(comfyui: Path) -> Path:
    """Write the folder, also over an older one of ours; returns it. Raises UserError where there is no ComfyUI or where
    something else has the name."""
    folder = _place(comfyui)
    with replacing_folder(folder) as new:
        (new / "__init__.py").write_text(_CODE, encoding="utf-8")
        (new / _WORKFLOWS).mkdir()
        for name, text in workflows().items():
            (new / _WORKFLOWS / name).write_text(text, encoding="utf-8")
    return folder


def uninstall(comfyui: Path) -> Path:
    """Remove what `install` wrote; returns its folder. Raises UserError where it is not there."""
    folder = _place(comfyui)
    if not folder.exists():
        raise UserError(f"{str(folder)!r} is not there: nothing to uninstall")
    shutil.rmtree(folder)
    return folder


def _place(comfyui: Path) -> Path:
    """Where the folder is or will be."""
    has_more = (comfyui / "nodes.py").is_file() or (comfyui / "models").is_dir()  # the desktop program's has no code
    if not has_more or not (comfyui / "custom_nodes").is_dir():
        raise UserError(f"{str(comfyui)!r} is no ComfyUI: it needs custom_nodes/, and nodes.py or models/, in it")
    folder = comfyui / _FOLDER
    if folder.is_symlink() or (folder.exists() and not _is_from_here(folder)):
        raise UserError(f"{str(folder)!r} was not written by draftdiff comfyui install: move it away first")
    return folder


def _is_from_here(folder: Path) -> bool:
    """Whether all in it is what `install` writes, or what Python makes of it."""
    code = folder / "__init__.py"
    if not code.is_file() or not code.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return False
    return {path.name for path in folder.iterdir()} <= {code.name, _WORKFLOWS, "__pycache__"}
