"""What the documents for maintainers say of the repository is so."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/architecture.md", "CONTRIBUTING.md", "RELEASE.md")


def named_paths(text: str) -> set[str]:
    """Paths in backquotes: with a slash, or with the ending of a file."""
    return set(re.findall(r"`(\.?[\w][\w./-]*/|[\w./-]*\w\.(?:py|md|toml|txt|sh|yml)|\.[\w]+/\w+)`", text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_paths_that_are_named_exist(document):
    paths = named_paths((ROOT / document).read_text(encoding="utf-8"))
    assert len(paths) > 2
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_the_tree_holds_every_module_and_folder_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "diffusers_mcm"
    folders = {f"diffusers_mcm/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert folders <= named_paths(text)


def test_the_ways_name_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    ways = "".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
    names = set(re.findall(r"\b[\w/]+\.py\b", ways))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusers_mcm").rglob("*.py")}
    assert len(names) > 10
    assert {name for name in names if not any(file.endswith(f"/{name}") for file in files)} == set()


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make (\w+) +\S", shown, re.M)) == targets


def test_the_workflow_runs_what_ci_runs():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "checks.yml").read_text(encoding="utf-8")
    assert re.search(r"^make types", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
