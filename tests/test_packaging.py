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
        assert {
            "draftdiff/py.typed",
            *(f"draftdiff/kernels/{name}" for name in ("cpu.cpp", "cpu_probe.cpp", "cpu_common.h")),
            *(f"draftdiff/ui/{name}" for name in ("style.css", "viewer.js")),
        } <= packed
        modules = {
            f"draftdiff/{file.relative_to(ROOT)}".replace("draftdiff/draftdiff", "draftdiff")
            for files in parts().values()
            for file in files
        }
        assert modules <= packed, "pyproject.toml lacks a package"
        workflows = (ROOT / "draftdiff" / "integrations" / "comfyui" / "workflows").iterdir()
        assert {str(file.relative_to(ROOT)) for file in workflows} <= packed
        folders = [
            ROOT / "pipelines" / "mini" / f"{kind}_weights" for kind in ("drawing", "image", "llm", "travel", "video")
        ]
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


# What each part may import, itself apart. One that is not named here fails the test below.
BELOW_ALL = {"errors", "files", "stored", "_version"}
TABLE = {
    "core": set(),
    "kernels": {"core"},
    "attention": {"core", "kernels"},
    "hosts": {"core", "kernels", "attention"},
    "video": {"core", "kernels", "attention", "hosts"},
    "var": {"core", "kernels", "attention", "hosts"},
    "llm": {"core", "kernels", "attention", "hosts"},
    "pipelines": {"core", "kernels", "attention", "hosts", "video", "var", "llm"},
}
TABLE["models"] = TABLE["pipelines"] | {"pipelines"}
TABLE["compare"] = TABLE["models"] | {"models"}
TABLE |= {name: TABLE["compare"] | {"compare"} for name in ("bench", "integrations", "ui", "doctor")}
TABLE["cli"] = TABLE["compare"] | {"compare", "bench", "integrations", "ui", "doctor"}
TABLE["__main__"] = {"cli"}
TABLE["__init__"] = {"attention", "video", "compare"}
TABLE = {name: allowed | {name} | BELOW_ALL for name, allowed in TABLE.items()}
TABLE |= {"_version": set(), "errors": set(), "files": {"errors"}, "stored": {"errors"}}
# Names of the top that stand for something of a part.
PUBLIC = {
    **dict.fromkeys(
        ("DraftAttentionConfig", "Layout", "disable", "draft_attention", "enable", "register_layout", "report"), "video"
    ),
    "__version__": "_version",
    "tune": "compare",
}
OTHERS = {
    "core": {"torch", "einops"},
    "errors": set(),
    "files": {"filelock"},
    "stored": {"torch", "safetensors"},
    "_version": set(),
}  # packages that it may import


def imported_names(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            # Of the top the names count, of a module the module.
            yield from (f"draftdiff.{alias.name}" for alias in node.names if node.module == "draftdiff")
            if node.module != "draftdiff":
                yield node.module


def parts() -> dict[str, list[Path]]:
    """Files of every name at the top of the package; kernels/ and pipelines/ are mapped into it."""
    found = {}
    for path in [*(ROOT / "draftdiff").iterdir(), ROOT / "kernels", ROOT / "pipelines"]:
        files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
        if files:
            found[path.stem] = files
    return found


def breaches(name: str, file: Path) -> set[str]:
    """What a file of a part imports and may not."""
    names = [imported.split(".") for imported in imported_names(file)]
    ours = {PUBLIC.get(rest[0], rest[0]) for top, *rest in names if top == "draftdiff" and rest}
    found = ours - TABLE[name]
    if name in OTHERS:
        found |= {top for top, *_ in names} - set(sys.stdlib_module_names) - OTHERS[name] - {"draftdiff"}
    return found


def test_every_part_has_its_place_in_the_table():
    assert set(parts()) <= set(TABLE) and {"core", "kernels", "pipelines", "cli", "files"} <= set(parts())


@pytest.mark.parametrize("name", sorted(set(TABLE) & set(parts())))
def test_imports_point_downwards(name):
    for file in parts()[name]:
        assert not breaches(name, file), file


@pytest.mark.parametrize(
    ("name", "line", "breach"),
    [
        ("core", "from draftdiff.models.frames import frames_of", "models"),
        ("core", "import numpy", "numpy"),
        ("kernels", "from draftdiff.something_new import x", "something_new"),
        ("video", "from draftdiff.llm.speculation import speculative", "llm"),
        ("llm", "from draftdiff import DraftAttentionConfig", "video"),
        ("models", "import draftdiff.compare.html", "compare"),
        ("compare", "def late():\n    from draftdiff.cli import main", "cli"),
        ("files", "import torch", "torch"),
    ],
)
def test_an_import_that_points_upwards_is_found(name, line, breach, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(f"import math\n{line}\n")
    assert breaches(name, file) == {breach}


def test_no_module_of_the_checkout_exists_twice():
    # `make demo` leaves its videos in compare/, which is no module.
    modules = (path for path in ROOT.iterdir() if path.name.isidentifier() and any(path.rglob("*.py")))
    folders = sorted(path.name for path in modules)
    assert {"draftdiff", "kernels", "pipelines", "samples", "tests"} <= set(folders)
    code = (
        "import draftdiff; from importlib.util import find_spec\n"
        f"print([name for name in {folders} if find_spec(f'draftdiff.{{name}}') is not None])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kernels', 'pipelines']"


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
