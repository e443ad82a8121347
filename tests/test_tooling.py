"""The linters and the type checker that pre-commit runs, so that one command is the whole check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOOKS = re.findall(r"entry: ([^,]+),", (ROOT / ".pre-commit-config.yaml").read_text())
ARGUMENTS = {"ruff format": ["--check", "."], "ruff check": ["."], "mypy": []}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook(hook):
    run = subprocess.run(
        [sys.executable, "-m", *hook.split(), *ARGUMENTS[hook]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_recipe_says_how_where_and_what_to_expect():
    for path in (ROOT / "recipes").glob("*.yaml"):
        header = path.read_text().split("defaults:")[0]
        assert all(f"# {word}:" in header for word in ("Command", "Machine", "Expected")), path
        assert "easured" in header or "measured" in header, path
