"""Restoring a run's model: base, newest snapshot and the rest of the log, for scores or export."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from zo.config.objective import reward_name
from zo.config.recipes import config_of
from zo.config.schema import Config
from zo.data.named import TEST
from zo.data.rows import TASKS as ROW_TASKS
from zo.data.tasks import Task
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism, make_deterministic
from zo.io.hardware import choose_device
from zo.observe.metrics import last_scores, read_history
from zo.observe.progress import Progress
from zo.run.assemble import assemble, trained_header
from zo.run.base_card import read_base_card
from zo.run.export import write_folder
from zo.run.model_card import Card, python_of
from zo.run.problem import Problem, build_problem
from zo.run.reference import find_reference
from zo.state import log as logs
from zo.state.log import Log, difference, untrained_header
from zo.state.run_folder import RunFolder
from zo.streaming.disk_store import DiskStore
from zo.streaming.replica import Replica


def save_snapshot(folder: RunFolder, replica: Replica, log: Log, is_writer: bool) -> None:
    """Write the weights, unless the store is durable: its blocks are snapshots already."""
    if replica.store.is_durable:
        return
    if is_writer:
        folder.save_snapshot(log.version, replica, replica.store.base, log)
    elif replica.slices is not None:
        replica.fingerprint()  # The writer's pass gathers this rank's slices.


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


def rebuild(problem: Problem, config: Config, mesh: Mesh, folder: RunFolder, log: Log) -> Replica:
    """Load the weights after the entries of a log, beside a run that is done; every rank calls it.

    Raises:
        UserError: the base model cannot be read, or there is not enough memory.
    """
    phase, blocks = Progress(0, 0, mesh.rank == 0).phase, folder.blocks(mesh.rank)
    replica, _ = assemble(problem, config, mesh, blocks, phase, writable=False)
    restore_snapshot(folder, replica, log, lambda line: None)
    replica.open(log)
    return replica


@dataclass(frozen=True)
class FinishedRun:
    """A run's model after some entries of its log."""

    problem: Problem
    mesh: Mesh
    replica: Replica
    content: dict[str, Any]
    header: dict[str, Any]
    steps: int
    last_step: int
    """Of the run; ``steps`` may be an earlier one."""
    config: Config


def load_run(
    path: Path,
    change: Callable[[Config], Config] = lambda config: config,
    step: int | Literal["best"] | None = None,
) -> FinishedRun:
    """Rebuild the weights of a run, in the store that it trained with.

    Args:
        path: folder of the run; nothing is written there.
        change: makes a new configuration of the run's, for example with other data to score.
        step: after which the weights are wanted, 0 for the base model, ``best`` for that of the
            best evaluation; ``None`` for the last.

    Raises:
        UserError: there is no run, or no such step in it, or its base model or log has changed.
    """
    folder = RunFolder(path)
    content = folder.read_config()
    header, entries = logs.read(folder.log_file)
    if step == "best":
        metric = config_of(content["config"]).eval.metric
        best = read_history(folder.metrics_file, len(entries), metric).best()
        if best is None:
            raise UserError(f"step=best: run={path} has no evaluation; give a step's number")
        step = best.step
    if step is not None and step > len(entries):
        raise UserError(f"step={step} is not in run={path}, whose last step is {len(entries)}")
    last, entries = len(entries), entries[:step]
    config = change(config_of(content["config"]))
    problem, mesh, replica, held = _load(config, folder.blocks(0), path)
    if held != header.get("held", []):
        raise UserError(
            f"run={path}: steps.log holds other parameters as they are than this data would; give "
            "data of the kind that the run was trained on"
        )
    if replica.store.base != header.get("base"):
        raise UserError(f"run={path} was started from a different base model; restore that model")
    if (begun := content.get("log_header")) and (found := difference(header, begun)):
        raise UserError(
            f"run={path}: steps.log belongs to another run: its {found[0]} is {found[1]}, and "
            f"{found[2]} in config.yaml; restore this run's log"
        )
    kept = {key: header[key] for key in ("train", "peft", "anchor") if key in header}
    if kept != trained_header(config):
        raise UserError(
            f"run={path}: config.yaml and steps.log differ in model.train, peft or update.anchor; "
            "put the config.yaml back that the run wrote"
        )
    log = Log(header, entries)
    # Snapshots after the step that is wanted are no news.
    say = Progress(0, 0, mesh.rank == 0).say if step is None else lambda line: None
    restore_snapshot(folder, replica, log, say)
    replica.open(log)
    return FinishedRun(problem, mesh, replica, content, header, len(entries), last, config)


def load_plain(config: Config) -> FinishedRun:
    """Load a model as it is, without a run."""
    problem, mesh, replica, _ = _load(config, Path(), None)
    replica.open(Log(untrained_header()))
    return FinishedRun(problem, mesh, replica, {}, {}, 0, 0, config)


