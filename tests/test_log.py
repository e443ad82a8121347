"""The log is the training: a lost, torn or altered entry must be noticed, and nothing before it lost."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from zo.config import UserError
from zo.log import Entry, Log, main, read

HEADER = {"directions": 2, "seed": 1, "base": "abc"}


def entry(step):
    return Entry(step, step * 16, 1e-4 / step, (0.5 * step, -0.25))


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


def test_every_flipped_byte_ends_the_log_before_it(tmp_path):
    path = tmp_path / "steps.log"
    data, start = written(path, 3), len(written(tmp_path / "none", 0))
    size = (len(data) - start) // 3
    for at in range(start, len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert len(read(path)[1]) == (at - start) // size


def test_lost_and_exchanged_entries_are_noticed(tmp_path):
    path = tmp_path / "steps.log"
    data, start = written(path, 3), len(written(tmp_path / "none", 0))
    size = (len(data) - start) // 3
    one, two, three = (data[start + i * size : start + (i + 1) * size] for i in range(3))
    for body, kept in ((one + three, 1), (two + one + three, 0), (one + one + two, 1)):
        path.write_bytes(data[:start] + body)
        assert len(read(path)[1]) == kept


@pytest.mark.parametrize("content", [b"", b"hello", b"ZOLOG1\n\xff\xff\xff\x7f{}"])
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
        [sys.executable, "-m", "zo.log", tmp_path / "steps.log"], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines[0] == HEADER
    assert lines[2] == {"step": 2, "position": 32, "lr": 5e-5, "scalars": [1.0, -0.25]}


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the file's size is the kernel's own refusal in the middle of a write."""
    path = tmp_path / "steps.log"
    data = written(path, 3)
    script = f"""
import resource
from pathlib import Path
from zo.config import UserError
from zo.log import Entry, Log
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
