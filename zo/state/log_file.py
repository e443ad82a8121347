"""Log file format: header, entries, torn tails, damage, repair."""

import itertools
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from zo.errors import UserError
from zo.io.atomic import write_whole
from zo.method.entry import Entry

MAGIC = b"ZOLOG3\n"


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


MOST_DIRECTIONS = 2**24
"""Of one step: 64 MiB of scalars."""
SEARCHED_BYTES, PIECE_BYTES = 2**30, 2**20
"""Checksummed at most in search of whole entries after a damaged one, a second or two; looked at
at once."""
MOST_SEED = 2**63 - 1


HEADER_TYPES: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "base": str,
    "data": str,
    "directions": int,
    "distribution": str,
    "rule": str,
    "seed": int,
    "weight_decay": (int, float),
    "anchor": (int, float),
    "order": list,
    "meet": str,
    "written": list,
    "held": list,
}


def _packer(directions: int) -> struct.Struct:
    return struct.Struct(f"<QQdI{directions}f")


def _packed(packer: struct.Struct, entry: Entry) -> bytes:
    return packer.pack(entry.step, entry.position, entry.lr, entry.part, *entry.scalars)


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
    """Return header, its bytes with its checksum, and the checksum."""
    start = len(MAGIC) + _U32.size
    version = data[: len(MAGIC)].rstrip(b"\n")
    if re.fullmatch(rb"ZOLOG\d", version) and version != MAGIC.rstrip():
        raise UserError(
            f"{path} is a log of another version, {version.decode()}, and this zo reads "
            f"{MAGIC.decode().rstrip()}; install the version of zo that wrote it"
        )
    if len(data) < start or not data.startswith(MAGIC):
        raise UserError(f"{path} is not a log of zo: it does not begin with {MAGIC!r}")
    end = start + _U32.unpack_from(data, len(MAGIC))[0]
    checksum = zlib.crc32(data[:end])
    if len(data) < end + _U32.size or _U32.unpack_from(data, end)[0] != checksum:
        raise UserError(
            f"{path} has a damaged header; take a copy of the log from elsewhere, or begin a new "
            "run"
        )
    try:
        header = json.loads(data[start:end])
    except (ValueError, RecursionError):
        header = None
    wrong = _wrong_in(header)
    if wrong:
        raise UserError(
            f"{path} has a header that cannot be used: {wrong}; take a copy of the log from "
            "elsewhere, or begin a new run"
        )
    return header, end + _U32.size, checksum


def _wrong_in(header: Any) -> str:
    """Return the first thing that is wrong in a header, or nothing."""
    if not isinstance(header, dict):
        return "it is not a JSON object"
    for key, kind in HEADER_TYPES.items():
        value = header.get(key)
        if key in header and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{key}={str(value)[:40]!r} has a wrong type"
    if not 1 <= header.get("directions", 0) <= MOST_DIRECTIONS:
        return f"directions={header.get('directions')} is not a number from 1 to {MOST_DIRECTIONS}"
    if not 0 <= header.get("seed", 0) <= MOST_SEED:
        return f"seed={header['seed']} is not a number from 0 to 2**63 - 1"
    for key in ("weight_decay", "anchor"):
        # Compared, not converted: a whole number may be too large for a float.
        if not 0 <= header.get(key, 0.0) <= sys.float_info.max:
            return f"{key}={header[key]} is not a finite number from 0"
    for key in ("order", "written", "held"):
        if not all(isinstance(name, str) for name in header.get(key, ())):
            return f"{key} is not a list of names"
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
        step, position, lr, part, *scalars = packer.unpack(body)
        if step != len(entries) + 1:
            break
        if not (isfinite(lr) and all(map(isfinite, scalars))):
            damage = f"step {step} has a number that is not finite"
            break
        entries.append(Entry(step, position, lr, tuple(scalars), part))
        end, checksum = end + packer.size + _U32.size, following
    if not damage and (after := _whole_after(data, packer, end, checksum)):
        damage = f"step {len(entries) + 1} is damaged and {after}"
    return _Scan(header, entries, end, checksum, damage)