def _load(
    config: Config, blocks: Path, folder: Path | None
) -> tuple[Problem, Mesh, Replica, list[str]]:
    """Return a model at version 0, in a store whose blocks are in ``blocks``, and what is held.

    ``folder`` is of its run, if there is one.
    """
    device = choose_device(config.run.device)
    make_deterministic(device)
    mesh = Mesh(device.type, config.mesh.timeout_s)
    phase = Progress(0, 0, mesh.rank == 0).phase
    with phase(f"reading model {config.model.name} and data {config.data.name or config.task}"):
        problem = build_problem(config)
    with torch.no_grad(), explain_nondeterminism():
        replica, structure = assemble(problem, config, mesh, blocks, phase, writable=False)
    find_reference(problem.reference, replica, mesh, phase, config, folder, steps=0)
    return problem, mesh, replica, list(structure.held)


def with_prompt(config: Config) -> Config:
    """Return a run's configuration with its task's prompt and label words, for other data, too."""
    _, template, words = ROW_TASKS.get(config.data.name, (None, None, None))
    if not words or config.data.template is not None or config.data.label_words is not None:
        return config
    return replace(config, data=replace(config.data, template=template, label_words=words))


def adapted(
    config: Config, data: str | None, device: str | None, trust_remote_code: bool
) -> Config:
    """Return a run's configuration for a command that only reads the run.

    Args:
        config: of the run.
        data: other data to score: all of it, none is held out; of a task also ``test``, its test
            rows; ``None`` for the run's own.
        device: to compute on; ``None`` for the run's own.
        trust_remote_code: allow code from the model's folder or repository to run.
    """
    if data is not None and (reward := reward_name(config.objective, config.data.name)):
        # The reward of a task's data is that of the run, on other data too.
        config = replace(config, objective=replace(config.objective, name=reward))
    if data == TEST and config.task is not None:
        config = replace(config, data=replace(config.data, dev=TEST))
    elif data is not None:
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
    task: Task | None = None,
    last_step: int | None = None,
) -> Card:
    """Return the model card of a run.

    Args:
        content: of its ``config.yaml``.
        header: of its log.
        steps: entries of its log that were replayed.
        scores: on held-out data; may be empty.
        fingerprint: of the weights.
        task: of the run's examples.
        last_step: of the run; by default ``steps``.
    """
    config = content["config"]
    is_own, is_choice = content.get("own") is True, task is not None and task.kind == "choice"
    for key, kind in (("command", str), ("versions", dict)):
        if not isinstance(content.get(key), kind):
            raise UserError(
                f"the run's config.yaml has no usable {key}: it must hold a {kind.__name__}; put "
                "the file back that the run wrote"
            )
    estimator, update = config["estimator"], config["update"]
    method = (
        f"{estimator['name']}, {header['directions']} {estimator['distribution']} "
        f"direction(s) a step of part {estimator.get('part', 'all')}, eps {estimator['eps']}; "
        f"{update['name']}, lr {update['lr']}, {update['schedule']}"
    )
    return Card(
        base=(not is_own and config["model"]["name"]) or "own model",
        base_fingerprint=header["base"],
        data=(not is_own and (config["data"]["name"] or config.get("task"))) or "own data",
        data_checksum=header.get("data", "unknown"),
        recipe=config["recipe"],
        command=content["command"] or python_of(config_of(config), is_own),
        seed=config["run"]["seed"],
        steps=steps,
        method=method,
        metrics=scores,
        versions=content["versions"],
        fingerprint=fingerprint,
        last_step=last_step,
        base_card={}
        if is_own
        else read_base_card(config["model"]["name"], config["model"].get("revision")),
        template=task.template if task and is_choice else None,
        label_words=task.names if task and is_choice else (),
        adapter=(config.get("peft") or {}).get("type"),
    )


def export_model(
    problem: Problem, replica: Replica, mesh: Mesh, folder: RunFolder, fingerprint: str
) -> None:
    """Write a run's ``model/`` on rank 0; the ranks that share its slices pass over them with it.

    Args:
        problem: of the run.
        replica: the weights that are written, with their log.
        mesh: of the run; every rank calls this.
        folder: of the run.
        fingerprint: of the weights.
    """
    if mesh.rank:
        if mesh.slices is not None:
            replica.pass_over()
        return
    log, content = replica.log, folder.read_config()
    scores = last_scores(folder.metrics_file, log.version)
    header, last = log.header, len(logs.read(folder.log_file)[1])
    card = card_of(content, header, log.version, scores, fingerprint, problem.task, last)
    tokenizer = problem.tokenizer
    write_folder(replica.model, tokenizer, folder.model, card, source=replica, replace=True)
