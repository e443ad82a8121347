"""The log of scalars is the state of training: theta_t = replay(theta_0, entries 1..t).

A file is a header and fixed-size entries, append-only. An entry is durable before any parameter
moves, and carries a CRC-32 that continues the checksum of what lies before it, so a torn, altered,
lost or reordered entry is noticed.

    "ZOLOG3" newline | u32 n | n bytes of JSON | u32 checksum | entries
    entry = u64 step | u64 position | f64 lr | u32 part | f32 scalars[directions] | u32 checksum
    (little-endian)

An invalid entry with nothing valid after it is the end of a write that a crash cut short: it is cut
    off. One with
valid entries after it is damage: the log is refused, for cutting there would lose steps that are
    whole.

``python -m zo.log FILE`` prints it, one JSON object a line; ``python -m zo.log FILE --repair``
keeps a copy of a damaged log and cuts it before the damage.
"""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, Self

from zo.errors import UserError
from zo.io.atomic import write_whole
from zo.method.entry import Entry
from zo.state.log_file import _U32, _header_bytes, _intact, _packed, _packer, _read_bytes, repair


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Return header and whole entries of a log file; the file is not touched.

    Raises:
        UserError: the file is missing, is no log, or is damaged before its end.
    """
    found = _intact(_read_bytes(path), path)
    return found.header, found.entries


class Log:
    """Open log; without a path it lives in memory, as on ranks that do not write."""

    def __init__(self, header: dict[str, Any], entries: list[Entry] | None = None) -> None:
        """Make a log in memory."""
        self.header = header
        self.entries: list[Entry] = entries or []
        self.cut_bytes = 0
        """Bytes of a torn tail that opening removed."""
        self._packer = _packer(header["directions"])
        self._descriptor: int | None = None
        self._path = Path()
        self._checksum = 0
        self._length = 0

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Self:
        """Create a log file; it appears whole or not at all."""
        log, data = cls(header), _header_bytes(header)
        write_whole(path, data)
        log._attach(path, len(data), zlib.crc32(data[: -_U32.size]))
        return log

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a log file; a torn tail is cut off and counted in ``cut_bytes``.

        Raises:
            UserError: the file cannot be read or written, is no log, or is damaged before its end.
        """
        data = _read_bytes(path)
        found = _intact(data, path)
        log = cls(found.header, found.entries)
        log.cut_bytes = len(data) - found.end
        try:
            log._attach(path, found.end, found.checksum)
            if log.cut_bytes:
                log._truncate()
        except OSError as error:
            log.close()
            raise UserError(
                f"cannot write the log {path}: {error.strerror}; see to its rights and its disk"
            ) from error
        return log

    def _attach(self, path: Path, length: int, checksum: int) -> None:
        self._descriptor, self._path = os.open(path, os.O_WRONLY), path.absolute()
        self._length, self._checksum = length, checksum

    def _truncate(self) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, self._length)
        os.fsync(self._descriptor)

    @property
    def version(self) -> int:
        """Number of entries, and so the newest version of the parameters."""
        return len(self.entries)

    @property
    def identity(self) -> str:
        """Hexadecimal hash of the header, the same in all copies of one run's log alone."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:32]

    def digest(self, version: int) -> str:
        """Return a hexadecimal hash of the header and the first ``version`` entries."""
        found = hashlib.sha256(self.identity.encode())
        for e in self.entries[:version]:
            found.update(_packed(self._packer, e))
        return found.hexdigest()[:32]

    def check_in_place(self) -> None:
        """Check that the file is still the one under its name; a log in memory always is.

        Raises:
            UserError: it was deleted, moved, replaced or written by another program.
        """
        if self._descriptor is None:
            return
        held = os.fstat(self._descriptor)
        try:
            named = os.stat(self._path)
        except OSError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino):
            what = "deleted" if held.st_nlink == 0 else "moved or replaced"
            remedy = (
                "restore it from a copy" if held.st_nlink == 0 else "put it back under that name"
            )
            raise UserError(
                f"{self._path} was {what} during the run, so that its steps would be lost; "
                f"it held {self.version} steps: {remedy} and start the same command again, or "
                "begin a new run"
            )
        if held.st_size != self._length:
            raise UserError(
                f"{self._path} was changed by another program: it has {held.st_size} bytes, and "
                f"the run wrote {self._length}; see that no other program writes there, and start "
                "the same command again"
            )

    def append(self, entry: Entry) -> None:
        """Add one entry; when this returns, it is on the disk.

        Raises:
            UserError: the disk refuses, and the file is left as it was; or it was deleted or moved.
        """
        self.extend([entry])

    def extend(self, entries: Sequence[Entry]) -> None:
        """Add entries that follow one another; when this returns, they are on the disk.

        Raises:
            UserError: the disk refuses, and the file is left as it was; or it was deleted or moved.
        """
        numbers = [entry.step for entry in entries]
        assert numbers == list(range(self.version + 1, self.version + 1 + len(entries)))
        assert all(len(entry.scalars) == self.header["directions"] for entry in entries)
        assert all(isfinite(number) for entry in entries for number in (entry.lr, *entry.scalars))
        if self._descriptor is not None and entries:
            self._write(entries)
        self.entries.extend(entries)

    def _write(self, entries: Sequence[Entry]) -> None:
        assert self._descriptor is not None
        self.check_in_place()
        data, checksum = b"", self._checksum
        for entry in entries:
            body = _packed(self._packer, entry)
            checksum = zlib.crc32(body, checksum)
            data += body + _U32.pack(checksum)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self._length + written)
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # What stays is a torn tail, which the next start cuts.
                self._truncate()
            raise UserError(
                f"cannot write step {entries[0].step} to the log: {error.strerror}; the "
                f"{self.version} steps before it are safe: make room and start the same command "
                "again"
            ) from error
        self._length, self._checksum = self._length + len(data), checksum

    def close(self) -> None:
        """Close the file; the entries stay."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def untrained_header(distribution: str = "rademacher", seed: int = 0) -> dict[str, Any]:
    """Return a header for a log in memory of a model that is only read or checked."""
    return {
        "directions": 1,
        "seed": seed,
        "distribution": distribution,
        "rule": "sgd",
        "weight_decay": 0.0,
    }


def difference(
    found: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Return the first differing key, its value in a header, and the expected value."""
    for key, value in expected.items():
        if key not in found or found[key] != value:
            return key, found.get(key), value
    return None


def main(arguments: list[str]) -> int:
    """Print a log as JSON lines, the header, then the entries; or repair it."""
    repairs = arguments[1:] == ["--repair"]
    if len(arguments) != 1 and not repairs:
        print("usage: python -m zo.log FILE [--repair]", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        if repairs:
            print(_repair_said(path))
            return 0
        header, entries = read(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for item in (header, *map(asdict, entries)):
        print(json.dumps(item))
    return 0


def _repair_said(path: Path) -> str:
    done = repair(path)
    if done is None:
        return f"{path} is not damaged; nothing was changed"
    steps, cut_bytes, copy = done
    size = _packer(read(path)[0]["directions"]).size + _U32.size
    return (
        f"cut {-(-cut_bytes // size)} steps ({cut_bytes} bytes) from {path}, which has {steps} "
        f"steps now; the damaged log is {copy}. Snapshots and blocks of "
        "later steps will be ignored"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
