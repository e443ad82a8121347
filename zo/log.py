"""The log of scalars is the state of training: theta_t = replay(theta_0, entries 1..t).

A file is a header and fixed-size entries, append-only. An entry is durable before any parameter moves, and carries
a CRC-32 that continues the checksum of what lies before it, so a torn, altered, lost or reordered entry ends the log.

    "ZOLOG1" newline | u32 n | n bytes of JSON | u32 checksum | entries
    entry = u64 step | u64 position | f64 lr | f32 scalars[directions] | u32 checksum          (little-endian)

``python -m zo.log FILE`` prints it, one JSON object a line.
"""

import json
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from zo.config import UserError

MAGIC = b"ZOLOG1\n"
_U32 = struct.Struct("<I")


@dataclass(frozen=True)
class Entry:
    """What is kept of one step."""

    step: int
    """1 for the first step; theta of version t has entries 1..t applied."""
    position: int
    """Sequences drawn from the data after this step."""
    lr: float
    scalars: tuple[float, ...]
    """Projected gradients, one a direction; float32 values."""


def _packer(directions: int) -> struct.Struct:
    return struct.Struct(f"<QQd{directions}f")


def _header_bytes(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    body = MAGIC + _U32.pack(len(text)) + text
    return body + _U32.pack(zlib.crc32(body))


def _parse(data: bytes, path: Path) -> tuple[dict[str, Any], list[Entry], int, int]:
    """Header, entries, number of bytes that are whole, and their running checksum."""
    start = len(MAGIC) + _U32.size
    if len(data) < start or not data.startswith(MAGIC):
        raise UserError(f"{path} is not a log of zo: it does not begin with {MAGIC!r}")
    end = start + _U32.unpack_from(data, len(MAGIC))[0]
    checksum = zlib.crc32(data[:end])
    if len(data) < end + _U32.size or _U32.unpack_from(data, end)[0] != checksum:
        raise UserError(f"{path} has a damaged header; take a copy of the log from elsewhere, or begin a new run")
    header = json.loads(data[start:end])
    packer, whole = _packer(header["directions"]), end + _U32.size
    entries: list[Entry] = []
    while whole + packer.size + _U32.size <= len(data):
        body = data[whole : whole + packer.size]
        following = zlib.crc32(body, checksum)
        if _U32.unpack_from(data, whole + packer.size)[0] != following:
            break
        step, position, lr, *scalars = packer.unpack(body)
        if step != len(entries) + 1:
            break
        entries.append(Entry(step, position, lr, tuple(scalars)))
        whole, checksum = whole + packer.size + _U32.size, following
    return header, entries, whole, checksum


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Header and whole entries of a log file; the file is not touched.

    Raises:
        UserError: the file is missing, is no log, or its header is damaged.
    """
    return _parse(_read_bytes(path), path)[:2]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (POSIX keeps a new or renamed file's name only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Log:
    """An open log. Without a path it lives in memory: ranks that do not write hold the same entries."""

    def __init__(self, header: dict[str, Any], entries: list[Entry] | None = None) -> None:
        """A log in memory."""
        self.header = header
        self.entries: list[Entry] = entries or []
        self.cut_bytes = 0
        """Bytes of a torn tail that opening removed."""
        self._packer = _packer(header["directions"])
        self._descriptor: int | None = None
        self._checksum = 0
        self._length = 0

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Self:
        """Begin a log file; it appears whole or not at all."""
        log, data, beside = cls(header), _header_bytes(header), path.with_name(path.name + ".new")
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, path)
        sync_folder(path.parent)
        log._attach(path, len(data), zlib.crc32(data[: -_U32.size]))
        return log

    @classmethod
    def open(cls, path: Path) -> Self:
        """Go on with a log file; a torn tail is cut off and counted in ``cut_bytes``."""
        data = _read_bytes(path)
        header, entries, whole, checksum = _parse(data, path)
        log = cls(header, entries)
        log._attach(path, whole, checksum)
        log.cut_bytes = len(data) - whole
        if log.cut_bytes:
            log._truncate()
        return log

    def _attach(self, path: Path, length: int, checksum: int) -> None:
        self._descriptor = os.open(path, os.O_WRONLY)
        self._length, self._checksum = length, checksum

    def _truncate(self) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, self._length)
        os.fsync(self._descriptor)

    @property
    def version(self) -> int:
        """Number of entries, and so the newest version of the parameters."""
        return len(self.entries)

    def append(self, entry: Entry) -> None:
        """Add one entry; when this returns, it is on the disk.

        Raises:
            UserError: the disk refuses; the file is left as it was.
        """
        self.extend([entry])

    def extend(self, entries: Sequence[Entry]) -> None:
        """Add entries that follow one another; when this returns, they are on the disk.

        Raises:
            UserError: the disk refuses; the file is left as it was.
        """
        numbers = [entry.step for entry in entries]
        assert numbers == list(range(self.version + 1, self.version + 1 + len(entries)))
        assert all(len(entry.scalars) == self.header["directions"] for entry in entries)
        if self._descriptor is not None and entries:
            self._write(entries)
        self.entries.extend(entries)

    def _write(self, entries: Sequence[Entry]) -> None:
        assert self._descriptor is not None
        data, checksum = b"", self._checksum
        for entry in entries:
            body = self._packer.pack(entry.step, entry.position, entry.lr, *entry.scalars)
            checksum = zlib.crc32(body, checksum)
            data += body + _U32.pack(checksum)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self._length + written)
            os.fsync(self._descriptor)
        except OSError as error:
            self._truncate()
            raise UserError(
                f"cannot write step {entries[0].step} to the log: {error.strerror}; "
                f"the {self.version} steps before it are safe: make room and start the same command again"
            ) from error
        self._length, self._checksum = self._length + len(data), checksum

    def close(self) -> None:
        """Close the file; the entries stay."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def main(arguments: list[str]) -> int:
    """Print a log as JSON lines: the header, then the entries."""
    if len(arguments) != 1:
        print("usage: python -m zo.log FILE", file=sys.stderr)
        return 2
    try:
        header, entries = read(Path(arguments[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for item in (header, *map(asdict, entries)):
        print(json.dumps(item))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
