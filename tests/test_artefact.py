"""A fine-tune in kilobytes: base and log make the same bits anywhere, and a false log is found."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from plain import run
from safetensors.torch import load_file

from zo.run.artefact import open_artefact
from zo.run.replay import rebuild
from zo.run.verify import Audited, verify
from zo.state.log import Log, read

pytestmark = pytest.mark.slow  # Whole runs.
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command of launch/ in this process; return exit code, stdout and stderr."""
    from zo.config import cli

    def call(name, *arguments):
        main = runpy.run_path(str(ROOT / "launch" / f"{name}.py"))["main"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            code = cli.run(main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def made(overrides, tmp_path, command):
    """Train, and export the log; return the run's folder, the artefact and the run's summary."""

    def make(*extra):
        summary = run(overrides, tmp_path / "run", *extra)
        code, _, said = command(
            "export", f"run={tmp_path / 'run'}", f"to={tmp_path / 'log'}", "artefact=log"
        )
        assert code == 0, said
        return tmp_path / "run", tmp_path / "log", summary

    return make


def relog(folder, change):
    """Write a log again after a change to its list of entries, with right checksums."""
    header, entries = read(folder / "steps.log")
    (folder / "steps.log").unlink()
    log = Log.create(folder / "steps.log", header)
    log.extend(change(entries))
    log.close()


def test_kilobytes_make_the_weights_of_the_full_export(made, command, tmp_path, monkeypatch):
    trained, artefact, summary = made("model.dtype=bfloat16")
    assert sorted(p.name for p in artefact.iterdir()) == ["README.md", "config.yaml", "steps.log"]
    assert sum(p.stat().st_size for p in artefact.iterdir()) < 16_000
    assert command("export", f"run={trained}", f"to={tmp_path / 'full'}")[0] == 0
    code, out, said = command("replay", f"log={artefact}", f"to={tmp_path / 'again'}")
    assert (code, out.splitlines()[-1]) == (0, summary["fingerprint"]), said
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").exists()
    # The card's own snippet, in the folder as it stands.
    card = (artefact / "README.md").read_text()
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["library_name"] == "zo"
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    monkeypatch.chdir(artefact)
    exec(code, names)
    full = load_file(tmp_path / "full" / name)
    state = names["model"].state_dict()
    assert all(torch.equal(state[key], value) for key, value in full.items())
    ids = names["tokenizer"]("the film was", return_tensors="pt")
    assert names["model"].generate(**ids, max_new_tokens=2).shape[1] == 5


KINDS = {
    "rank-one, sampled parts": ["estimator.distribution=rank-one", "estimator.part=sampled"],
    "decay to the base": ["update.anchor=0.1"],
    "adapters": ["peft.type=lora"],
    "virtual tokens": ["peft.type=prompt", "peft.tokens=3"],
    "some parameters": ["model.train=*mlp*|*norm*", "update.weight_decay=0.1"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_log_is_replayed_and_verified_without_its_run(made, kind, tmp_path):
    trained, artefact, summary = made(*KINDS[kind], "run.steps=3")
    trained.rename(tmp_path / "gone")
    found = open_artefact(str(artefact))
    assert rebuild(found).fingerprint == summary["fingerprint"]
    checked = verify(Audited(found), [1, 3], print)
    assert checked["true"] and checked["same_bits"] == 2
