"""The linters and the type checker that pre-commit runs, so that one command is the whole check."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOOKS = re.findall(r"entry: make (\w+),", (ROOT / ".pre-commit-config.yaml").read_text())
RECIPES = dict(re.findall(r"^(\w+):\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = [line for entry in ("lint", "types") for line in RECIPES[entry].split("\n\t")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [command.strip() for command in COMMANDS])
def test_linters_and_type_checker_pass(command):
    run = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_pre_commit_runs_entries_of_the_makefile_that_contributing_explains():
    assert HOOKS == ["lint", "types", "fast"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`make {entry}`" in text for entry in RECIPES)


def test_every_recipe_says_how_where_and_what_to_expect():
    for path in (ROOT / "recipes").glob("*.yaml"):
        header = path.read_text().split("defaults:")[0]
        assert all(f"# {word}:" in header for word in ("Command", "Machine", "Expected")), path
        assert "easured" in header or "measured" in header, path


def extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]


def test_every_extra_that_is_named_is_there():
    found = {"nvme", "peft", "eval", "track", "report", "dev"}
    pages = [ROOT / "README.md", ROOT / "docker" / "Dockerfile", *(ROOT / "docs").rglob("*.md")]
    for path in [*pages, *(ROOT / "zo").rglob("*.py")]:
        text = path.read_text()
        found.update(re.findall(r"\bextra (?:is )?`*(?!and\b)([a-z]+)", text))
        found.update(*(names.split(",") for names in re.findall(r"'\.\[([a-z,]+)\]'", text)))
    assert found <= set(extras())


def test_a_remedy_installs_packages_of_an_extra():
    """Never ``zo[...]`` nor ``.[...]``: a wheel has no checkout, and the index has another zo."""
    packages = {package for each in extras().values() for package in each}
    remedies = [
        remedy
        for path in (ROOT / "zo").rglob("*.py")
        for remedy in re.findall(r"pip install (?:-e )?('.+?)(?:,|;|\"| or)", path.read_text())
    ]
    assert len(remedies) >= 5
    for remedy in remedies:
        assert set(remedy.replace("'", "").split()) <= packages, remedy
