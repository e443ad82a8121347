"""A run's folder: what a run is, its log, its snapshots; made once, opened again to resume.

    config.yaml     resolved configuration, versions, base model and its fingerprint
    steps.log       the log
    metrics.jsonl   one object a step and an evaluation
    snapshots/      weights at some versions, the last two
    blocks/         what a disk store wrote back, a folder a rank
    lock            held while a run goes on here
    model/          the Hugging Face folder at the end

Files appear whole or not at all: written beside, synced, renamed.
"""

import fcntl
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import yaml
from safetensors import SafetensorError
from torch import Tensor

from zo.config import Config, UserError
from zo.layout import Block, Layout
from zo.log import Log, sync_folder
from zo.snapshot import Snapshot, Writer

RESULT_KEYS = ("model", "data", "batch", "estimator", "update", "run.seed")
"""Groups and keys that decide a run's bits, so that a resumed run must have the same."""
SNAPSHOTS_KEPT = 2
UNFINISHED = {"lock", "blocks"}
"""What a run that ended before its first step may leave."""
LOCK_PATIENCE_S = 3.0
"""A process that was just killed may hold its lock a moment longer."""


def versions() -> dict[str, str]:
    """Versions of what a result's bits depend on."""
    libraries = {name: version(name) for name in ("zo", "torch", "transformers", "numba")}
    return {"python": platform.python_version(), **libraries}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, path)
    sync_folder(path.parent)


class Passing(Protocol):
    """Weights that pass by a block at a time."""

    layout: Layout

    def fingerprint(self, each: Callable[[Block, Sequence[Tensor]], None] | None = None) -> str:
        """Hash all weights, and give every block to ``each`` on the way."""
        ...


class Lock:
    """Keeps a folder to one run at a time, by an exclusive lock on ``lock`` there, which says who holds it.

    The system lets go of it when its process ends, in whatever way. On a file system without locks there is none.
    """

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises:
            UserError: a run that goes on has it, or the folder cannot be written.
        """
        self._path, self._made = folder / "lock", not folder.exists()
        self.token = uuid.uuid4().hex
        """Names this lock in its file."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take(time.monotonic() + LOCK_PATIENCE_S)
            said = {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(said).encode(), 0)
        except OSError as error:
            raise UserError(
                f"run.dir={folder} cannot be written: {error.strerror}; choose another folder or make room"
            ) from error

    def _take(self, until: float) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if time.monotonic() > until:
                    owner = lock_owner(self._path.parent)
                    raise UserError(
                        f"run.dir={self._path.parent} is in use by a run that goes on (host {owner.get('host')}, "
                        f"process {owner.get('pid')}); wait for its end, or use another run.dir"
                    ) from None
                time.sleep(0.1)
                continue
            except OSError:
                return descriptor  # No locks here.
            # An owner that ended in between has taken the file away.
            with suppress(OSError):
                if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)

    def release(self) -> None:
        """Let go of it, and of a folder that nothing came into."""
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        if self._made:
            with suppress(OSError):
                self._path.parent.rmdir()


def lock_owner(folder: Path) -> dict[str, Any]:
    """Host, process and token of whoever has a folder's lock; empty if that cannot be read."""
    try:
        said = json.loads((folder / "lock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


class RunFolder:
    """Names of a run's files, and what may be done with them."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is read or written."""
        self.path = path
        self.config_file, self.log_file = path / "config.yaml", path / "steps.log"
        self.metrics_file, self.snapshots, self.model = path / "metrics.jsonl", path / "snapshots", path / "model"

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config_file.exists()

    def read_config(self) -> dict[str, Any]:
        """What ``config.yaml`` says.

        Raises:
            UserError: there is no run here, or the file is damaged.
        """
        try:
            content = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"run.dir={self.path} holds no run that can be read: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, dict) or "config" not in content:
            raise UserError(f"run.dir={self.path} holds a damaged config.yaml; use another run.dir")
        return content

    def check(self, config: Config) -> None:
        """Refuse a folder that is no place for this run; nothing is written.

        Raises:
            UserError: it holds another run (says which keys differ), or files that are no run.
        """
        if not self.holds_run:
            if self.path.is_dir() and {path.name for path in self.path.iterdir()} - UNFINISHED:
                raise UserError(f"run.dir={self.path} is not empty and holds no run; use a new or empty folder")
            return
        before, now = flatten(self.read_config()["config"]), flatten(asdict(config))
        keys = [k for k in now if k.startswith(RESULT_KEYS)]
        if now["update.schedule"] != "constant":
            keys.append("run.steps")
        differing = [f"{k} ({before.get(k)} -> {now[k]})" for k in keys if before.get(k) != now[k]]
        if differing:
            raise UserError(
                f"run.dir={self.path} holds another run: {', '.join(differing)}; use another run.dir, or those values"
            )

    def create(self, config: Config, facts: Mapping[str, Any], header: Mapping[str, Any]) -> Log:
        """Begin a run here, or end its beginning where a crash cut it short.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {"config": asdict(config), **facts}
            _write_whole(self.config_file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
            return Log.create(self.log_file, dict(header))
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be written: {error.strerror}; choose another folder or make room"
            ) from error

    def save_snapshot(self, step: int, weights: Passing, base: str) -> None:
        """Keep the weights of one version; the last two snapshots stay. No more than a block is in memory.

        Raises:
            UserError: the disk refuses; earlier snapshots and the log are untouched.
        """
        path = self.snapshots / f"step-{step:09d}.safetensors"
        beside = path.with_suffix(".new")
        try:
            self.snapshots.mkdir(exist_ok=True)
            with closing(Writer(beside, weights.layout, {"version": str(step), "base": base})) as writer:
                writer.finish(weights.fingerprint(writer.write))
            os.rename(beside, path)
            sync_folder(self.snapshots)
            unfinished = list(self.snapshots.glob("*.new"))
            for old in self._snapshot_files()[:-SNAPSHOTS_KEPT] + unfinished:
                old.unlink()
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(
                f"run.dir={self.path}: snapshot of step {step} cannot be written: {error}; the log is safe: make "
                "room and start the same command again, or set run.snapshot_every=0"
            ) from error

    def _snapshot_files(self) -> list[Path]:
        return sorted(self.snapshots.glob("step-*.safetensors"))

    def snapshot(self, newest: int, base: str) -> Snapshot | None:
        """Return the newest snapshot that a log of ``newest`` entries from this base covers, if there is one."""
        for path in reversed(self._snapshot_files()):
            try:
                found = Snapshot(path)
                if found.base == base and found.version <= newest:
                    return found
            except (SafetensorError, OSError, KeyError):
                continue  # A damaged snapshot is worth nothing: an older one, or the base, and the log are.
        return None

    def blocks(self, rank: int) -> Path:
        """Where a rank's disk store keeps the blocks that it wrote back."""
        return self.path / "blocks" / f"rank-{rank:05d}"
