"""A run that is there: its model, rebuilt as base, newest snapshot and the rest of the log, for scores or export."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo import log as logs
from zo.blocks import find_layout, move_frozen
from zo.config import Config, UserError
from zo.export import Card
from zo.folder import RunFolder
from zo.problem import Problem, build_problem
from zo.recipe import config_of
from zo.replay import Replay
from zo.store import DeviceStore


def restore(folder: RunFolder, store: DeviceStore, newest: int, base: str) -> None:
    """Take over the newest snapshot that a log of ``newest`` entries covers, if there is one.

    Raises:
        UserError: its weights are not the ones that were saved.
    """
    if (snapshot := folder.snapshot(newest, base)) is not None:
        step, fingerprint, tensors = snapshot
        store.fill(tensors, step)
        if store.fingerprint() != fingerprint:
            raise UserError(f"{folder.snapshots} holds a damaged snapshot of step {step}; delete that file and go on")


@dataclass(frozen=True)
class FinishedRun:
    """A run's model at the last entry of its log."""

    problem: Problem
    model: nn.Module
    device: torch.device
    content: dict[str, Any]
    header: dict[str, Any]
    steps: int
    fingerprint: str


def load_run(path: Path, change: Callable[[Config], Config] = lambda config: config) -> FinishedRun:
    """Rebuild the weights of a run.

    Args:
        path: its folder.
        change: what to do differently from its configuration, such as other data to score.

    Raises:
        UserError: there is no run, or its base model is not what it was.
    """
    folder = RunFolder(path)
    content = folder.read_config()
    header, entries = logs.read(folder.log_file)
    problem = build_problem(change(config_of(content["config"])))
    model, store, device = _load(problem)
    with torch.no_grad():
        if store.fingerprint() != header["base"]:
            raise UserError(f"run={path}: the base model is not the one that its log began from; restore that model")
        restore(folder, store, len(entries), header["base"])
        Replay(store, logs.Log(header, entries)).catch_up()
    return FinishedRun(problem, model, device, content, header, len(entries), store.fingerprint())


def load_plain(config: Config) -> FinishedRun:
    """A model that no run has changed."""
    problem = build_problem(config)
    model, store, device = _load(problem)
    return FinishedRun(problem, model, device, {}, {}, 0, store.fingerprint())


def _load(problem: Problem) -> tuple[nn.Module, DeviceStore, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        model = move_frozen(problem.load(), device)
        return model, DeviceStore(model, find_layout(model), device), device


def with_data(config: Config, name: str) -> Config:
    """The same run on other data: all of it is scored, none is held out of it."""
    data = replace(config.data, name=name, dev=name, dev_examples=10**9)
    return replace(config, data=data)


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
