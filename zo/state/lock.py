"""Lock of a run's folder, which works over a network file system, too."""

import fcntl
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from zo.errors import UserError
from zo.io.atomic import sync

LOCK_PATIENCE_S = 3.0
"""A process that was just killed may hold its lock a moment longer."""


SIGN_PATIENCE_S = 2.0
"""Seconds that the first rank of a node looks for the sign of rank 0's lock before it takes the
folder for its own."""


class Lock:
    """Exclusive lock on ``lock`` in a folder; the file names its owner.

    The system lets go of it when its process ends, in whatever way. On a file system without locks
    there is none.
    """

    def __init__(self, folder: Path) -> None:
        """Acquire the lock.

        Raises:
            UserError: a running process has it, or the folder cannot be written.
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
                f"run.dir={folder} cannot be written: {error.strerror}; choose another folder or "
                "make room"
            ) from error

    def _take(self, until: float) -> int:
        while True:
            # A link would be written through, wherever it points to.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if time.monotonic() > until:
                    owner = lock_owner(self._path.parent)
                    raise UserError(
                        f"run.dir={self._path.parent} is locked by a running process (host "
                        f"{owner.get('host')}, process {owner.get('pid')}); wait for its end, or "
                        "use another run.dir"
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
        """Make the file by which other machines find the same folder (see :func:`shares`).

        Raises:
            UserError: it cannot be written.
        """
        try:
            for old in self._path.parent.glob("lock.*"):
                old.unlink(missing_ok=True)
            descriptor = os.open(
                _sign(self._path.parent, self.token), os.O_WRONLY | os.O_CREAT, 0o644
            )
            os.fsync(descriptor)
            os.close(descriptor)
            sync(self._path.parent)
        except OSError as error:
            raise UserError(
                f"run.dir={self._path.parent} cannot be written: {error.strerror}; choose another "
                "folder or make room"
            ) from error

    def hide(self) -> None:
        """Remove the file that :meth:`show` made."""
        with suppress(OSError):
            _sign(self._path.parent, self.token).unlink()

    def release(self) -> None:
        """Release the lock; remove a folder that it made and that is empty."""
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
    """Return True if ``folder`` is the one that the lock of ``token`` is shown in.

    A network file system keeps what it once read: that a file or the folder is not there, or what a
    file that another machine holds open had in it. So the sign is a file whose name is new with
    each lock, made, synced and closed before
    anyone hears of it: no machine can remember that it is not there. The folder may be remembered
    as missing, but to make it asks the server; and if that succeeds it is another folder, for the
    sign's is there. Looked for again and again until ``SIGN_PATIENCE_S`` are over, for file systems
    that promise less; then the folder is another one.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        pass
    except OSError:
        return False  # Taking the lock raises the reason.
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
    """Return host, process and token of a lock's owner; empty if that cannot be read."""
    try:
        said = json.loads((folder / "lock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
