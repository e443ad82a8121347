"""The header of a block's file: whatever its bytes are, it is read, or the block is rebuilt."""

import json
import os
import random
import struct
import zlib
from dataclasses import asdict

import pytest

from zo.errors import UserError
from zo.io.block_file import MAGIC, Header
from zo.io.engines import PAGE
from zo.method.entry import Entry
from zo.state.log import Log

HEADER = Header("model.layers.0", "a" * 16, "b" * 64, 7, 4096, "c" * 16)


def page(text):
    """A page with these bytes of JSON, its checksum right."""
    body = MAGIC + struct.pack("<I", len(text)) + text
    return (body + struct.pack("<I", zlib.crc32(body))).ljust(PAGE, b"\0")


def test_a_header_is_read_as_it_was_written():
    assert Header.parse(HEADER.page()) == HEADER


WRONG = {
    "an unknown key": {**asdict(HEADER), "more": 1},
    "a missing key": {k: v for k, v in asdict(HEADER).items() if k != "run"},
    "a version of another type": {**asdict(HEADER), "version": "7"},
    "a version that is true": {**asdict(HEADER), "version": True},
    "a negative version": {**asdict(HEADER), "version": -1},
    "a list": [1, 2],
    "nothing": None,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_header_of_wrong_types_is_corrupt(wrong):
    assert Header.parse(page(json.dumps(WRONG[wrong]).encode())) is None


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"{", b"[" * 3000, b""])
def test_a_header_that_is_not_json_is_corrupt(text):
    assert Header.parse(page(text)) is None


def test_any_bytes_are_read_or_corrupt():
    chance, whole = random.Random(0), HEADER.page()
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(300)] = chance.randrange(256)
        assert Header.parse(bytes(data)) in (HEADER, None)
        assert Header.parse(bytes(data[: chance.randrange(PAGE)])) is None


def test_a_disk_that_refuses_to_be_cut_still_ends_in_one_line(tmp_path, monkeypatch):
    """An error in the undoing of a failed write must not hide the remedy."""
    log = Log.create(tmp_path / "steps.log", {"directions": 1})

    def fails(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fails)
    monkeypatch.setattr(os, "ftruncate", fails)
    with pytest.raises(UserError, match="cannot write step 1 to the log: Input/output error"):
        log.append(Entry(1, 1, 1e-3, (1.0,)))
