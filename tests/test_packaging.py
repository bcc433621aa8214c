"""The folders at the top of the repository never hide Hugging Face's `kernels`, and imports point downwards only."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import sys, importlib.util
import draftdiff.kernels.block_sparse
import draftdiff.pipelines.mini.world
from kernels import get_kernel
import kernels
assert callable(get_kernel)
assert "site-packages" in kernels.__file__, kernels.__file__
assert importlib.util.find_spec("pipelines") is None or importlib.util.find_spec("pipelines").origin is None
print("fine, with draftdiff from", draftdiff.__path__[0])
"""


def probe(cwd: Path, before: str = "") -> str:
    """What the probe prints in a fresh interpreter that runs in a folder."""
    done = subprocess.run([sys.executable, "-c", before + PROBE], cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_checkout_does_not_hide_hugging_faces_kernels():
    assert probe(ROOT).startswith("fine")


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


@pytest.mark.parametrize("mode", ["wheel", "editable"])
def test_an_installed_draftdiff_does_not_hide_hugging_faces_kernels(tmp_path, mode):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation"]
    if mode == "wheel":
        source = tmp_path / "source"  # a build writes into the tree it builds from
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
        subprocess.run([*pip, "wheel", *options, "-w", str(tmp_path), str(source)], check=True)
        (wheel,) = tmp_path.glob("draftdiff-*.whl")
        home = tmp_path / "installed"
        with zipfile.ZipFile(wheel) as archive:
            packed = set(archive.namelist())
            archive.extractall(home)
        tops = {name.split("/")[0] for name in packed}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"draftdiff"}
        assert {"draftdiff/py.typed", "draftdiff/kernels/cpu.cpp"} <= packed
        folders = [ROOT / "pipelines" / "mini" / f"{kind}_weights" for kind in ("image", "llm", "video")]
        files = {str(file.relative_to(ROOT)) for folder in folders for file in folder.rglob("*") if file.is_file()}
        assert all(folder.is_dir() for folder in folders)
        assert {f"draftdiff/{name}" for name in files} <= packed
        before = f"import sys; sys.path.insert(1, {str(home)!r})\n"
        came_from = home / "draftdiff"
    else:
        prefix = tmp_path / "prefix"
        # Beside the environment's own install, which pip would otherwise remove.
        options += ["--ignore-installed", "--prefix", str(prefix)]
        subprocess.run([*pip, "install", *options, "-e", str(ROOT)], check=True)
        (finder,) = prefix.rglob("__editable___draftdiff*_finder.py")
        # What the .pth file of an editable install does at start-up.
        before = f"import sys; sys.path.append({str(finder.parent)!r})\nimport {finder.stem} as f; f.install()\n"
        came_from = ROOT / "draftdiff"
    assert probe(tmp_path, before).strip() == f"fine, with draftdiff from {came_from}"
    assert probe(ROOT, before).startswith("fine")


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
    assert spec is not None
    assert ROOT / "kernels" not in Path(spec.origin).parents


@pytest.mark.parametrize(
    ("imported", "absent"),
    [("llm", "diffusers"), ("pipelines.mini.llm", "diffusers"), ("video.patch", "draftdiff.llm")],
)
def test_the_llm_part_and_the_others_do_without_each_other(imported, absent):
    code = (
        "import sys, draftdiff; from importlib import import_module as load\n"
        f"module = load('draftdiff.{imported}')\n"
        "[getattr(module, name) for name in getattr(module, '__all__', ())]\n"
        f"print([name for name in sys.modules if name == {absent!r} or name.startswith({absent!r} + '.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
