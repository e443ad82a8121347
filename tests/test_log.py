"""The log is the training: a lost, torn or altered entry must be noticed, and nothing before it
lost."""

import errno
import json
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from zo.errors import UserError
from zo.method.entry import Entry
from zo.state.log import Log, main, read
from zo.state.log_file import _header_bytes, repair

HEADER = {"directions": 2, "seed": 1, "base": "abc"}


def entry(step):
    return Entry(step, step * 16, 1e-4 / step, (0.5 * step, -0.25), part=step % 3)


def written(path, count):
    log = Log.create(path, HEADER)
    for step in range(1, count + 1):
        log.append(entry(step))
    log.close()
    return path.read_bytes()


def test_what_was_appended_is_read_back(tmp_path):
    written(tmp_path / "steps.log", 5)
    header, entries = read(tmp_path / "steps.log")
    assert header == HEADER
    assert entries == [entry(step) for step in range(1, 6)]


def test_logs_that_reach_other_parts_are_not_the_same():
    """A snapshot of one would be taken for the other's."""
    digests = {Log(HEADER, [replace(entry(1), part=part)]).digest(1) for part in (0, 1, 2)}
    assert len(digests) == 3


def test_an_entry_is_a_few_dozen_bytes(tmp_path):
    assert len(written(tmp_path / "a", 101)) - len(written(tmp_path / "b", 1)) <= 100 * 40


def test_a_tail_torn_at_any_byte_costs_only_its_own_entry(tmp_path):
    path = tmp_path / "steps.log"
    data = written(path, 3)
    size = len(data) - len(written(tmp_path / "two", 2))
    for lost in range(1, size + 1):
        path.write_bytes(data[:-lost])
        log = Log.open(path)
        assert log.version == 2
        assert log.cut_bytes == size - lost
        log.append(entry(3))
        log.close()
        assert path.read_bytes() == data


def test_a_flipped_byte_with_whole_steps_after_it_is_damage_and_the_last_entrys_a_torn_tail(
    tmp_path,
):
    """Cutting at the damage would lose the steps after it without a word."""
    path = tmp_path / "steps.log"
    data, start = written(path, 4), len(written(tmp_path / "none", 0))
    size = (len(data) - start) // 4
    for at in range(start, len(data)):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes(flipped)
        step = (at - start) // size + 1
        if step == 4:
            assert len(read(path)[1]) == 3
            continue
        for opened in (read, Log.open):
            with pytest.raises(UserError, match=rf"step {step} is damaged .*--repair") as caught:
                opened(path)
            assert "\n" not in str(caught.value)
        assert path.read_bytes() == flipped


def test_repair_keeps_a_copy_and_cuts_before_the_damage(tmp_path, capsys):
    path = tmp_path / "steps.log"
    data, start = written(path, 5), len(written(tmp_path / "none", 0))
    size = (len(data) - start) // 5
    damaged = bytearray(data)
    damaged[start + 2 * size + 3] ^= 8
    path.write_bytes(damaged)
    assert main([str(path), "--repair"]) == 0
    assert "cut 3 steps" in capsys.readouterr().out
    assert path.read_bytes() == data[: start + 2 * size]
    assert (tmp_path / "steps.log.damaged").read_bytes() == damaged
    assert len(Log.open(path).entries) == 2
    # However many copies there are, none is written over.
    for number in range(2, 1000):
        (tmp_path / f"steps.log.damaged.{number}").touch()
    path.write_bytes(damaged)
    assert repair(path)[2].name == "steps.log.damaged.1000"


@pytest.mark.parametrize("tail", [b"\0" * 200, bytes(range(1, 200)), b"\xff" * 150])
def test_a_tail_of_nothing_valid_is_cut_however_long(tmp_path, tail):
    path = tmp_path / "steps.log"
    data = written(path, 3)
    path.write_bytes(data + tail)
    log = Log.open(path)
    assert (log.version, log.cut_bytes) == (3, len(tail))
    assert path.read_bytes() == data


def test_lost_and_exchanged_entries_are_noticed(tmp_path):
    path = tmp_path / "steps.log"
    data, start = written(path, 3), len(written(tmp_path / "none", 0))
    size = (len(data) - start) // 3
    one, two, three = (data[start + i * size : start + (i + 1) * size] for i in range(3))
    for body in (two + three, one + one + two):
        path.write_bytes(data[:start] + body)
        with pytest.raises(UserError, match="damaged"):
            read(path)
    path.write_bytes(data[:start] + one + three)
    assert len(read(path)[1]) == 1


def test_a_log_that_was_deleted_or_moved_takes_no_more_steps(tmp_path):
    for change, said in (
        (Path.unlink, "was deleted"),
        (lambda p: p.rename(tmp_path / "elsewhere"), "was moved"),
    ):
        path = tmp_path / "steps.log"
        written(path, 2)
        log = Log.open(path)
        change(path)
        with pytest.raises(UserError, match=said) as caught:
            log.append(entry(3))
        assert "\n" not in str(caught.value)
        log.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"directions": -1},
        {"directions": "2"},
        {"directions": 10**12},
        {"seed": None},
        {"directions": True},
    ],
)
def test_a_header_that_no_run_writes_is_one_line(tmp_path, changes):
    path = tmp_path / "steps.log"
    path.write_bytes(_header_bytes(HEADER | changes))
    with pytest.raises(UserError, match="header that cannot be used"):
        read(path)


def test_numbers_that_are_not_finite_are_damage(tmp_path):
    path = tmp_path / "steps.log"
    data = written(path, 1)
    body = struct.pack("<QQdI2f", 2, 32, 1.0, 0, float("nan"), 0.0)
    path.write_bytes(
        data + body + struct.pack("<I", zlib.crc32(body, struct.unpack("<I", data[-4:])[0]))
    )
    with pytest.raises(UserError, match="step 2 has a number that is not finite"):
        read(path)


def test_whatever_the_bytes_are_a_log_is_read_or_refused(tmp_path):
    path, chance = tmp_path / "steps.log", random.Random(0)
    whole = written(path, 6)
    expected = read(path)[1]
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 5)] = chance.randbytes(chance.randint(0, 5))
        path.write_bytes(data)
        try:
            found = read(path)[1]
        except UserError:
            continue
        assert found == expected[: len(found)]


@pytest.mark.parametrize("content", [b"", b"hello", b"ZOLOG2\n", b"ZOLOG3\n\xff\xff\xff\x7f{}"])
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, capsys):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x "):
        read(path)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_printed_as_one_json_object_a_line(tmp_path):
    written(tmp_path / "steps.log", 2)
    run = subprocess.run(
        [sys.executable, "-m", "zo.state.log", tmp_path / "steps.log"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines[0] == HEADER
    assert lines[2] == {
        "step": 2,
        "position": 32,
        "lr": 5e-5,
        "scalars": [1.0, -0.25],
        "part": 2,
    }


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the file's size is the kernel's own refusal in the middle of a write."""
    path = tmp_path / "steps.log"
    data = written(path, 3)
    script = f"""
import resource
from pathlib import Path
from zo.config.schema import UserError
from zo.state.log import Entry, Log
log = Log.open(Path({str(path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(data) + 10}, {len(data) + 10}))
try:
    log.append(Entry(4, 64, 1.0, (1.0, 2.0)))
except UserError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert os.strerror(errno.EFBIG) in run.stdout
    assert run.stdout.count("\n") == 1
    assert path.read_bytes() == data
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
