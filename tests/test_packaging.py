"""The folders at the top of the repository never hide Hugging Face's `kernels`, and imports point downwards only."""

import ast
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A fake of the distribution named kernels: what diffusers and transformers import from it.
HF_KERNELS = "def get_kernel(name):\n    return 'hugging face'\n"
PROBE = """
import kernels, importlib.util, draftdiff
from draftdiff.kernels.block_sparse import block_sparse_attention
from draftdiff.pipelines import mini_video
from kernels import get_kernel
assert get_kernel("x") == "hugging face"
assert "site" in kernels.__file__, kernels.__file__
spec = importlib.util.find_spec("pipelines")
assert spec is None or spec.origin is None, spec
print("fine")
"""


def run_with_kernels(folder: Path, cwd: Path, code: str) -> str:
    site = folder / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(HF_KERNELS)
    setup = f"import sys; sys.path.insert(1, {str(site)!r})\n"
    done = subprocess.run([sys.executable, "-c", setup + code], cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_checkout_does_not_hide_hugging_faces_kernels(tmp_path):
    assert run_with_kernels(tmp_path, ROOT, PROBE).strip() == "fine"


def test_there_is_no_package_marker_in_kernels_and_pipelines():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "pipelines" / "__init__.py").exists()


def test_importing_draftdiff_adds_no_top_level_name():
    code = "import sys, draftdiff.kernels.block_sparse; print({'kernels', 'pipelines', 'core'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_importing_draftdiff_is_light():
    code = "import sys, draftdiff; print({'diffusers', 'transformers', 'triton', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["wheel", "editable"])
def test_an_installed_draftdiff_does_not_hide_hugging_faces_kernels(tmp_path, mode):
    target = tmp_path / "installed"
    if mode == "wheel":
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
        subprocess.run([*pip, str(ROOT)], check=True)
        (wheel,) = tmp_path.glob("draftdiff-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0] for name in archive.namelist()}
            assert {top for top in tops if not top.endswith(".dist-info")} == {"draftdiff"}
            packed = set(archive.namelist())
            archive.extractall(target)
        assert {"draftdiff/py.typed", "draftdiff/kernels/cpu.cpp"} <= packed
        weights = ROOT / "pipelines" / "mini_video_weights"
        files = {str(file.relative_to(ROOT)) for file in weights.rglob("*") if file.is_file()}
        assert {f"draftdiff/{name}" for name in files} <= packed
        install = f"import sys; sys.path.append({str(target)!r})\n"
    else:
        prefix = tmp_path / "prefix"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--prefix", str(prefix)]
        subprocess.run([*pip, "-e", str(ROOT)], check=True)
        (finder,) = prefix.rglob("__editable___draftdiff*_finder.py")
        assert "draftdiff.kernels" in finder.read_text()
        # What the .pth file of an editable install does at start-up.
        install = (
            f"import sys; sys.path.append({str(finder.parent)!r}); import {finder.stem}; {finder.stem}.install()\n"
        )
    for cwd in (tmp_path, ROOT):
        folder = tmp_path / f"run-{cwd.name}"
        assert run_with_kernels(folder, cwd, install + PROBE).strip() == "fine"


LAYERS = ["core", "kernels", "video", "var", "llm", "pipelines"]
ALLOWED = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "video": {"core", "kernels", "video"},
    "var": {"core", "kernels", "var"},
    "llm": {"core", "kernels", "llm"},
    "pipelines": {"core", "kernels", "video", "var", "llm", "pipelines"},
}


def imported_names(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer):
    folder = ROOT / layer if layer in ("kernels", "pipelines") else ROOT / "draftdiff" / layer
    for file in folder.rglob("*.py"):
        used = {name.split(".")[1] for name in imported_names(file) if name.startswith("draftdiff.") and "." in name}
        assert used & set(LAYERS) <= ALLOWED[layer], file
        if layer == "core":
            roots = {name.split(".")[0] for name in imported_names(file)}
            foreign = {r for r in roots if r not in sys.stdlib_module_names} - {"torch", "einops", "draftdiff"}
            assert not foreign, file


def test_find_spec_of_kernels_is_not_ours():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
