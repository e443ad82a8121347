"""Law 2: kill -9 at any instant loses no completed step, and the run goes on to the same bits."""

import importlib
import resource
from functools import reduce

import pytest
from logs import same_log
from ranks import KILLED, kill_at, lives, train

from zo.state.log import read

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.

MOMENTS = {
    "before the log's append": ("zo.state.log", "Log.append", 3, True),
    "after the log's append": ("zo.state.log", "Log.append", 3, False),
    "in the middle of the log's append": ("os", "pwrite", 4, False),
    "after config.yaml, before the log": ("zo.state.log", "Log.create", 1, True),
    "while a snapshot is written": ("zo.state.snapshot", "Writer.write", 9, False),
    "before a snapshot": ("zo.state.log", "Log.append", 6, False),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and summary, once for all moments."""
    return tmp_path_factory.mktemp("runs") / "uninterrupted", {}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(overrides, uninterrupted, tmp_path, moment):
    settings = [*overrides, "run.steps=7", "model.dtype=bfloat16", "update.weight_decay=0.1"]
    whole, expected = uninterrupted
    if not expected:
        expected |= train([*settings, f"run.dir={whole}", "run.snapshot_every=0"])
    settings += [f"run.dir={tmp_path}/run", "run.snapshot_every=2"]
    assert train(settings, prelude=(kill_at, *MOMENTS[moment])) == KILLED
    found = train(settings)
    assert found["fingerprint"] == expected["fingerprint"]
    assert found["eval"] == expected["eval"]
    assert same_log(tmp_path / "run" / "steps.log", whole / "steps.log")
    kept = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert len(kept) == 2
    assert all(name.endswith(".safetensors") for name in kept)


@pytest.mark.parametrize("moment", ["before the log's append", "in the middle of the log's append"])
def test_a_killed_run_of_a_diagonal_table_goes_on_to_the_same_bits(overrides, tmp_path, moment):
    """Its projected gradients are limited by those that the log kept."""
    settings = [*overrides, "run.steps=5", "batch.micro=1", "estimator.cover=diagonal"]
    settings += ["estimator.directions=null", "estimator.probes=2", "update.clip=1.0"]
    expected = train([*settings, f"run.dir={tmp_path}/whole"])
    settings.append(f"run.dir={tmp_path}/run")
    assert train(settings, prelude=(kill_at, *MOMENTS[moment])) == KILLED
    found = train(settings)
    assert found["fingerprint"] == expected["fingerprint"]
    assert found["eval"] == expected["eval"]
    assert same_log(tmp_path / "run" / "steps.log", tmp_path / "whole" / "steps.log")
    assert len(read(tmp_path / "run" / "steps.log")[1][0].scalars) == 8


RECORD = ("events.jsonl", "status.json", "report.html")
STARTS = {
    f"{'before' if before else 'after'} {function} {call}": ("os", function, call, before)
    for function, calls in (("fsync", 4), ("rename", 2))
    for call in range(1, calls + 1)
    for before in (True, False)
} | {
    "after the lock": ("os", "pwrite", 1, False),
    "config.yaml half written": ("zo.state.run_folder", "write_yaml", 1, False),
    "after the log's file is begun": ("zo.state.log", "_header_bytes", 1, False),
    "in a write of a block": ("zo.io.engines", "_reserve", 2, False),
    "before a block's rename": ("pathlib", "Path.rename", 2, True),
}


@pytest.mark.parametrize("moment", STARTS)
def test_a_start_that_was_killed_starts_again(overrides, uninterrupted, tmp_path, moment):
    """Random weights on disk are the blocks that a run writes before its log; then config.yaml,
    then the log."""
    settings = [
        *overrides,
        "run.steps=1",
        "eval.every=0",
        "memory.store=disk",
        "model.weights=random",
    ]
    settings.append(f"run.dir={tmp_path}/run")
    assert train(settings, prelude=(kill_at, *STARTS[moment])) == KILLED
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"lock"}
    assert train(settings)["steps"] == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *RECORD,
        "config.yaml",
        "steps.log",
        "metrics.jsonl",
        "blocks",
    }


def no_room_in(module, function):
    """In this process, let no file grow while a function runs: the kernel refuses, as a full disk
    does."""
    *owner, function = function.split(".")
    owner = reduce(getattr, owner, importlib.import_module(module))
    original = getattr(owner, function)

    def full(*arguments, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        try:
            return original(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    setattr(owner, function, full)


@pytest.mark.parametrize(
    "place",
    [("zo.state.run_folder", "write_whole"), ("zo.state.log", "Log.create")],
    ids=["config", "log"],
)
def test_a_start_without_room_starts_again(overrides, tmp_path, place):
    settings = [*overrides, "run.steps=1", "eval.every=0", f"run.dir={tmp_path}/run"]
    (said,) = lives(settings, prelude=(no_room_in, *place))
    assert "UserError" in said
    assert "cannot be written: File too large; choose another folder or make room" in said
    assert train(settings)["steps"] == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *RECORD,
        "config.yaml",
        "steps.log",
        "metrics.jsonl",
    }


def test_a_rank_killed_takes_no_step_with_it(overrides, tmp_path):
    settings = [*overrides, "run.steps=5"]
    expected = train([*settings, f"run.dir={tmp_path}/alone"])
    settings.append(f"run.dir={tmp_path}/run")
    assert train(settings, ranks=2, prelude=(kill_at, "os", "fsync", 6, False)) == KILLED
    assert 0 < len(read(tmp_path / "run" / "steps.log")[1]) < 5
    assert train(settings, ranks=2)["fingerprint"] == expected["fingerprint"]


def test_a_snapshot_cut_short_is_passed_over(overrides, tmp_path):
    settings = [*overrides, f"run.dir={tmp_path}/run", "run.snapshot_every=2"]
    expected = train(settings)
    newest = tmp_path / "run" / "snapshots" / "step-000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert train(settings)["fingerprint"] == expected["fingerprint"]


def test_an_altered_snapshot_is_named_and_never_trusted(overrides, tmp_path):
    settings = [*overrides, f"run.dir={tmp_path}/run", "run.snapshot_every=2"]
    train(settings)
    newest = tmp_path / "run" / "snapshots" / "step-000000004.safetensors"
    data = newest.read_bytes()
    newest.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(AssertionError, match=r"step-000000004\.safetensors is corrupt"):
        train(settings)


def test_more_steps_of_a_finished_run(overrides, tmp_path):
    """Raising run.steps goes on where the run ended; with a constant rate the bits are those of one
    long run."""
    expected = train([*overrides, "run.steps=6", f"run.dir={tmp_path}/long"])
    train([*overrides, "run.steps=4", f"run.dir={tmp_path}/run"])
    assert (
        train([*overrides, "run.steps=6", f"run.dir={tmp_path}/run"])["fingerprint"]
        == expected["fingerprint"]
    )
