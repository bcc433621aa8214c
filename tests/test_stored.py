"""Files that others wrote: told by their content, refused in one line, and nothing in them is run."""

import argparse
import gzip
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from draftdiff.errors import UserError
from draftdiff.stored import inside, read_json, read_tensors, read_weights

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def refused(path, read=read_weights):
    """What is said of a file, which is one clean line that names it and advises nothing dangerous."""
    with pytest.raises(UserError) as error:
        read(path)
    line = str(error.value)
    assert str(path) in line and line.isprintable() and "weights_only" not in line and "trust_remote_code" not in line
    return line


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_is_read_by_what_is_in_it_whatever_its_name(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    if kind == "safetensors":
        path.write_bytes(save(WEIGHTS))
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip")
    found = read_weights(path)
    assert set(found) == set(WEIGHTS) and all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "is a Git LFS pointer instead of the file: run git lfs pull"),
        (b"<!DOCTYPE html>\n<html>404</html>", "is a web page, probably of a failed download"),
        (b"\n  <HTML>", "is a web page"),
        (b'{"weight_map": {}}', "is JSON text"),
        (gzip.compress(b"weights"), "is compressed: unpack it first"),
        (b"", "is empty"),
        (b"PK\x03\x04 and nothing else", "is not a readable checkpoint (damaged, truncated or of another kind): "),
        (bytes(range(256)), "is not a readable checkpoint (damaged, truncated or of another kind): "),
    ],
    ids=["lfs", "html", "html2", "json", "gzip", "empty", "zip", "noise"],
)
def test_what_stands_in_place_of_weights_is_named(tmp_path, content, said, suffix):
    (tmp_path / f"weights{suffix}").write_bytes(content)
    assert said in refused(tmp_path / f"weights{suffix}")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (argparse.Namespace(depth=16), "argparse.Namespace"),
        (np.float64(3.5), "numpy"),
        (np.zeros(3), "numpy"),
    ],
)
def test_an_object_beside_the_weights_is_named_with_the_way_out(tmp_path, value, said, new):
    torch.save({"model": WEIGHTS, "args": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    line = refused(tmp_path / "w.pth")
    assert f"holds a {said}" in line and "torch.save(checkpoint['model'], " in line


def test_a_torchscript_program_and_a_plain_pickle_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    assert "is a TorchScript program" in refused(tmp_path / "program.pt")
    (tmp_path / "p.pth").write_bytes(pickle.dumps({"a": 1}))
    assert "is not a readable checkpoint" in refused(tmp_path / "p.pth")


def test_a_folder_and_a_file_that_is_not_there_are_named(tmp_path):
    assert "is a folder, not a checkpoint" in refused(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no checkpoint at .*nowhere$"):
        read_weights(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damage_anywhere_is_one_line_or_unseen(tmp_path, kind):
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    if kind == "safetensors":
        save_file(WEIGHTS, whole)
    else:
        torch.save(WEIGHTS, whole, _use_new_zipfile_serialization=kind == "zip")
    data, random = whole.read_bytes(), np.random.default_rng(0)
    step = max(len(data) // 150, 1)
    damaged = [data[:length] for length in range(0, len(data) - 8, step)]
    places = random.integers(0, len(data), 150)
    damaged += [data[:place] + bytes([random.integers(256)]) + data[place + 1 :] for place in places]
    for number, content in enumerate(damaged):
        part.unlink(missing_ok=True)  # an earlier one may be mapped
        part.write_bytes(content)
        try:
            read_weights(part)
        except UserError:
            refused(part)
        else:
            assert number >= len(damaged) - 150, f"cut at {len(content)} of {len(data)} bytes"


def test_a_table_is_what_it_has_to_be(tmp_path):
    forms = {"a": (torch.float32, (None, 3)), "b": (torch.float16, (4,))}

    def read(path):
        return read_tensors(path, "table", forms)

    path = tmp_path / "table.safetensors"
    save_file(WEIGHTS | {"more": torch.zeros(1)}, path)
    assert set(read(path)) == {"a", "b"}
    for change, said in (
        ({"a": torch.zeros(2, 4)}, "a is torch.float32 [2, 4] instead of torch.float32 [any, 3]"),
        ({"a": torch.zeros(6)}, "a is torch.float32 [6] instead of"),
        ({"b": torch.zeros(4)}, "b is torch.float32 [4] instead of torch.float16 [4]"),
    ):
        save_file(WEIGHTS | change, path)
        assert said in refused(path, read)
    save_file({"a": WEIGHTS["a"]}, path)
    assert "it lacks b" in refused(path, read)
    torch.save([1, 2], path)
    assert "it holds a list" in refused(path, read)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is not a readable index: "),
        (b"{", "is not a readable index: "),
        (b"[1, 2]", "is not a readable index: it holds a list"),
        (b"null", "is not a readable index: it holds a NoneType"),
        (b"[" * 100_000, "is not a readable index: "),
        (b"", "is empty"),
        (LFS, "is not a readable index: "),
    ],
    ids=["binary", "half", "list", "null", "deep", "empty", "lfs"],
)
def test_what_is_no_json_object_is_named(tmp_path, content, said):
    (tmp_path / "x.json").write_bytes(content)
    assert said in refused(tmp_path / "x.json", lambda path: read_json(path, "index"))
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "x.json", "index") == {"a": 1}


def test_a_folder_names_no_file_outside_it(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "secret.pth"
    folder.mkdir()
    outside.write_text("secret")
    (folder / "link.pth").symlink_to(outside)
    (folder / "real.pth").write_text("mine")
    (folder / "near.pth").symlink_to("real.pth")
    for name in ("real.pth", "near.pth", "part/real.pth", "./real.pth"):
        assert inside(folder, name) == folder / name
    for name in ("../secret.pth", "a/../../secret.pth", str(outside), "link.pth", str(folder / "real.pth")):
        with pytest.raises(UserError, match="which is not inside it"):
            inside(folder, name)


def test_a_snapshot_of_the_hubs_cache_has_its_blobs(tmp_path):
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("weights")
    snapshot = repository / "snapshots" / "1" / "weights"
    snapshot.mkdir(parents=True)
    (snapshot / "part.pth").symlink_to("../../../blobs/abc")
    assert inside(snapshot, "part.pth").read_text() == "weights"


def test_a_name_that_is_too_long_for_a_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read_weights(tmp_path / ("9" * 400 + ".safetensors"))
