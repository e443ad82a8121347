"""Damaged logs, blocks, shards and indices, and what reads them; see :mod:`malformed`."""

import json
import os
import struct
import tempfile
import zlib
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from damage import NUMBERS, TEXTS, VALUES, as_json, damages_of
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from zo.errors import UserError
from zo.io.block_file import Header
from zo.io.engines import PAGE
from zo.method.entry import Entry
from zo.model.checkpoint import shard_files, tensors_of
from zo.state.log import Log, read
from zo.state.log_file import MAGIC, repair
from zo.state.snapshot import Snapshot

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
HELD = tempfile.TemporaryDirectory(prefix="zo-malformed-", dir=MEMORY)
FOLDER = Path(HELD.name)


def written(name, data):
    """Return the path of a file with some bytes, and nothing else of its name."""
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


# --- the log

HEADER = {
    "run": "r", "base": "b", "data": "d", "directions": 2, "distribution": "rademacher",
    "rule": "sgd", "seed": 0, "weight_decay": 0.0, "order": ["a", "b"], "meet": "", "written": [],
}  # fmt: skip


@cache
def whole_log(entries):
    """Return the bytes of a log."""
    path = FOLDER / "whole.log"
    log = Log.create(path, HEADER)
    log.extend([Entry(n, 8 * n, 0.5, (1.0, -0.25), n % 3) for n in range(1, entries + 1)])
    log.close()
    return path.read_bytes()


def sealed_log(header, entries, directions):
    """Return a log whose checksums are right, whatever it says."""
    body = MAGIC + struct.pack("<I", len(header)) + header
    checksum = zlib.crc32(body)
    data = body + struct.pack("<I", checksum)
    for step, position, lr, part in entries:
        body = struct.pack(
            f"<QQdI{directions}f", step, position, lr, part, *[lr % 1.0] * directions
        )
        checksum = zlib.crc32(body, checksum)
        data += body + struct.pack("<I", checksum)
    return data


HEADERS = st.dictionaries(
    st.sampled_from([*HEADER, "held", "anchor", "x"]), VALUES, max_size=3
).map(lambda changes: as_json({**HEADER, **changes}))
COUNTS = st.sampled_from([1, 2, 3, 2**32 - 1, 2**63, 2**64 - 1])
SEALED = st.builds(
    sealed_log,
    HEADERS | damages_of(HEADERS, 2),
    st.lists(st.tuples(COUNTS, COUNTS, st.floats(), st.integers(0, 2**32 - 1)), max_size=4),
    st.integers(0, 3),
)
LOGS = st.one_of(
    damages_of(st.integers(0, 6).map(whole_log)),
    SEALED,
    damages_of(SEALED, 2),
    st.binary(max_size=60).map(lambda tail: MAGIC + tail),
    st.binary(max_size=60),
)


def read_log(data):
    path = written("x.log", data)
    try:
        header, entries = read(path)
    except UserError:
        if (repaired := repair(path)) is not None:
            repaired[2].unlink()
        header, entries = read(path)
    log = Log.open(path)
    assert log.entries == entries
    log.digest(len(entries))
    log.close()
    json.dumps(header)


# --- headers of blocks, shards and snapshots

BLOCK = Header("a.0", "l", "r", 3, 4096, "c")


def sealed_page(text):
    body = b"ZOBLK1\n" + struct.pack("<I", len(text)) + text
    return (body + struct.pack("<I", zlib.crc32(body))).ljust(PAGE, b"\0")


PAGES = st.one_of(
    damages_of(st.just(BLOCK.page())),
    st.dictionaries(st.sampled_from([*asdict(BLOCK), "x"]), VALUES, max_size=3).map(
        lambda changes: sealed_page(as_json({**asdict(BLOCK), **changes}))
    ),
    VALUES.map(lambda value: sealed_page(as_json(value))),
    st.binary(max_size=60),
)


def read_page(page):
    header = Header.parse(page)
    assert header is None or header.version >= 0


@cache
def shard():
    tensors = {"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}
    facts = {"version": "3", "base": "b", "log": "l", "fingerprint": "f"}
    return save(tensors, facts)


def with_header(text, tail=b"\0" * 52):
    return struct.pack("<Q", len(text)) + text + tail


SIZES = st.lists(NUMBERS | st.integers(0, 60), max_size=4) | VALUES
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "X", "BOOL"]) | VALUES,
        "shape": SIZES,
        "data_offsets": SIZES,
    }
)
SHARDS = st.one_of(
    damages_of(st.builds(shard)),
    st.dictionaries(TEXTS, TENSORS | VALUES, max_size=3).map(lambda h: with_header(as_json(h))),
    VALUES.map(lambda value: with_header(as_json(value))),
    st.binary(max_size=40),
)


def read_shard(data):
    path = written("model.safetensors", data)
    # What callers of either expect.
    with suppress(OSError):
        tensors_of(path)
    with suppress(SafetensorError, OSError, KeyError, ValueError):
        Snapshot(path)


NAMES = (
    st.sampled_from(["model.safetensors", "../x.safetensors", "/x.safetensors", "a\0b"]) | VALUES
)
INDICES = st.one_of(
    st.fixed_dictionaries(
        {"metadata": st.just({}) | VALUES, "weight_map": st.dictionaries(TEXTS, NAMES) | VALUES}
    ).map(as_json),
    VALUES.map(as_json),
    damages_of(st.just(b'{"metadata": {}, "weight_map": {"a": "x.safetensors"}}')),
)


def read_index(data):
    path = written("sharded/model.safetensors.index.json", data)
    for file in shard_files(str(path.parent), {}):
        assert file.parent.resolve() == path.parent.resolve()


read_index.refusals = (OSError,)
