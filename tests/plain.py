"""The plainest run, one dense direction a step that every micro-batch sees, and a model card."""

import tempfile
from functools import cache
from pathlib import Path

import pytest

from zo import Trainer, load_config
from zo.errors import UserError
from zo.run.model_card import Card

PLAIN = [
    "batch.sequences=16",
    "batch.micro=8",
    "batch.max_tokens=128",
    "batch.fold=null",
    "estimator.name=spsa",
    "estimator.directions=null",
    "estimator.distribution=rademacher",
    "estimator.cover=full",
    "estimator.probes=1",
    "estimator.part=all",
    "estimator.eps=1e-3",
    "update.lr=1.5e-4",
    "update.clip=null",
    "update.schedule=linear",
    "run.trackers=[]",
]

CARD = Card(
    base="HuggingFaceTB/SmolLM2-135M-Instruct",
    base_fingerprint="b" * 64,
    data="movie-reviews",
    data_checksum="d" * 64,
    recipe="quickstart",
    command="torchrun --nproc-per-node 2 launch/train.py recipe=quickstart run.steps=7 "
    "'data.template=\"{text} so\"'",
    seed=3,
    steps=7,
    method="spsa, 1 direction, rademacher, eps 0.001; sgd, lr 0.0001",
    metrics={"accuracy": 0.75390625, "loss": 0.5},
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    fingerprint="f" * 64,
)


def plain_config(overrides=()):
    """Return the configuration of the plainest run with overrides."""
    return load_config("quickstart", [*PLAIN, *overrides])


def run(overrides, folder, *extra):
    """Train the plainest run with overrides in a folder, in this process."""
    config = plain_config([*overrides, *extra, f"run.dir={folder}"])
    return Trainer(config, command="test").train()


@cache
def fingerprint(*overrides):
    """Return the fingerprint of such a run, which is trained once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        return run(overrides, Path(folder) / "run")["fingerprint"]


def assert_refused(said, overrides, folder, *extra):
    """Assert that a run ends in one line that matches, before it has a log."""
    with pytest.raises(UserError, match=said) as error:
        run(overrides, folder, *extra)
    assert "\n" not in str(error.value)
    assert not (folder / "steps.log").exists()


def contents(folder):
    """Return the bytes of each file of a folder by its name."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}
