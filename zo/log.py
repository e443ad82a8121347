"""The log of scalars is the state of training: theta_t = replay(theta_0, entries 1..t).

A file is a header and fixed-size entries, append-only. An entry is durable before any parameter moves, and carries
a CRC-32 that continues the checksum of what lies before it, so a torn, altered, lost or reordered entry is noticed.

    "ZOLOG1" newline | u32 n | n bytes of JSON | u32 checksum | entries
    entry = u64 step | u64 position | f64 lr | f32 scalars[directions] | u32 checksum          (little-endian)

An invalid entry with nothing valid after it is the end of a write that a crash cut short: it is cut off. One with
valid entries after it is damage: the log is refused, for cutting there would lose steps that are whole.

``python -m zo.log FILE`` prints it, one JSON object a line; ``python -m zo.log FILE --repair`` keeps a copy of a
damaged log and cuts it before the damage.
"""

import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Self

from zo.config import UserError

MAGIC = b"ZOLOG1\n"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
MOST_DIRECTIONS = 2**24
"""Of one step: 64 MiB of scalars."""
HEADER_TYPES: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "base": str,
    "data": str,
    "directions": int,
    "distribution": str,
    "rule": str,
    "seed": int,
    "weight_decay": (int, float),
}


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


@dataclass(frozen=True)
class _Scan:
    """The content of a log file."""

    header: dict[str, Any]
    entries: list[Entry]
    """The valid ones from the first step on."""
    end: int
    """Bytes of header and entries."""
    checksum: int
    """Running checksum there."""
    damage: str
    """Why the log is no log with a torn tail; empty if it may be one."""


def _parse_header(data: bytes, path: Path) -> tuple[dict[str, Any], int, int]:
    """Header, its bytes with its checksum, and the checksum."""
    start = len(MAGIC) + _U32.size
    if len(data) < start or not data.startswith(MAGIC):
        raise UserError(f"{path} is not a log of zo: it does not begin with {MAGIC!r}")
    end = start + _U32.unpack_from(data, len(MAGIC))[0]
    checksum = zlib.crc32(data[:end])
    if len(data) < end + _U32.size or _U32.unpack_from(data, end)[0] != checksum:
        raise UserError(f"{path} has a damaged header; take a copy of the log from elsewhere, or begin a new run")
    try:
        header = json.loads(data[start:end])
    except (ValueError, RecursionError):
        header = None
    wrong = _wrong_in(header)
    if wrong:
        raise UserError(
            f"{path} has a header that cannot be used: {wrong}; take a copy of the log from elsewhere, or begin a "
            "new run"
        )
    return header, end + _U32.size, checksum


def _wrong_in(header: Any) -> str:
    """The first thing that is wrong in a header, or nothing."""
    if not isinstance(header, dict):
        return "it is not a JSON object"
    for key, kind in HEADER_TYPES.items():
        value = header.get(key)
        if key in header and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{key}={str(value)[:40]!r} has a wrong type"
    if not 1 <= header.get("directions", 0) <= MOST_DIRECTIONS:
        return f"directions={header.get('directions')} is not a number from 1 to {MOST_DIRECTIONS}"
    if not isfinite(header.get("weight_decay", 0.0)):
        return f"weight_decay={header['weight_decay']} is not finite"
    return ""


def _scan(data: bytes, path: Path) -> _Scan:
    header, end, checksum = _parse_header(data, path)
    packer, damage = _packer(header["directions"]), ""
    entries: list[Entry] = []
    while end + packer.size + _U32.size <= len(data):
        body = data[end : end + packer.size]
        following = zlib.crc32(body, checksum)
        if _U32.unpack_from(data, end + packer.size)[0] != following:
            break
        step, position, lr, *scalars = packer.unpack(body)
        if step != len(entries) + 1:
            break
        if not (isfinite(lr) and all(map(isfinite, scalars))):
            damage = f"step {step} has a number that is not finite"
            break
        entries.append(Entry(step, position, lr, tuple(scalars)))
        end, checksum = end + packer.size + _U32.size, following
    if not damage and (later := _valid_after(data, packer, end, checksum)):
        damage = f"step {len(entries) + 1} is damaged and steps after it are whole ({later} is)"
    return _Scan(header, entries, end, checksum, damage)


