"""The long description that an index shows: README.md, whose links lead to files of the repository at this version.

All else about the package stands in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

_ROOT = Path(__file__).resolve().parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def _found(pattern: str, file: str) -> str:
    match = re.search(pattern, (_ROOT / file).read_text(encoding="utf-8"))
    assert match, f"{file} lacks {pattern}"
    return match[1]


def long_description() -> str:
    repository = _found(r'(?m)^Source = "(.+)"$', "pyproject.toml")
    version = _found(r'__version__ = "(.+)"', "draftdiff/_version.py")
    raw = repository.replace("//github.com/", "//raw.githubusercontent.com/")
    places = {"!": f"{raw}/v{version}", "": f"{repository}/blob/v{version}"}
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    return _LINK.sub(lambda link: f"{link[1]}[{link[2]}]({places[link[1]]}/{link[3]})", text)


setup(long_description=long_description(), long_description_content_type="text/markdown")
