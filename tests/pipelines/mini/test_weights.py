"""The one loader of what ships with draftdiff: damaged, missing and unfitting files are named, each in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from draftdiff.errors import UserError
from draftdiff.pipelines.mini import image, llm, video, weights


def load_llm(folder):
    """The pair, and the target's heads, which are loaded apart."""
    loaded = llm.load_mini_llm(folder=folder)
    return loaded, [llm.load_mini_heads(kind, loaded[0], folder) for kind in llm.HEADS]


MODELS = {
    "mini video": (video, video.load_mini_video, video.mini_video_defaults),
    "mini image": (image, lambda folder: image.load_mini_image(4, folder=folder), image.mini_image_defaults),
    "mini language-model": (llm, load_llm, llm.mini_llm_defaults),
}
SHIPPED = [
    (title, str(file.relative_to(module.WEIGHTS)))
    for title, (module, _, _) in MODELS.items()
    for file in sorted(module.WEIGHTS.rglob("*.safetensors"))
]


def copy_of(title: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS[title][0].WEIGHTS, tmp_path / "copy"))


def load(title: str, folder: Path) -> object:
    return MODELS[title][1](folder=folder)


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])  # a valid file of other weights: only the digest tells


def test_every_shipped_file_of_weights_has_a_digest() -> None:
    assert len(SHIPPED) == 12
    for title, name in SHIPPED:
        assert len(weights.settings(title, MODELS[title][0].WEIGHTS)["sha256"][name]) == 64


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:0], lambda content: content[:5000], lambda content: content[:-1], flip_last_bit],
    ids=["empty", "short", "one byte less", "one other bit"],
)
@pytest.mark.parametrize(("title", "name"), SHIPPED)
def test_other_bytes_than_the_shipped_ones_are_refused(tmp_path: Path, title: str, name: str, damage) -> None:
    folder = copy_of(title, tmp_path)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"^{title} weights are damaged: ") as caught:
        load(title, folder)
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("title", MODELS)
def test_weights_without_a_digest_are_refused(tmp_path: Path, title: str) -> None:
    folder = copy_of(title, tmp_path)
    (folder / weights.DEFAULTS_FILE).write_text("{}")
    with pytest.raises(ValueError, match=f"^{title} weights are damaged: "):
        load(title, folder)


@pytest.mark.parametrize(
    ("title", "config", "old", "new"),
    [
        ("mini video", "transformer/config.json", '"in_channels": 8', '"in_channels": 7'),
        ("mini image", "transformer/config.json", '"in_channels": 8', '"in_channels": 7'),
        ("mini language-model", "draft/config.json", '"hidden_size": 128', '"hidden_size": 64'),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_one_line(tmp_path: Path, title, config, old, new) -> None:
    folder = copy_of(title, tmp_path)
    (folder / config).write_text((folder / config).read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"^{title} weights cannot be loaded: ") as caught:
        load(title, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("title", "name"),
    [(title, name) for title in MODELS for name in ["draftdiff.json"]]
    + [("mini video", name) for name in ("model_index.json", "vae/config.json")]
    + [("mini image", name) for name in ("model_index.json", "vae/config.json", "refiner/config.json")]
    + [("mini language-model", name) for name in ("target/config.json", "tokenizer/tokenizer.json")],
)
def test_a_file_that_is_not_there_is_named(tmp_path: Path, title: str, name: str) -> None:
    folder = copy_of(title, tmp_path)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{title} weights are missing: ") as caught:
        load(title, folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("title", MODELS)
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, title: str) -> None:
    defaults = MODELS[title][2]
    with pytest.raises(FileNotFoundError, match=f"^{title} settings are missing: "):
        defaults(tmp_path)
    (tmp_path / "draftdiff.json").write_text("{not json")
    with pytest.raises(ValueError, match=f"^{title} settings are unreadable: "):
        defaults(tmp_path)


@pytest.mark.parametrize("content", ["[]", "", "7"])
def test_settings_that_are_no_object_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "draftdiff.json").write_text(content)
    with pytest.raises(UserError, match=r"^toy settings are unreadable: .*draftdiff.json is "):
        weights.settings("toy", tmp_path)


@pytest.mark.parametrize("name", ["half", "torch.float16", torch.float16])
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_every_mini_model_loads_in_a_dtype_by_either_name(argument: str, name) -> None:
    assert llm.load_mini_llm(**{argument: name})[0].dtype == torch.float16
    assert image.load_mini_refiner(**{argument: name}).dtype == torch.float16
    assert image.load_mini_image(**{argument: name}).vae.dtype == torch.float16
    assert video.load_mini_video(**{argument: name}).transformer.dtype == torch.float16


@pytest.mark.parametrize(
    "loader", [llm.load_mini_llm, image.load_mini_image, image.load_mini_refiner, video.load_mini_video]
)
def test_a_dtype_that_is_none_or_two_is_refused(loader) -> None:
    with pytest.raises(UserError, match=r"^dtype must be one of float32, float16, bfloat16, got 'int8'$"):
        loader(dtype="int8")
    with pytest.raises(UserError, match=r"^dtype and torch_dtype are one argument, got half and float$"):
        loader(dtype="half", torch_dtype="float")


def test_progress_bars_are_back_after_a_load_that_fails(tmp_path: Path) -> None:
    (tmp_path / "draftdiff.json").write_text("{}")
    logs = (diffusers_logging, transformers_logging)

    def loader() -> None:
        assert not any(log.is_progress_bar_enabled() for log in logs)
        raise RuntimeError("no\nsecond line")

    with pytest.raises(ValueError, match=r"^toy weights cannot be loaded: .*: no second line$"):
        weights.load("toy", tmp_path, (), loader)
    assert all(log.is_progress_bar_enabled() for log in logs)
