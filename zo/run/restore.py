"""Restoring a run's model: base, newest snapshot and the rest of the log, for scores or export."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zo.config.objective import reward_name
from zo.config.recipes import config_of
from zo.config.schema import Config
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism, make_deterministic
from zo.io.hardware import choose_device
from zo.observe.progress import Progress
from zo.run.assemble import assemble, trained_header
from zo.run.model_card import Card
from zo.run.problem import Problem, build_problem
from zo.state import log as logs
from zo.state.log import Log, difference, untrained_header
from zo.state.run_folder import RunFolder
from zo.streaming.disk_store import DiskStore
from zo.streaming.replica import Replica


def restore_snapshot(
    folder: RunFolder, replica: Replica, log: Log, say: Callable[[str], None]
) -> None:
    """Load the newest snapshot that a log covers, unless the store is durable.

    ``say`` takes a line for each snapshot that is ignored.

    Raises:
        UserError: the snapshot cannot be read, or is corrupt.
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
            f"{snapshot.path} cannot be read ({error}); delete it and start the command again"
        ) from error
    if fingerprint != snapshot.fingerprint:
        raise UserError(
            f"{snapshot.path} is corrupt: its weights do not have its fingerprint; delete it and "
            "start the command again"
        )


@dataclass(frozen=True)
class FinishedRun:
    """A run's model after some entries of its log."""

    problem: Problem
    mesh: Mesh
    replica: Replica
    content: dict[str, Any]
    header: dict[str, Any]
    steps: int


def load_run(
    path: Path,
    change: Callable[[Config], Config] = lambda config: config,
    step: int | None = None,
) -> FinishedRun:
    """Rebuild the weights of a run, in the store that it trained with.

    Args:
        path: folder of the run; nothing is written there.
        change: makes a new configuration of the run's, for example with other data to score.
        step: after which the weights are wanted, 0 for the base model; ``None`` for the last.

    Raises:
        UserError: there is no run, or no such step in it, or its base model or log has changed.
    """
    folder = RunFolder(path)
    content = folder.read_config()
    header, entries = logs.read(folder.log_file)
    if step is not None and step > len(entries):
        raise UserError(f"step={step} is not in run={path}, whose last step is {len(entries)}")
    entries = entries[:step]
    config = change(config_of(content["config"]))
    problem, mesh, replica = _load(config, folder.blocks(0))
    if replica.store.base != header.get("base"):
        raise UserError(f"run={path} was started from a different base model; restore that model")
    if (begun := content.get("log_header")) and (found := difference(header, begun)):
        raise UserError(
            f"run={path}: steps.log belongs to another run: its {found[0]} is {found[1]}, and "
            f"{found[2]} in config.yaml; restore this run's log"
        )
    if {key: header[key] for key in ("train", "peft") if key in header} != trained_header(config):
        raise UserError(
            f"run={path}: config.yaml and steps.log differ in model.train or peft; put the "
            "config.yaml back that the run wrote"
        )
    log = Log(header, entries)
    # Snapshots after the step that is wanted are no news.
    say = Progress(0, 0, mesh.rank == 0).say if step is None else lambda line: None
    restore_snapshot(folder, replica, log, say)
    replica.open(log)
    return FinishedRun(problem, mesh, replica, content, header, len(entries))


def load_plain(config: Config) -> FinishedRun:
    """Load a model as it is, without a run."""
    problem, mesh, replica = _load(config, Path())
    replica.open(Log(untrained_header()))
    return FinishedRun(problem, mesh, replica, {}, {}, 0)


def _load(config: Config, blocks: Path) -> tuple[Problem, Mesh, Replica]:
    device = choose_device(config.run.device)
    make_deterministic(device)
    mesh = Mesh(device.type, config.mesh.timeout_s)
    phase = Progress(0, 0, mesh.rank == 0).phase
    with phase(f"reading model {config.model.name} and data {config.data.name}"):
        problem = build_problem(config)
    with torch.no_grad(), explain_nondeterminism():
        replica, _ = assemble(problem, config, mesh, blocks, phase, writable=False)
    return problem, mesh, replica


def adapted(
    config: Config, data: str | None, device: str | None, trust_remote_code: bool
) -> Config:
    """Return a run's configuration for a command that only reads the run.

    Args:
        config: of the run.
        data: other data to score: all of it, none is held out; ``None`` for the run's own.
        device: to compute on; ``None`` for the run's own.
        trust_remote_code: allow code from the model's folder or repository to run.
    """
    if data is not None:
        # The reward of a task's data is that of the run, on other data too.
        reward = reward_name(config.objective, config.data.name)
        config = replace(config, objective=replace(config.objective, name=reward))
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
    """Return the model card of a run.

    Args:
        content: of its ``config.yaml``.
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
        f"{estimator['name']}, {header['directions']} {estimator['distribution']} "
        f"direction(s) a step, eps {estimator['eps']}; "
        f"{update['name']}, lr {update['lr']}, {update['schedule']}"
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
