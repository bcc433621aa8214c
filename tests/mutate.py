"""Plants small mistakes in the code, one at a time, and counts those that the tests of the file notice.

    python tests/mutate.py draftdiff/video/steps.py draftdiff/files.py --most 20

A mistake is a comparison, an operator, a constant, a condition or a `not` that is turned around. The tests of a file
are those at its mirrored place (`draftdiff/video/steps.py` -> `tests/video/test_steps.py`), or what TESTS names. The
work is done in a copy of the checkout.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files whose behaviour is held by tests elsewhere than at the mirrored place.
TESTS = {
    "draftdiff/attention/attend.py": ["tests/attention", "tests/test_golden.py"],
    **{
        f"draftdiff/hosts/{name}.py": ["tests/hosts/test_diffusers.py", "tests/video/test_hook.py"]
        for name in ("diffusers", "dispatcher", "stand_in")
    },
    "draftdiff/video/attention.py": ["tests/attention", "tests/kernels/test_block_sparse.py"],
    "draftdiff/video/hook.py": ["tests/video/test_hook.py", "tests/video/test_pipeline.py"],
    "draftdiff/video/patch.py": [
        "tests/video/test_hook.py",
        "tests/video/test_guests.py",
        "tests/video/test_pipeline.py",
    ],
    "draftdiff/video/report.py": [
        "tests/video/test_hook.py",
        "tests/video/test_pipeline.py",
        "tests/video/test_report.py",
    ],
    "draftdiff/video/tasks.py": ["tests/video/test_hook.py"],
}
COMPARED = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
JOINED = {ast.And: ast.Or, ast.Or: ast.And}


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what is changed, source with it) of every mistake that can be planted."""
    count = len(list(ast.walk(ast.parse(source))))
    for index in range(count):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[index]
        before = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
            node.ops[0] = COMPARED[type(node.ops[0])]()
        elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not isinstance(node.left, ast.JoinedStr):
            node.op = COMPUTED[type(node.op)]()
        elif isinstance(node, ast.BoolOp):
            node.op = JOINED[type(node.op)]()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.op = ast.UAdd()
            tree = _without_not(tree, node)
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            node.value = not node.value
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            node.value += 1
        else:
            continue
        changed = ast.unparse(tree)
        if changed != ast.unparse(ast.parse(source)):
            yield getattr(node, "lineno", 0), before, changed


def _without_not(tree: ast.Module, found: ast.UnaryOp) -> ast.Module:
    class Drop(ast.NodeTransformer):
        def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
            self.generic_visit(node)
            return node.operand if node is found else node

    return ast.fix_missing_locations(Drop().visit(tree))


def tests_of(file: str) -> list[str]:
    if file in TESTS:
        return [name for name in TESTS[file] if (ROOT / name).exists()]
    path = Path(file.removeprefix("draftdiff/"))
    return [str(Path("tests") / path.parent / f"test_{path.name}")]


def is_noticed(checkout: Path, tests: list[str], seconds: float) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode in (1, 2)  # a failure, or a module that cannot be imported


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="default: Python files of the product changed since --since")
    parser.add_argument("--since", default="HEAD~1", help="default: %(default)s")
    parser.add_argument("--most", type=int, default=10, help="mistakes per file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300, help="for one run of tests; longer counts as noticed")
    options = parser.parse_args()
    changed = subprocess.run(["git", "diff", "--name-only", options.since], cwd=ROOT, capture_output=True, text=True)
    rooms = ("draftdiff/", "kernels/", "pipelines/")
    files = options.files or [f for f in changed.stdout.split() if f.startswith(rooms) and f.endswith(".py")]
    noticed = planted = 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(
            ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv*", ".oldest*", "*_cache", "compare*")
        )
        for file in files:
            target, tests = checkout / file, tests_of(file)
            if not target.exists() or not tests or not all((ROOT / name).exists() for name in tests):
                print(f"{file}: no tests at {', '.join(tests) or 'its place'}", flush=True)
                continue
            source = target.read_text(encoding="utf-8")
            every = list(mutants(source))
            for line, before, text in random.Random(options.seed).sample(every, min(options.most, len(every))):
                target.write_text(text, encoding="utf-8")
                seen = is_noticed(checkout, tests, options.seconds)
                planted, noticed = planted + 1, noticed + seen
                if not seen:
                    print(f"{file}:{line}: nothing noticed a change of {before[:80]}", flush=True)
            target.write_text(source, encoding="utf-8")
    print(f"{noticed} of {planted} mistakes noticed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
