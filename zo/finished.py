"""A run that is there: its model, rebuilt as base, newest snapshot and the rest of the log, for scores or export."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo import log as logs
from zo.blocks import find_layout
from zo.config import Config, UserError
from zo.export import Card
from zo.folder import RunFolder
from zo.hardware import choose_device
from zo.log import Log
from zo.metrics import Progress
from zo.problem import Problem, build_problem
from zo.recipe import config_of
from zo.replica import Replica, Weights
from zo.selfcheck import move_resident, self_check
from zo.store import DiskStore


def restore(folder: RunFolder, weights: Weights, log: Log) -> None:
    """Take over the newest snapshot that a log covers, if there is one; a disk store has its blocks instead.

    Raises:
        UserError: its weights are not the ones that were saved.
    """
    store = weights.store
    if not isinstance(store, DiskStore) and (snapshot := folder.snapshot(log.version, store.base)) is not None:
        step, fingerprint, get = snapshot
        if store.fill(get, step) != fingerprint:
            raise UserError(f"{folder.snapshots} holds a damaged snapshot of step {step}; delete that file and go on")


@dataclass(frozen=True)
class FinishedRun:
    """A run's model at the last entry of its log."""

    problem: Problem
    model: nn.Module
    replica: Replica
    device: torch.device
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
    problem, weights = _load(config, folder.blocks(0))
    if weights.store.base != header["base"]:
        raise UserError(f"run={path}: the base model is not the one that its log began from; restore that model")
    log = Log(header, entries)
    restore(folder, weights, log)
    return FinishedRun(problem, weights.model, Replica(weights, log), weights.device, content, header, len(entries))


def load_plain(config: Config) -> FinishedRun:
    """A model that no run has changed."""
    problem, weights = _load(config, Path())
    log = Log({"directions": 1, "seed": 0, "distribution": "rademacher", "rule": "sgd", "weight_decay": 0.0})
    return FinishedRun(problem, weights.model, Replica(weights, log), weights.device, {}, {}, 0)


def _load(config: Config, blocks: Path) -> tuple[Problem, Weights]:
    device, say = choose_device(config.run.device), Progress(0, 0, int(os.environ.get("RANK", 0)) == 0).say
    say(f"reading {config.model.name} and {config.data.name}")
    problem = build_problem(config)
    with torch.no_grad():
        say("checking that forwards block by block give the same bits as plain ones")
        batches = [problem.batches(0, 0)] if not problem.dev_batches else list(problem.dev_batches[:1])
        on_device = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        forwards = [lambda model, batch=b: problem.objective(model, batch) for b in on_device]
        models = [problem.narrow, problem.skeleton] if problem.narrow is not None else [problem.skeleton]
        whole = self_check(models, forwards, device, config.estimator.distribution, config.memory.unit)
        layout, model = find_layout(problem.skeleton, config.memory.unit, whole), problem.build()
        say(f"loading weights ({sum(b.size_bytes for b in layout.blocks) / 2**30:.2f} GiB)")
        weights = Weights(model, layout, problem.base, config.memory, device, blocks, writable=False)
        move_resident(model, device)
    return problem, weights


def with_data(config: Config, name: str) -> Config:
    """The same run on other data: all of it is scored, none is held out of it."""
    data = replace(config.data, name=name, dev=name, dev_examples=10**9)
    return replace(config, data=data)


def with_device(config: Config, device: str | None) -> Config:
    """Return the same run on another device, if one is given."""
    return replace(config, run=replace(config.run, device=device)) if device else config


def card_of(
    content: dict[str, Any], header: dict[str, Any], steps: int, scores: dict[str, float], fingerprint: str
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
    estimator, update = config["estimator"], config["update"]
    method = (
        f"{estimator['name']}, {estimator['directions']} {estimator['distribution']} direction(s) a step, eps "
        f"{estimator['eps']}; {update['name']}, lr {update['lr']}, {update['schedule']}"
    )
    return Card(
        base=config["model"]["name"] or "own model",
        base_fingerprint=header["base"],
        data=config["data"]["name"] or "own data",
        data_checksum=header["data"],
        recipe=config["recipe"],
        command=content["command"],
        seed=config["run"]["seed"],
        steps=steps,
        method=method,
        metrics=scores,
        versions=content["versions"],
        fingerprint=fingerprint,
    )
