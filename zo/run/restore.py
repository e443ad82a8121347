"""A run that is there: its model, rebuilt as base, newest snapshot and the rest of the log, for scores or export."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zo.config.recipes import config_of
from zo.config.schema import Config
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import make_deterministic
from zo.io.hardware import choose_device
from zo.observe.metrics import Progress
from zo.run.assemble import assemble
from zo.run.model_card import Card
from zo.run.problem import Problem, build_problem
from zo.state import log as logs
from zo.state.log import Log, difference
from zo.state.run_folder import RunFolder
from zo.streaming.disk_store import DiskStore
from zo.streaming.replica import Replica


def restore_snapshot(
    folder: RunFolder, replica: Replica, log: Log, say: Callable[[str], None]
) -> None:
    """Load the newest snapshot of a log, if there is one; a durable store has its blocks instead.

    ``say`` takes a line for each snapshot that is ignored.

    Raises:
        UserError: its weights are not the ones that were saved.
    """
    store = replica.store
    if store.is_durable:
        return
    snapshot, ignored = folder.snapshot(store.base, log)
    for line in ignored:
        say(line)
    if snapshot is None:
        return
    assert not isinstance(store, DiskStore)
    try:
        fingerprint = replica.combine(store.fill(snapshot.read, snapshot.version))
    except OSError as error:
        raise UserError(
            f"{snapshot.path} cannot be read ({error}); delete that file and start the same command again"
        ) from error
    if fingerprint != snapshot.fingerprint:
        raise UserError(
            f"{snapshot.path} is corrupt: its weights do not have its fingerprint; delete that "
            "file and start the same command again"
        )


@dataclass(frozen=True)
class FinishedRun:
    """A run's model at the last entry of its log."""

    problem: Problem
    mesh: Mesh
    replica: Replica
    content: dict[str, Any]
    header: dict[str, Any]
    steps: int


def load_run(path: Path, change: Callable[[Config], Config] = lambda config: config) -> FinishedRun:
    """Rebuild the weights of a run, in the store that it trained with.

    Args:
        path: its folder; nothing is written there.
        change: what to do differently from its configuration, such as other data to score.

    Raises:
        UserError: there is no run, or its base model is not what it was.
    """
    folder = RunFolder(path)
    content = folder.read_config()
    header, entries = logs.read(folder.log_file)
    config = change(config_of(content["config"]))
    problem, mesh, replica = _load(config, folder.blocks(0))
    if replica.store.base != header.get("base"):
        raise UserError(
            f"run={path}: the base model is not the one that its log began from; restore that model"
        )
    if (begun := content.get("log_header")) and (found := difference(header, begun)):
        raise UserError(
            f"run={path}: steps.log is of another run than config.yaml: {found[0]} is {found[1]} there and "
            f"{found[2]} in config.yaml; put this run's log back"
        )
    log = Log(header, entries)
    restore_snapshot(folder, replica, log, Progress(0, 0, mesh.rank == 0).say)
    replica.open(log)
    return FinishedRun(problem, mesh, replica, content, header, len(entries))


def load_plain(config: Config) -> FinishedRun:
    """Load a model that no run has changed."""
    problem, mesh, replica = _load(config, Path())
    replica.open(
        Log(
            {
                "directions": 1,
                "seed": 0,
                "distribution": "rademacher",
                "rule": "sgd",
                "weight_decay": 0.0,
            }
        )
    )
    return FinishedRun(problem, mesh, replica, {}, {}, 0)


def _load(config: Config, blocks: Path) -> tuple[Problem, Mesh, Replica]:
    device = choose_device(config.run.device)
    make_deterministic(device)
    mesh = Mesh(device.type, config.mesh.timeout_s)
    say = Progress(0, 0, mesh.rank == 0).say
    say(f"reading {config.model.name} and {config.data.name}")
    problem = build_problem(config)
    with torch.no_grad():
        return problem, mesh, assemble(problem, config, mesh, blocks, say, writable=False)


def adapted(
    config: Config, data: str | None, device: str | None, trust_remote_code: bool
) -> Config:
    """Return a run's configuration as a command that reads the run uses it.

    Args:
        config: of the run.
        data: other data to score: all of it, none is held out; ``None`` for the run's own.
        device: to compute on; ``None`` for the run's own.
        trust_remote_code: whether code that the model's folder or repository brings may run.
    """
    if data is not None:
        config = replace(config, data=replace(config.data, name=data, dev=data, dev_examples=10**9))
    if device is not None:
        config = replace(config, run=replace(config.run, device=device))
    return replace(config, model=replace(config.model, trust_remote_code=trust_remote_code))


def card_of(
    content: dict[str, Any],
    header: dict[str, Any],
    steps: int,
    scores: dict[str, float],
    fingerprint: str,
) -> Card:
    """The model card of a run.

    Args:
        content: what its ``config.yaml`` holds.
        header: of its log.
        steps: entries of its log that were replayed.
        scores: on held-out data; may be empty.
        fingerprint: of the weights.
    """
    config = content["config"]
    for key, kind in (("command", str), ("versions", dict)):
        if not isinstance(content.get(key), kind):
            raise UserError(
                f"the run's config.yaml has no usable {key}: it must hold a {kind.__name__}; put "
                "the file back that the run wrote"
            )
    estimator, update = config["estimator"], config["update"]
    method = (
        f"{estimator['name']}, {estimator['directions']} {estimator['distribution']} direction(s) a step, eps "
        f"{estimator['eps']}; {update['name']}, lr {update['lr']}, {update['schedule']}"
    )
    return Card(
        base=config["model"]["name"] or "own model",
        base_fingerprint=header["base"],
        data=config["data"]["name"] or "own data",
        data_checksum=header.get("data", "unknown"),
        recipe=config["recipe"],
        command=content["command"],
        seed=config["run"]["seed"],
        steps=steps,
        method=method,
        metrics=scores,
        versions=content["versions"],
        fingerprint=fingerprint,
    )
