"""The block cache: write-backs that are not due, reads that overlap, transfers that fail."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from simulated_device import SimulatedDevice
from test_budget import HEADER, source

from zo.config.schema import MemoryConfig
from zo.errors import UserError
from zo.io.engines import Mapped
from zo.method.entry import Entry
from zo.model.blocks import find_layout
from zo.state.log import Log
from zo.streaming import cache as caches
from zo.streaming import device as devices
from zo.streaming.disk_store import DiskStore
from zo.streaming.replica import Replica

CPU = torch.device("cpu")


def replica_of(folder, model=None, unit="layer", entries=(), **memory):
    model = model or make_llama(num_hidden_layers=4)
    config = MemoryConfig(**{"store": "disk", "lag": 1, "slots": 2, "unit": unit, **memory})
    replica = Replica(model, find_layout(model, unit), source(model), config, CPU, folder)
    replica.open(Log(HEADER, list(entries)))
    return replica


def step(replica, scalar=1.0):
    number = replica.log.version + 1
    replica.log.append(Entry(number, number, 1e-3, (scalar,)))
    replica.pass_over()
    replica.drain()


def written(folder):
    return sorted(path.name for path in Path(folder).glob("*.block"))


def test_a_block_of_frozen_parameters_is_never_written(tmp_path):
    """A step of LoRA must not write the bytes of the weights that it leaves alone."""
    model = make_llama(num_hidden_layers=4)
    for parameter in model.model.layers[2].parameters():
        parameter.requires_grad_(False)
    replica = replica_of(tmp_path, model)
    frozen = [f"{b.index:06d}.block" for b in replica.layout.blocks if not b.trainable]
    step(replica)
    found = written(tmp_path)
    replica.close()
    assert len(frozen) == 1
    assert set(found) == {f"{b.index:06d}.block" for b in replica.layout.blocks} - set(frozen)


def test_an_entry_that_changes_nothing_writes_nothing(tmp_path):
    replica = replica_of(tmp_path)
    step(replica, scalar=0.0)
    assert not written(tmp_path)
    step(replica)
    assert len(written(tmp_path)) == len(replica.layout.blocks)
    replica.close()


class Overlap(SimulatedDevice):
    """Counts reads of a disk that begin while an upload is under way."""

    def __init__(self):
        super().__init__(0)
        self.overlapped = 0

    def _progress(self):
        """Run nothing unless something waits for it."""


@pytest.mark.parametrize("buffers", [1, 2])
def test_a_read_of_the_disk_overlaps_an_upload(monkeypatch, tmp_path, buffers):
    """With one buffer each way the disk and the link take turns, and a step takes both times."""
    made, read = [], Mapped.read

    def counting(self, path, offset, into):
        copies = [item for item in made[-1].streams[1].queue if isinstance(item, tuple)]
        made[-1].overlapped += any(not isinstance(item[0], str) for item in copies)
        return read(self, path, offset, into)

    monkeypatch.setitem(devices.DEVICES, "cpu", lambda _: made.append(Overlap()) or made[-1])
    monkeypatch.setattr(caches, "STAGING_BUFFERS", buffers)
    replica = replica_of(tmp_path)
    step(replica)
    replica.close()
    replica = replica_of(tmp_path, entries=replica.log.entries, slots=4)
    monkeypatch.setattr(Mapped, "read", counting)
    replica.cache.begin(every=True)
    replica.cache._upload.submit(lambda: None).queued()  # The first blocks' jobs have run.
    replica.drain()
    replica.close()
    assert bool(made[-1].overlapped) == (buffers == 2)


def test_a_prefetch_that_fails_is_read_again_when_it_is_needed(monkeypatch, tmp_path):
    replica = replica_of(tmp_path)
    step(replica)
    expected = replica.fingerprint()
    fetch, failures = DiskStore.fetch, [2]

    def fails_once(self, block, slot):
        if block.index == failures[0]:
            failures[0] = -1
            raise UserError("the disk is gone for a moment")
        return fetch(self, block, slot)

    monkeypatch.setattr(DiskStore, "fetch", fails_once)
    with pytest.raises(UserError, match="for a moment"):
        replica.pass_over()
    assert replica.fingerprint() == expected
    replica.close()


def test_a_write_back_that_fails_ends_the_run_and_loses_nothing(monkeypatch, tmp_path):
    replica = replica_of(tmp_path)
    keep = DiskStore.keep

    def full(self, block, slot, version):
        if block.index == 3:
            raise UserError(f"block {block.name} cannot be written: the disk is full")
        keep(self, block, slot, version)

    monkeypatch.setattr(DiskStore, "keep", full)
    with pytest.raises(UserError, match="disk is full"):
        step(replica)
    with suppress(UserError):
        replica.close()
    monkeypatch.setattr(DiskStore, "keep", keep)
    again, fresh = replica_of(tmp_path), replica_of(tmp_path / "other")
    for resumed in (again, fresh):
        resumed.log.extend(replica.log.entries)
    assert again.fingerprint() == fresh.fingerprint()
    again.close()
    fresh.close()
