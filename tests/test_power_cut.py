"""A power cut may leave a disk between data and names: no state that it may be left in gives other
weights.

Everything that a run does to its disk is recorded. From the record come the states that a file
system may show after the power was cut: names are journalled in their order, a file's bytes come to
the disk page by page at any time, and only a sync makes either of them certain. Each state is gone
on from.
"""

import os
import random
import uuid
from pathlib import Path

import pytest
import torch
from torch import nn

from zo.config.schema import MemoryConfig
from zo.io import engines as disk
from zo.method.entry import Entry
from zo.model.blocks import find_layout
from zo.model.source import ModelSource
from zo.state.log import Log
from zo.streaming.replica import Replica

pytestmark = pytest.mark.slow

STEPS, PAGE = 5, 4096
HEADER = {
    "base": "b",
    "data": "d",
    "directions": 1,
    "distribution": "rademacher",
    "rule": "sgd",
    "seed": 3,
}
MEMORY = MemoryConfig(store="disk", unit="module", slots=2, lag=1)


class ExpensiveSource(ModelSource):
    """Weights that are slow to make, so that a store keeps them at version 0."""

    def is_expensive(self, block):
        return True


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))


def go(folder, base=ModelSource, seed=3):
    """Begin a run, or go on with it, to ``STEPS``; the fingerprint of its weights."""
    folder.mkdir(exist_ok=True)
    net = model()
    replica = Replica(
        net,
        find_layout(net, "module"),
        lambda engine: base(net),
        MEMORY,
        torch.device("cpu"),
        folder / "b",
    )
    path = folder / "steps.log"
    header = {**HEADER, "run": uuid.uuid4().hex, "seed": seed, "weight_decay": 0.1}
    log = Log.open(path) if path.exists() else Log.create(path, header)
    replica.open(log)
    while log.version < STEPS:
        step = log.version + 1
        log.append(Entry(step, step, 0.01, (1.0 / step,)))
        replica.pass_over()
    found = replica.fingerprint()
    replica.close()
    log.close()
    return found


class Record:
    """What a run does to its disk, in its order."""

    def __init__(self, monkeypatch):
        self.events = []
        for name in ("rename", "link", "unlink"):
            monkeypatch.setattr(os, name, self._named(name, getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._synced(os.fsync))
        events = self.events

        class Recorded(disk.Mapped):
            def write(self, path, data):
                super().write(path, data)
                events.append(("write", str(path), data.numpy().tobytes()))

        monkeypatch.setitem(disk.ENGINES, "mmap", Recorded)

    def _named(self, name, original):
        def named(*paths, **options):
            original(*paths, **options)
            self.events.append((name, *map(str, paths)))

        return named

    def _synced(self, original):
        def synced(descriptor):
            path = Path(f"/proc/self/fd/{descriptor}").resolve()
            if path.is_file():
                self.events.append(("write", str(path), path.read_bytes()))
            original(descriptor)
            self.events.append(("sync", str(path)))

        return synced


class State:
    """What is certain on a disk after some events, and what may be."""

    def __init__(self):
        self.names, self.certain_names = [{}], 0
        self.contents, self.certain_bytes = [], []

    def after(self, events):
        for kind, path, *more in events:
            getattr(self, kind)(path, *more)
        return self

    def _now(self, path, file=None):
        now = {**self.names[-1], path: file}
        self.names.append({p: f for p, f in now.items() if f is not None})

    def write(self, path, data):
        if path not in self.names[-1]:
            self.contents.append([b""])
            self.certain_bytes.append(0)
            self._now(path, len(self.contents) - 1)
        self.contents[self.names[-1][path]].append(data)

    def sync(self, path):
        if path in self.names[-1]:
            file = self.names[-1][path]
            self.certain_bytes[file] = len(self.contents[file]) - 1
        else:
            self.certain_names = len(self.names) - 1

    def rename(self, old, new):
        file = self.names[-1][old]
        self._now(old)
        self._now(new, file)
        del self.names[-2]  # Both in one: a rename is atomic.

    def link(self, old, new):
        self._now(new, self.names[-1][old])

    def unlink(self, path):
        self._now(path)

    def image(self, chance, whole):
        """Files that the disk may show: names of some moment, bytes of others."""
        names = self.names[chance.randint(self.certain_names, len(self.names) - 1)]
        shown = {}
        for path, file in names.items():
            versions = self.contents[file][self.certain_bytes[file] :]
            first = chance.randrange(len(versions))
            one, other = versions[first], versions[min(first + 1, len(versions) - 1)]
            if whole or one == other:
                shown[path] = one
                continue
            one = one.ljust(len(other), b"\0")
            pages = [chance.choice((one, other))[i : i + PAGE] for i in range(0, len(other), PAGE)]
            shown[path] = b"".join(pages)
        return shown


@pytest.mark.parametrize("base", [ModelSource, ExpensiveSource])
def test_no_power_cut_gives_other_weights(tmp_path, monkeypatch, base):
    with monkeypatch.context() as recording:
        record = Record(recording)
        expected = go(tmp_path / "run", base)
    begun = f"{tmp_path}/run/"
    events = [e for e in record.events if e[1].startswith(begun.rstrip("/"))]
    assert sum(e[0] == "rename" for e in events) >= STEPS * 4
    seen, tried = set(), 0
    for cut in range(len(events) + 1):
        for draw in range(4):
            chance = random.Random(cut * 4 + draw)
            image = State().after(events[:cut]).image(chance, whole=draw % 2 == 0)
            key = hash(frozenset(image.items()))
            if key in seen:
                continue
            seen.add(key)
            folder = tmp_path / f"image-{tried}"
            (folder / "b").mkdir(parents=True)
            for path, data in image.items():
                (folder / path.removeprefix(begun)).write_bytes(data)
            assert go(folder, base) == expected, f"after {cut} of {len(events)} events, draw {draw}"
            tried += 1
    assert tried > 150
