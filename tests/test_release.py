"""What is published beside the code: the long description, the citation, the change log, GitHub's files."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
import yaml

import draftdiff

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'^Source = "(.+)"$', PYPROJECT, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def description() -> str:
    """The long description, as a build gets it."""
    with pytest.MonkeyPatch.context() as patch:
        given: dict = {}
        patch.setattr(setuptools, "setup", lambda **values: given.update(values))
        runpy.run_path(str(ROOT / "setup.py"))
    assert given["long_description_content_type"] == "text/markdown"
    return given["long_description"]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_the_description_on_an_index_has_no_relative_link_or_picture(description):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(links(description)) == len(links(readme)) > 20
    assert all(link.startswith("https://") for link in links(description))
    assert "<img" not in description and "<a " not in description


def test_its_links_lead_to_files_of_this_version(description):
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    places = (f"{REPOSITORY}/blob/v{draftdiff.__version__}/", f"{raw}/v{draftdiff.__version__}/")
    ours = [link for link in links(description) if link.startswith((REPOSITORY, raw))]
    assert len(ours) > 15
    for link in ours:
        place = next(place for place in places if link.startswith(place))
        assert (ROOT / link.removeprefix(place).partition("#")[0]).is_file(), link
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", description)
    assert pictures and all(picture.startswith(raw) for picture in pictures)


def test_version_and_repository_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == draftdiff.__version__ and citation["repository-code"] == REPOSITORY
    assert f'version = "{draftdiff.__version__}"' not in PYPROJECT, "it stands in _version.py alone"
    for name in ("CHANGELOG.md", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml"):
        for link in re.findall(
            r"https://github\.com/[\w-]*draftdiff[\w/-]*", (ROOT / name).read_text(encoding="utf-8")
        ):
            assert link.startswith(REPOSITORY), name


def test_the_change_log_knows_this_version():
    assert draftdiff.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem
)
def test_issue_forms_have_what_github_asks_for(file):
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.stem == "config":
        assert form["contact_links"][0]["url"].startswith(REPOSITORY)
        return
    assert form["name"] and form["description"] and form["body"]
    assert all(part["type"] in ("input", "textarea") and part["attributes"]["label"] for part in form["body"])
    names = [part["id"] for part in form["body"]]
    assert len(names) == len(set(names))


def test_the_workflow_runs_targets_that_exist_and_every_python_that_is_named():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    cases = jobs["test"]["strategy"]["matrix"]["include"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make ")]
    targets = {case["target"].split()[0] for case in cases} | {step.split()[1] for step in steps} - {"${{"}
    assert {"test", "test-oldest", "stranger", "dist", "docs", "lint"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    tested = {case["python"] for case in cases if case["target"] == "test"}
    assert tested == set(re.findall(r"Python :: (3\.\d+)\"", PYPROJECT))
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "test" in jobs["publish"]["needs"]


def test_a_source_distribution_is_told_of_all_that_its_tests_read():
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]+", manifest))
    for name in ("tests", "docs", "samples", ".ci", ".github", "Makefile", "mkdocs.yml", "SECURITY.md", "CITATION.cff"):
        assert name in named and (ROOT / name).exists()
