"""The documentation: it builds without a warning, its examples run, and it says what zo says."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from plain import PLAIN

import zo
from zo.config import recipes
from zo.config.recipes import keys
from zo.data.papers import TASKS
from zo.distributed.mesh import fit
from zo.errors import UserError
from zo.method.estimator import ESTIMATORS

ROOT = Path(__file__).resolve().parent.parent
DOCS, PAGES = ROOT / "docs", ROOT / "docs" / "pages"
TINY = [s for s in PLAIN if s.startswith("run.trackers")] + [
    "data.dev_examples=4",
    "batch.sequences=2",
    "batch.max_tokens=32",
    "eval.every=2",
    "estimator.part=all",
    "mesh.check_every=0",
    "export.at_end=false",
]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (PAGES / page).read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; it was built without a warning."""
    pytest.importorskip(
        "material", reason="mkdocs-material is not installed; the extra test has it"
    )
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = ["mkdocs", "build", "--strict", "--quiet", "--config-file", DOCS / "mkdocs.yml"]
    run = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # The theme's banner on its own future, which is no warning of the pages'.
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    for page in PAGES.rglob("*.md"):
        html = (site / page.relative_to(PAGES).with_suffix(".html")).read_text()
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", html)
        loaded = [url for tag in tags for url in re.findall(r'(?:src|href)="([^"]+)', tag)]
        assert loaded and not [url for url in loaded if "//" in url], page


@pytest.mark.slow
def test_every_key_is_in_the_site_with_its_sentence(site):
    text = re.sub(r"<[^>]+>", "", (site / "keys.html").read_text())
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    for key, _, sentence in keys():
        assert f"{key}\n" in text and sentence in text, key


def test_keys_that_the_pages_name_exist():
    known = {key for key, _, _ in keys()}
    groups = {key.partition(".")[0] for key in known}
    for page in PAGES.rglob("*.md"):
        named = re.findall(r"[`\" ]([a-z]+\.[a-z_]+)(?=[`=])", page.read_text())
        wrong = [key for key in named if key.partition(".")[0] in groups and key not in known]
        assert not wrong, page


def test_the_pictures_are_those_that_the_code_draws(tmp_path):
    """Other versions of the library place things elsewhere; what is written must be the same."""
    runpy.run_path(str(DOCS / "pictures.py"))["draw"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == sorted(path.name for path in (PAGES / "pictures").glob("*"))
    text = (PAGES / "how-it-works.md").read_text()
    for name in drawn:
        now, then = (
            re.findall(r"<text[^>]*>(.*?)</text>", (folder / name).read_text(), re.S)
            for folder in (tmp_path, PAGES / "pictures")
        )
        assert now == then and now and f"(pictures/{name})" in text, name


@pytest.mark.parametrize("page", ["extend/task", "extend/objective", "extend/estimator", "rewards"])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, tiny_model):
    """On a tiny model in place of the quickstart's; they assert what they show."""

    def load_config(recipe, overrides):
        own = [f"model.name={tiny_model}", *TINY]
        given = {override.partition("=")[0] for override in overrides}
        return recipes.load_config(
            recipe, [*(o for o in own if o.partition("=")[0] not in given), *overrides]
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zo, "load_config", load_config, raising=False)
    found, names = blocks(f"{page}.md", "python"), {"__name__": "page"}
    assert found
    with patch.dict(TASKS), patch.dict(ESTIMATORS):  # What a page adds is taken out again.
        for block in found:
            exec(compile(block, page, "exec"), names)


@pytest.mark.slow
def test_the_distribution_that_a_page_adds_has_the_bits_of_its_equation(tmp_path):
    shutil.copytree(ROOT / "zo", tmp_path / "zo", ignore=shutil.ignore_patterns("__pycache__"))
    (diff,), (check,) = (blocks("extend/distribution.md", kind) for kind in ("diff", "python"))
    (tmp_path / "sparse.diff").write_text(diff)
    subprocess.run(["git", "apply", "sparse.diff"], cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True, env=environment)


def texts_of_code():
    """Yield the fixed parts of every text in zo, each in order."""
    for path in (ROOT / "zo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield [node.value]


def fits(parts, text, match):
    """True if a text has these parts in their order, with anything between them."""
    pattern = ".*".join(map(re.escape, parts))
    return max(parts, key=len) in text and match(pattern, text, re.S) is not None


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    """A message stands on the page whole, or as a part of the code's; ``…`` is anything."""
    code = {"".join(parts) for parts in texts_of_code()}
    code = [text for text in code if len(text) > 25]
    messages = blocks("troubleshooting.md", "text")
    assert len(messages) > 20
    for message in map(str.strip, messages):
        assert any(
            fits(message.split("…"), text, re.search)
            or fits(text.split("…"), message, re.fullmatch)
            for text in code
        ), message


def test_the_page_on_meshes_shows_the_error_of_its_example():
    config = recipes.load_config("quickstart", ["mesh.perturb=2"])
    with pytest.raises(UserError) as error:
        fit(config.mesh, 2, config.grid)
    assert blocks("mesh.md", "text") == [f"error: {error.value}\n"]


def test_the_gap_to_adamw_is_the_measured_one():
    page = (PAGES / "when-not.md").read_text()
    measured = (ROOT / "benchmarks" / "README.md").read_text().splitlines()
    rows = re.findall(r"^\|[^|]+\| (\d+) \| ([\d.]+ \| [\d.]+, [\d.]+) \|$", page, re.M)
    assert len(rows) == 5
    for steps, scores in rows:
        assert any(f"| {steps} |" in line and scores in line for line in measured), scores


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((DOCS / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w/-]+\.md", json.dumps(nav)))
    assert named == {str(p.relative_to(PAGES)) for p in PAGES.rglob("*.md")} | {"keys.md"}
