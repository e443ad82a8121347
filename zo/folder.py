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
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from zo.config import Config, UserError
from zo.disk import BLOCK_FILE, PAGE, Header
from zo.layout import Block, Layout
from zo.log import Log, sync_folder
from zo.redact import without_secrets_in
from zo.snapshot import Snapshot, Writer

RESULT_KEYS = ("model", "data", "batch", "estimator", "update", "run.seed")
"""Groups and keys that decide a run's bits, so that a resumed run must have the same."""
SNAPSHOTS_KEPT = 2
UNFINISHED = {"lock", "blocks", "config.yaml.new", "steps.log.new"}
"""What a run that ended before its first step may leave."""
OWN_FOLDERS = ("blocks", "snapshots", "model")
RANK_FOLDER, SNAPSHOT = re.compile(r"rank-\d{5,}"), re.compile(r"step-\d{9,}\.safetensors")
"""Names that a run gives: a rank's blocks, a snapshot."""
MANIFEST = re.compile(r"<!-- Written by zo: (.*) -->")
"""The line of a model card that names the files of its folder, with " / " between them."""
WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")
LOCK_PATIENCE_S = 3.0
"""A process that was just killed may hold its lock a moment longer."""
SIGN_PATIENCE_S = 2.0
"""How long the first rank of a node looks for the sign of rank 0's lock before it takes the folder for its own."""