def _whole_after(data: bytes, packer: struct.Struct, end: int, checksum: int) -> str:
    """Return what is whole after an invalid entry at ``end``, as a phrase; empty if nothing is.

    An entry's checksum continues the one stored before it, so that an entry can be checked wherever
    it lies.
    """
    size, view = packer.size + _U32.size, memoryview(data)
    if len(data) < end + 2 * size:
        return ""
    # Where only the invalid entry's own checksum is wrong, the next continues the one that it
    # should have.
    before = zlib.crc32(view[end : end + packer.size], checksum)
    if _U32.unpack_from(data, end + 2 * size - _U32.size)[0] == zlib.crc32(
        view[end + size : end + size + packer.size], before
    ):
        return f"steps after it are whole ({_U64.unpack_from(data, end + size)[0]} is)"
    searched = 0
    for at in _plausible(data, end + 1, size):
        if _U32.unpack_from(data, at + packer.size)[0] == zlib.crc32(
            view[at : at + packer.size], _U32.unpack_from(data, at - _U32.size)[0]
        ):
            return f"steps after it are whole ({_U64.unpack_from(data, at)[0]} is)"
        searched += size
        if searched > SEARCHED_BYTES:
            return "what follows it is no torn tail: too much of it looks like the start of a step"
    return ""


def _plausible(data: bytes, start: int, size: int) -> Iterator[int]:
    """Yield the offsets, in order, where an entry may begin: some bytes may be lost or put in.

    They hold the number of a step that a log of this length can have.
    """
    most, stop = len(data) // size + 1, len(data) - size + 1
    for first in range(start, stop, PIECE_BYTES):
        count = min(PIECE_BYTES, stop - first)
        raw = np.frombuffer(data, np.uint8, count + _U64.size - 1, first)
        steps = sliding_window_view(raw, _U64.size)
        large = steps[:, 4:].any(axis=1)
        numbers = steps[:, :4].astype(np.uint32) @ np.array([1, 2**8, 2**16, 2**24], np.uint32)
        for offset in np.flatnonzero(~large & (numbers > 0) & (numbers <= most)):
            yield first + int(offset)


def _intact(data: bytes, path: Path) -> _Scan:
    """Return the content of a log that is whole but for a torn tail.

    Raises:
        UserError: it is damaged before its end.
    """
    found = _scan(data, path)
    if found.damage:
        raise UserError(
            f"{path} is damaged: {found.damage}; nothing was changed: put a copy in its place (of "
            f"another node, or a backup), or cut it after step {len(found.entries)}: python -m "
            f"zo.log {path} --repair"
        )
    return found


def read_complete(path: Path, steps: int) -> tuple[dict[str, Any], list[Entry]]:
    """Return header and entries of a log that was published: no crash has torn its tail.

    Args:
        path: of the file.
        steps: entries that it must have.

    Raises:
        UserError: it has fewer or more, ends within one, or as :func:`zo.state.log.read`.
    """
    data = _read_bytes(path)
    found = _intact(data, path)
    whole = len(found.entries)
    if whole > steps or (whole == steps and found.end != len(data)):
        raise UserError(
            f"{path} goes on after entry {steps}, its last as config.yaml has it; take both files "
            "from one copy of the artefact"
        )
    if whole < steps:
        raise UserError(
            f"{path} is cut short: whole to entry {whole} of {steps}; take another copy of the log"
        )
    return found.header, found.entries


def repair(path: Path) -> tuple[int, int, Path] | None:
    """Cut a damaged log before its damage and keep a copy beside it; not during a run.

    Returns:
        Steps that are left, bytes that were cut, and the copy; ``None`` for a log that is not
        damaged.

    Raises:
        UserError: the header is damaged too, or the disk refuses.
    """
    data = _read_bytes(path)
    found = _scan(data, path)
    if not found.damage:
        return None
    names = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    copies = (path.with_name(f"{path.name}.damaged{name}") for name in names)
    copy = next(copy for copy in copies if not copy.exists())
    try:
        write_whole(copy, data)
        with open(path, "rb+") as file:
            file.truncate(found.end)
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot repair {path}: {error.strerror}; make room, or repair a copy elsewhere"
        ) from error
    return len(found.entries), len(data) - found.end, copy


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}") from error
