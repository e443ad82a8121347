"""The wheel alone, away from the checkout, as the console script runs it."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the files of the wheel that the source archive gives."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("zo", "recipes", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        subprocess.run(["cp", "-a", ROOT / name, source], check=True)
    pack = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", pack], cwd=source, stdout=subprocess.PIPE, check=True)
    (archive,) = folder.glob("*.tar.gz")
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, archive]
    subprocess.run([*PIP, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture
def zo(installed, tmp_path):
    """Run the installed console script in an empty folder: exit code, stdout, stderr."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, installed / "bin" / "zo", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_newcomers_path(zo, installed, tiny_model, reviews, tmp_path):
    """Each step is one line, so that another is one line more."""

    def step(*arguments):
        code, out, err = zo(*arguments)
        assert code == 0, err
        return out

    where = [sys.executable, "-c", "import zo; print(zo.__file__)"]
    env = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert Path(found.strip()) == installed / "zo" / "__init__.py"

    step("init", "recipe=default", "to=my.yaml")
    assert (tmp_path / "my.yaml").read_text() == (ROOT / "recipes" / "default.yaml").read_text()
    own = [f"model.name={tiny_model}", f"data.name={reviews}", "data.template='{text} It was'"]
    own += ["data.label_words=[' terrible',' great']", "batch.sequences=4", "batch.micro=4"]
    small = ["run.steps=2", "run.dir=run", "update.lr=1e-3", "data.dev_examples=4"]
    small += ["batch.max_tokens=48", "batch.fold=8", "run.threads=1"]  # to share with a second rank
    out = step("train", "recipe=my.yaml", *own, *small)
    assert json.loads(out.splitlines()[-1])["steps"] == 2
    assert (tmp_path / "run" / "report.html").exists()
    step("export", "run=run", "to=model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "load_config('quickstart', [" in card
    assert "my.yaml" not in card
    step("export", "run=run", "to=artefact", "artefact=log")
    fingerprint = json.loads(out.splitlines()[-1])["fingerprint"]
    assert step("replay", "log=artefact", "to=again").splitlines()[-1] == fingerprint
    assert json.loads(step("verify", "artefact", "entries=1").splitlines()[-1])["true"]
    step("diff", "run", "artefact")
    # Two ranks, with neither the console script nor a checkout.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    again = ["recipe=my.yaml", *own, *small, "run.dir=ranks"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "zo.train", *again],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fingerprint"] == fingerprint


def test_the_wheel_has_every_recipe(zo):
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert [line.split()[0] for line in zo("recipes")[1].splitlines()] == names


def test_the_version_is_the_same_wherever_it_is_written():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}\n" in (ROOT / "docs" / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command is given; use zo train|"),
        (["trian"], "trian is not a command; use zo train|"),
        (["init", "recipe=quikstart", "to=a.yaml"], "recipe=quikstart is not known"),
        (["init", "to=mine.yaml"], "to=mine.yaml exists"),
        (["train", "recipe=none.yaml"], "recipe=none.yaml is not a file"),
    ],
)
def test_a_mistake_is_one_line(zo, tmp_path, arguments, message):
    (tmp_path / "mine.yaml").write_text("mine")
    code, _, err = zo(*arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "mine"