def versions() -> dict[str, str]:
    """Return the versions of what a result's bits depend on, and the GPU that this process computes with, if any."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("zo", "torch", "transformers", "numba")}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
        for package in ("nvidia-cublas", f"nvidia-cublas-cu{str(torch.version.cuda).split('.')[0]}"):
            with suppress(PackageNotFoundError):
                found["cublas"] = version(package)
        found["gpu"] = f"{properties.name} (compute capability {properties.major}.{properties.minor})"
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def manifest(names: Iterable[str]) -> str:
    """Return the line of a model card that names the files of its folder."""
    return f"<!-- Written by zo: {' / '.join(sorted(names))} -->"


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder unless zo wrote it, or it is missing or empty.

    Raises:
        UserError: it is a link or a file, or holds a file that its card does not name.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link, and what it points to would be lost; move it away")
    if not folder.exists():
        return
    if os.path.ismount(folder):
        raise UserError(
            f"{folder} is a mount point, which no folder can replace; use a folder in it: {folder / 'model'}"
        )
    if not folder.is_dir():
        raise UserError(f"{folder} exists and is not an empty folder; choose a new one")
    try:
        found = MANIFEST.search((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    ours = {"README.md", *found[1].split(" / ")} if found else set()
    for path in sorted(folder.iterdir()):
        named = path.name in ours or (ours and WEIGHTS.fullmatch(path.name))
        if not named or path.is_symlink() or path.is_dir():
            raise UserError(f"{folder} would be replaced, and zo did not write {path.name} in it; move it elsewhere")


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
            os.fsync(self._descriptor)  # Other machines see it from here on.
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

    def show(self) -> None:
        """Make the file by which other machines find that this folder is theirs too (see :func:`shares`).

        Raises:
            UserError: it cannot be written.
        """
        try:
            for old in self._path.parent.glob("lock.*"):
                old.unlink(missing_ok=True)
            descriptor = os.open(_sign(self._path.parent, self.token), os.O_WRONLY | os.O_CREAT, 0o644)
            os.fsync(descriptor)
            os.close(descriptor)
            sync_folder(self._path.parent)
        except OSError as error:
            raise UserError(
                f"run.dir={self._path.parent} cannot be written: {error.strerror}; choose another folder or make room"
            ) from error

    def hide(self) -> None:
        """Take away what :meth:`show` made."""
        with suppress(OSError):
            _sign(self._path.parent, self.token).unlink()

    def release(self) -> None:
        """Let go of it, and of a folder that nothing came into."""
        self.hide()
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        if self._made:
            with suppress(OSError):
                self._path.parent.rmdir()


def _sign(folder: Path, token: str) -> Path:
    return folder / f"lock.{token}"


def shares(folder: Path, token: str) -> bool:
    """Return whether this machine sees, as ``folder``, the one in which the lock of ``token`` was shown.

    A network file system keeps what it once read: that a file or the folder is not there, or what a file that another
    machine holds open had in it. So the sign is a file whose name is new with each lock, made, synced and closed before
    anyone hears of it: no machine can remember that it is not there. The folder may be remembered as missing, but to
    make it asks the server; and if that succeeds it is another folder, for the sign's is there. Looked for again and
    again until ``SIGN_PATIENCE_S`` are over, for file systems that promise less; then the folder is another one.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        pass
    except OSError:
        return False  # Taking the lock says why.
    else:
        with suppress(OSError):
            folder.rmdir()
        return False
    until = time.monotonic() + SIGN_PATIENCE_S
    while True:
        # To open a file asks the server where a look at its attributes may not.
        with suppress(OSError):
            os.close(os.open(_sign(folder, token), os.O_RDONLY))
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


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
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(
                f"run.dir={self.path} holds no run that can be read: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
            raise UserError(f"run.dir={self.path} holds a damaged config.yaml; use another run.dir")
        return content

    def check(self, config: Config) -> None:
        """Refuse a folder that is no place for this run; nothing is written.

        Raises:
            UserError: it holds another run (says which keys differ), files that are no run, or links or files where
                this run would replace or delete some.
        """
        if not self.holds_run:
            if foreign := next(self._foreign(), None):
                raise UserError(
                    f"run.dir={self.path} is not empty and holds no run ({foreign}); use a new or empty folder"
                )
            return
        self._check_links()
        if config.export.at_end:
            check_replaceable(self.model)
        before, now = flatten(self.read_config()["config"]), flatten(without_secrets_in(asdict(config)))
        keys = [k for k in now if k.startswith(RESULT_KEYS)]
        if now["update.schedule"] != "constant":
            keys.append("run.steps")
        differing = [f"{k} ({before.get(k)} -> {now[k]})" for k in keys if before.get(k) != now[k]]
        if differing:
            raise UserError(
                f"run.dir={self.path} holds another run: {', '.join(differing)}; use another run.dir, or those values"
            )

    def _foreign(self) -> Iterator[str]:
        """Yield what lies in the folder that no start of a run leaves there."""
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            sign = path.name.startswith("lock.")
            if path.is_symlink() or not (sign or path.name in UNFINISHED):
                yield path.name
        self._check_links()
        for rank in sorted((self.path / "blocks").glob("*")):
            if not RANK_FOLDER.fullmatch(rank.name) or not rank.is_dir():
                yield f"blocks/{rank.name}"
            else:
                found = (path.name for path in sorted(rank.iterdir()))
                yield from (f"blocks/{rank.name}/{name}" for name in found if not BLOCK_FILE.fullmatch(name))

    def _check_links(self) -> None:
        """Refuse links in place of folders that a run writes and deletes in."""
        places = [self.path / name for name in OWN_FOLDERS]
        for place in (*places, *places[0].glob("rank-*"), *places[0].glob("rank-*/*")):
            if place.is_symlink():
                raise UserError(
                    f"run.dir={self.path}: {place.relative_to(self.path)} is a symbolic link, and a run deletes files "
                    "there; move it away, or make run.dir itself the link"
                )

    def create(self, config: Config, facts: Mapping[str, Any], header: Mapping[str, Any]) -> Log:
        """Begin a run here, or end its beginning where a crash cut it short.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = without_secrets_in({"config": asdict(config), **facts}) | {"log_header": dict(header)}
            _write_whole(self.config_file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
            return Log.create(self.log_file, dict(header))
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be written: {error.strerror}; choose another folder or make room"
            ) from error

    def left_by_a_log(self) -> list[str]:
        """Names of what only a run with a log writes."""
        left = [path for path in (self.metrics_file, self.snapshots) if path.exists()]
        for path in self.path.glob("blocks/*/*.block"):
            with open(path, "rb") as file:
                header = Header.parse(file.read(PAGE))
            if header is not None and header.version:
                left.append(path.parent.parent)
                break
        return [path.name for path in left]

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
            unfinished = list(self.snapshots.glob("step-*.new"))
            for old in self._snapshot_files()[:-SNAPSHOTS_KEPT] + unfinished:
                old.unlink()
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(
                f"run.dir={self.path}: snapshot of step {step} cannot be written: {error}; the log is safe: make "
                "room and start the same command again, or set run.snapshot_every=0"
            ) from error

    def _snapshot_files(self) -> list[Path]:
        return sorted(path for path in self.snapshots.glob("step-*") if SNAPSHOT.fullmatch(path.name))

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
