"""Where a pipeline's files are: a folder, or a snapshot of a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from draftdiff.errors import UserError

_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def local_folder(name_or_path: str | Path, kwargs: dict[str, Any]) -> Path:
    """The folder itself, or that of the downloaded repository; takes the arguments of the download out of kwargs.

    diffusers refuses to download pipelines whose classes are neither its own nor in the repository, so it is given the
    downloaded files. Raises FileNotFoundError for a path that is nowhere and a folder without a pipeline, and
    ValueError for a file.
    """
    folder = Path(name_or_path)
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    if folder.is_file():
        raise UserError(f"{folder} is a file: original checkpoints are read by from_single_file")
    if not folder.is_dir():
        if len(folder.parts) != 2 or folder.is_absolute():
            raise FileNotFoundError(f"neither a folder nor a repository of the hub (owner/name): {name_or_path}")
        folder = Path(snapshot_download(str(name_or_path), **hub))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{name_or_path} holds no diffusers pipeline (no model_index.json); original checkpoints are read by "
            "from_single_file, or converted by `draftdiff convert`"
        )
    return folder
