"""What the ranks of a run tell one another before the first step: that they are alike, and which log is the longest.

Rank 0 keeps the run's folder, and so does the first rank of every other node whose ``run.dir`` is not the same place:
a node's disk may be lost. When ranks meet, the longest log is every rank's, and the other copies are completed from it.
"""

import platform
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from zo.config.schema import Config
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.method.entry import Entry
from zo.state.lock import Lock, lock_owner, shares
from zo.state.log import Log, difference
from zo.state.run_folder import RunFolder
from zo.state.versions import versions

CLOCKS_APART_S = 10.0
"""torchrun takes a node for dead whose clock is 15 s from another's."""


def acquire_run_folder(mesh: Mesh, folder: RunFolder, resources: ExitStack) -> bool:
    """Take the lock of the run's folder if this rank is to write it, and return whether it is.

    Rank 0 does, and the first rank of a node that does not find rank 0's lock there.

    Raises:
        UserError: a run goes on there, or it cannot be written.
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
        lock.hide()  # All have looked.
    return lock is not None


def _own_lock(folder: RunFolder, token: str) -> Lock | None:
    """Take the lock of a node's own folder; ``None`` where it turns out that rank 0 has it."""
    try:
        return Lock(folder.path)
    except UserError:
        if lock_owner(folder.path).get("token") == token:
            return None
        raise


def differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return in which versions another rank differs from the first, one a string; an unlike GPU comes last."""
    keys = sorted(first.keys() | other.keys(), key=lambda key: (key == "gpu", key))
    pairs = [(key, other.get(key, "none"), first.get(key, "none")) for key in keys]
    return [f"{key} {theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]


def check_alike(mesh: Mesh, base: str, data: str) -> None:
    """See that all ranks have the same versions, base weights, training data and time.

    Raises:
        UserError: a rank has others; it is named.
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
                    f"{names[0]} has other {what} than {names[1]}: {other[key][:12]} and {first[key][:12]}; copy the "
                    "same files to every node"
                )
        apart = abs(other["time"] - first["time"])
        if apart > CLOCKS_APART_S:
            raise UserError(
                f"the clocks of {names[0]} and {names[1]} are {apart:.0f} s apart; set them (NTP)"
            )


def open_log(
    mesh: Mesh,
    folder: RunFolder,
    keeps: bool,
    config: Config,
    facts: Mapping[str, Any],
    header: dict[str, Any],
) -> Log:
    """The run's log, old or new, the same on every rank.

    Args:
        mesh: of the run.
        folder: of this rank's node.
        keeps: whether this rank writes there; the others hold the entries in memory.
        config: of the run.
        facts: for ``config.yaml``.
        header: of a new log.

    Raises:
        UserError: a log began from other weights or data, or two copies of it differ.
    """
    log = None
    with mesh.agreed():
        if keeps and folder.log_file.exists():
            log = _matching(folder, header)
    copies = mesh.collect(None if log is None else [log.version, log.header])
    source = max(range(len(copies)), key=lambda rank: copies[rank][0] if copies[rank] else -1)
    header = _header_of_all(mesh, folder, keeps, copies, header)
    longest = mesh.broadcast(
        [asdict(e) for e in log.entries] if log and mesh.rank == source else [], source
    )
    entries = [Entry(**{**e, "scalars": tuple(e["scalars"])}) for e in longest]
    with mesh.agreed():
        if not keeps:
            log = Log(header, entries)
        else:
            log = log or folder.create(config, facts, header)
            if log.entries != entries[: log.version]:
                raise UserError(
                    f"{folder.log_file} on host {socket.gethostname()} and the longest copy, of rank {source}, differ: "
                    "they are of two runs; move one of them away"
                )
            log.extend(entries[log.version :])
    return log


def _header_of_all(
    mesh: Mesh, folder: RunFolder, keeps: bool, copies: list[Any], header: dict[str, Any]
) -> dict[str, Any]:
    """The header that all copies of the log have, or a new run's."""
    held = {rank: copy[1] for rank, copy in enumerate(copies) if copy}
    if not held:
        with mesh.agreed():
            if keeps and (left := folder.left_by_a_log()):
                raise UserError(
                    f"{folder.log_file} is missing, and {', '.join(left)} of its run are there; put the log back, or "
                    "use another run.dir"
                )
        made: dict[str, Any] = mesh.broadcast({"run": uuid.uuid4().hex, **header})
        return made
    first, *others = held
    for rank in others:
        if found := difference(held[rank], held[first]) or difference(held[first], held[rank]):
            raise UserError(
                f"the logs of ranks {first} and {rank} are of two runs: {found[0]} is {found[2]} and {found[1]}; move "
                "one of them away"
            )
    agreed: dict[str, Any] = held[first]
    return agreed


def _matching(folder: RunFolder, header: Mapping[str, Any]) -> Log:
    log = Log.open(folder.log_file)
    if found := difference(log.header, header):
        log.close()
        key, there, here = found
        if what := {"base": "base model", "data": "training data"}.get(key):
            raise UserError(
                f"run.dir={folder.path} began from another {what}: its log names {str(there)[:12]}, this one is "
                f"{here[:12]}; restore it, or use a new run.dir"
            )
        raise UserError(
            f"{folder.log_file} is the log of another run: {key} is {there!r} there and {here!r} now; put this run's "
            "log back, or use another run.dir"
        )
    begun = folder.read_config().get("log_header")
    if begun and (found := difference(log.header, begun)):
        log.close()
        raise UserError(
            f"{folder.log_file} is the log of another run than config.yaml: {found[0]} is {found[1]} there and "
            f"{found[2]} in config.yaml; put this run's log back, or use another run.dir"
        )
    return log