def _valid_after(data: bytes, packer: struct.Struct, end: int, checksum: int) -> int:
    """The step of a valid entry after an invalid one at ``end``, or 0: what tells damage from a torn tail.

    An entry's checksum continues the one stored before it, so that an entry can be checked wherever it lies.
    """
    size = packer.size + _U32.size
    if len(data) < end + 2 * size:
        return 0
    most = len(data) // size + 1
    # Where only the invalid entry's own checksum is wrong, the next continues the one that it should have.
    before = zlib.crc32(data[end : end + packer.size], checksum)
    if _U32.unpack_from(data, end + 2 * size - _U32.size)[0] == zlib.crc32(
        data[end + size : end + size + packer.size], before
    ):
        return int(_U64.unpack_from(data, end + size)[0])
    # Byte by byte: some may have been lost or put in.
    for at in range(end + 1, len(data) - size + 1):
        step = _U64.unpack_from(data, at)[0]
        if 0 < step <= most and _U32.unpack_from(data, at + packer.size)[0] == zlib.crc32(
            data[at : at + packer.size], _U32.unpack_from(data, at - _U32.size)[0]
        ):
            return int(step)
    return 0


def _intact(data: bytes, path: Path) -> _Scan:
    """The content of a log that is whole but for a torn tail.

    Raises:
        UserError: it is damaged before its end.
    """
    found = _scan(data, path)
    if found.damage:
        raise UserError(
            f"{path} is damaged: {found.damage}; nothing was changed: put a copy in its place (of another node, or a "
            f"backup), or cut it after step {len(found.entries)}: python -m zo.log {path} --repair"
        )
    return found


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Header and whole entries of a log file; the file is not touched.

    Raises:
        UserError: the file is missing, is no log, or is damaged before its end.
    """
    found = _intact(_read_bytes(path), path)
    return found.header, found.entries


def repair(path: Path) -> tuple[int, int, Path] | None:
    """Cut a damaged log before its damage, and keep a copy of it beside it; only while no run goes on.

    Returns:
        Steps that are left, bytes that were cut, and the copy; ``None`` for a log that is not damaged.

    Raises:
        UserError: the header is damaged too, or the disk refuses.
    """
    data = _read_bytes(path)
    found = _scan(data, path)
    if not found.damage:
        return None
    names = (path.with_name(f"{path.name}.damaged{n}") for n in ("", *(f".{i}" for i in range(2, 1000))))
    copy = next(name for name in names if not name.exists())
    try:
        with open(copy, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(copy.parent)
        with open(path, "rb+") as file:
            file.truncate(found.end)
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot repair {path}: {error.strerror}; make room, or repair a copy elsewhere") from error
    return len(found.entries), len(data) - found.end, copy


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
        self._path = Path()
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
        """Go on with a log file; a torn tail is cut off and counted in ``cut_bytes``.

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
            raise UserError(f"cannot write the log {path}: {error.strerror}; see to its rights and its disk") from error
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
        """Hexadecimal hash of the header: equal for the copies of one run's log, and for no other run's."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:32]

    def check_in_place(self) -> None:
        """See that the file is still the one under its name; a log in memory always is.

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
            remedy = "restore it from a copy" if held.st_nlink == 0 else "put it back under that name"
            raise UserError(
                f"{self._path} was {what} while the run went on, so that its steps would be lost; it held "
                f"{self.version} steps: {remedy} and start the same command again, or begin a new run"
            )
        if held.st_size != self._length:
            raise UserError(
                f"{self._path} was changed by another program: it has {held.st_size} bytes, and the run wrote "
                f"{self._length}; see that no other program writes there, and start the same command again"
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
            body = self._packer.pack(entry.step, entry.position, entry.lr, *entry.scalars)
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
                f"cannot write step {entries[0].step} to the log: {error.strerror}; "
                f"the {self.version} steps before it are safe: make room and start the same command again"
            ) from error
        self._length, self._checksum = self._length + len(data), checksum

    def close(self) -> None:
        """Close the file; the entries stay."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key of ``expected`` that a header does not agree with, its value there, and the expected one."""
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
        f"cut {-(-cut_bytes // size)} steps ({cut_bytes} bytes) from {path}, which has {steps} steps now; the damaged "
        f"log is {copy}. Snapshots of later steps are of the old log: move them away before the run goes on"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
