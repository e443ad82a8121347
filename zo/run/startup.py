"""Startup check: all ranks run the same software on the same inputs, and continue the same log.

Rank 0 writes the run's folder, and so does the first rank of every other node whose ``run.dir`` is
another folder, because a node's disk may be lost. At startup all ranks take the longest log, and
the other copies are completed from it.
"""

import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from zo.config.checks import check_threads
from zo.config.schema import Config
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.method.entry import Entry
from zo.method.update import learning_rate
from zo.observe.timeline import check_drawable
from zo.observe.trackers import check_trackers
from zo.state.lock import Lock, lock_owner, shares
from zo.state.log import Log, difference
from zo.state.run_folder import RunFolder
from zo.state.versions import versions

CLOCKS_APART_S = 10.0
"""Largest difference in seconds; torchrun considers a node dead from 15 s on."""


def choose_folder(mesh: Mesh, config: Config) -> RunFolder:
    """Return the run's folder, the same on every rank.

    Raises:
        UserError: ``run.dir`` is empty and the ranks may be restarted.
    """
    chosen = config.run.dir
    by_default = f"runs/{config.recipe or 'run'}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = RunFolder(Path(mesh.broadcast(chosen or by_default)))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if chosen is None and (mesh.nodes > 1 or restarts):
        raise UserError(
            "run.dir is empty, and a restart would begin another run; set run.dir to a folder"
        )
    return folder


def acquire_run_folder(mesh: Mesh, folder: RunFolder, resources: ExitStack) -> bool:
    """Lock the run's folder if this rank writes it; return true if so.

    The writers are rank 0 and the first rank of each node that does not see rank 0's lock there.

    Raises:
        UserError: the folder is locked by a running process, or cannot be written.
    """
    lock = None
    with mesh.agreed():
        if mesh.rank == 0:
            lock = Lock(folder.path)
            resources.callback(lock.release)
            if mesh.nodes > 1:
                lock.show()
    token = mesh.broadcast(lock.token if lock else None)
    with mesh.agreed():
        if mesh.rank and mesh.first_of_node and not shares(folder.path, token):
            lock = _own_lock(folder, token)
            if lock is not None:
                resources.callback(lock.release)
    if mesh.rank == 0 and lock is not None:
        lock.hide()  # All ranks have looked for it.
    return lock is not None


def _own_lock(folder: RunFolder, token: str) -> Lock | None:
    """Lock a node's own folder; return ``None`` if it is rank 0's after all."""
    try:
        return Lock(folder.path)
    except UserError:
        if lock_owner(folder.path).get("token") == token:
            return None
        raise


def differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return one string for each version in which a rank differs from rank 0, the GPU last."""
    keys = sorted(first.keys() | other.keys(), key=lambda key: (key == "gpu", key))
    pairs = [(key, other.get(key, "none"), first.get(key, "none")) for key in keys]
    return [f"{key} {theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]


def check_alike(mesh: Mesh, base: str, data: str) -> None:
    """Check that all ranks have the same versions, GPU, base weights, training data and time.

    Args:
        mesh: of the run.
        base: checksum of the base weights.
        data: checksum of the training data.

    Raises:
        UserError: a rank differs from rank 0; the message names the rank, its host and both values.
    """
    machine = {"machine": platform.machine(), **versions(mesh.device)}
    said = mesh.collect(
        {
            "host": socket.gethostname(),
            "time": time.time(),
            "is": machine,
            "base": base,
            "data": data,
        }
    )
    first = said[0]
    for rank, other in enumerate(said):
        names = f"rank {rank} (host {other['host']})", f"rank 0 (host {first['host']})"
        if different := differences(first["is"], other["is"]):
            remedy = (
                "use GPUs of one kind in a run"
                if "gpu" in different[-1][:3]
                else "install the same on every node"
            )
            raise UserError(f"{names[0]} has {', '.join(different)} as {names[1]}; {remedy}")
        for what, key in (("base weights", "base"), ("training data", "data")):
            if other[key] != first[key]:
                raise UserError(
                    f"{names[0]} has other {what} than {names[1]}: {other[key][:12]} and "
                    f"{first[key][:12]}; copy the same files to every node"
                )
        apart = abs(other["time"] - first["time"])
        if apart > CLOCKS_APART_S:
            raise UserError(
                f"the clocks of {names[0]} and {names[1]} are {apart:.0f} s apart; set them (NTP)"
            )


def open_log(
    mesh: Mesh,
    folder: RunFolder,
    is_writer: bool,
    config: Config,
    facts: Mapping[str, Any],
    header: dict[str, Any],
) -> Log:
    """Open or create the run's log, the same on every rank.

    Args:
        mesh: of the run.
        folder: of this rank's node.
        is_writer: if true, this rank writes there; otherwise it holds the entries in memory.
        config: of the run.
        facts: for ``config.yaml``.
        header: of a new log.

    Raises:
        UserError: the log was started from other weights or data, or two copies of it differ.
    """
    log = None
    with mesh.agreed():
        if is_writer and folder.log_file.exists():
            log = _matching(folder, header)
    copies = mesh.collect(None if log is None else [log.version, log.header])
    source = max(range(len(copies)), key=lambda rank: copies[rank][0] if copies[rank] else -1)
    header = _common_header(mesh, folder, is_writer, copies, header)
    longest = mesh.broadcast(
        [asdict(e) for e in log.entries] if log and mesh.rank == source else [], source
    )
    entries = [Entry(**{**e, "scalars": tuple(e["scalars"])}) for e in longest]
    with mesh.agreed():
        if not is_writer:
            log = Log(header, entries)
        else:
            log = log or folder.create(config, facts, header)
            if log.entries != entries[: log.version]:
                raise UserError(
                    f"{folder.log_file} on host {socket.gethostname()} and the longest copy, "
                    f"of rank {source}, differ: they belong to two runs; move one of them away"
                )
            log.extend(entries[log.version :])
    return log


def extend(mesh: Mesh, folder: RunFolder, is_writer: bool, config: Config, log: Log) -> str | None:
    """Record the length of a run that goes on to another ``run.steps`` than it was started with.

    Returns:
        On rank 0 a line on what changes, where the rates do.
    """
    before, steps, update = None, config.run.steps, config.update
    with mesh.agreed():
        if is_writer and log.version < steps:
            before = folder.record_steps(steps, log.version)
    if before is None or update.schedule == "constant":
        return None
    step = log.version + 1
    rate = learning_rate(step, steps, update.lr, update.schedule, update.warmup_steps)
    return (
        f"run.steps is {steps} now, and was {before}: from step {step} ({rate:.3g}) on the rates "
        f"are those of update.schedule={update.schedule} over {steps} steps"
    )


def _common_header(
    mesh: Mesh, folder: RunFolder, is_writer: bool, copies: list[Any], header: dict[str, Any]
) -> dict[str, Any]:
    """Return the header of all copies of the log, or of a new run."""
    held = {rank: copy[1] for rank, copy in enumerate(copies) if copy}
    if not held:
        with mesh.agreed():
            if is_writer and (left := folder.left_by_a_log()):
                raise UserError(
                    f"{folder.log_file} is missing, but {', '.join(left)} of its run exist; put "
                    "the log back, or use another run.dir"
                )
        made: dict[str, Any] = mesh.broadcast({"run": uuid.uuid4().hex, **header})
        return made
    first, *others = held
    for rank in others:
        if found := difference(held[rank], held[first]) or difference(held[first], held[rank]):
            raise UserError(
                f"the logs of ranks {first} and {rank} belong to two runs: {found[0]} is "
                f"{found[2]} and {found[1]}; move one of them away"
            )
    agreed: dict[str, Any] = held[first]
    return agreed


def _matching(folder: RunFolder, header: Mapping[str, Any]) -> Log:
    """Open the log and compare its header with this run's and with ``config.yaml``."""
    log = Log.open(folder.log_file)
    if found := difference(log.header, header):
        log.close()
        key, there, here = found
        if what := {"base": "base model", "data": "training data"}.get(key):
            raise UserError(
                f"run.dir={folder.path} was started from a different {what}: {str(there)[:12]} in "
                f"its log, {here[:12]} now; restore it, or use a new run.dir"
            )
        raise UserError(
            f"{folder.log_file} is the log of another run: {key} is {there!r} there and {here!r} "
            "now; put this run's log back, or use another run.dir"
        )
    begun = folder.read_config().get("log_header")
    if begun and (found := difference(log.header, begun)):
        log.close()
        raise UserError(
            f"{folder.log_file} and config.yaml belong to two runs: {found[0]} is "
            f"{found[1]} in the log and {found[2]} in config.yaml; "
            "put this run's log back, or use another run.dir"
        )
    return log


def prepare_process(config: Config) -> None:
    """Set the number of threads, and check that what is to be drawn and tracked can be.

    Raises:
        UserError: too many threads, or a package is missing.
    """
    if (threads := config.run.threads) is not None:
        check_threads(threads, os.cpu_count() or 1)
        torch.set_num_threads(threads)
    if config.profile.range:
        check_drawable()
    check_trackers(config.run.trackers)
