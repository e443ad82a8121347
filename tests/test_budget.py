"""The memory that a run prints before its first step is what it allocates."""

from pathlib import Path

import pytest
import torch
from conftest import make_llama
from logs import HEADER
from plain import plain_config

from zo import Trainer
from zo.config.schema import MemoryConfig
from zo.io.engines import Mapped
from zo.model.blocks import find_layout
from zo.model.layout import Slice
from zo.model.source import ModelSource
from zo.state.log import Log
from zo.streaming import device as devices
from zo.streaming.budget import Budget, budget, disk_bytes, stored_bytes
from zo.streaming.device import HostDevice
from zo.streaming.replica import Replica


class OtherDevice(HostDevice):
    """A device with memory of its own, which it counts."""

    shares_host_memory = False

    def __init__(self):
        self.allocated = 0

    def empty(self, size_bytes):
        self.allocated += size_bytes
        return super().empty(size_bytes)


def source(model):
    return lambda engine: ModelSource(model)


def replica_of(unit, folder=Path(), **memory):
    model = make_llama(num_hidden_layers=4).to(torch.bfloat16)
    layout = find_layout(model, unit)
    config = MemoryConfig(unit=unit, **memory)
    replica = Replica(model, layout, source(model), config, torch.device("cpu"), folder)
    replica.open(Log(HEADER))
    return replica


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_what_is_allocated_is_what_was_computed(monkeypatch, tmp_path, store, unit, slots):
    other = OtherDevice()
    monkeypatch.setitem(devices.DEVICES, "cpu", lambda device: other)
    staged, allocate = [], Mapped.allocate

    def counting(self, size_bytes):
        staged.append(size_bytes)
        return allocate(self, size_bytes)

    replica = replica_of(unit, tmp_path, store=store, slots=slots)
    found = replica.budget()
    scratch = replica.streamer._memory.numel()
    assert found.device["scratch"] == scratch
    assert found.device.get("slots", 0) == other.allocated
    stored = sum(b.size_bytes for b in replica.layout.blocks)
    assert found.device.get("weights", 0) == (stored if store == "device" else 0)
    assert found.host.get("weights", 0) == sum(
        b.numel() for b in getattr(replica.store, "buffers", ())
    )
    assert found.device["buffers"] == sum(b.nbytes for b in replica.model.buffers())
    replica.close()
    if store == "disk":
        monkeypatch.setattr(Mapped, "allocate", counting)
        again = replica_of(unit, tmp_path, store=store, slots=slots)
        # The first is what the base is read through, and is freed.
        assert sum(staged[1:]) == again.budget().host["staging"]
        again.close()


def test_slices_share_a_store():
    layout = find_layout(make_llama(hidden_size=512, intermediate_size=2048))
    whole = stored_bytes(layout, Slice())
    shares = [stored_bytes(layout, Slice(index, 4)) for index in range(4)]
    assert sum(shares) == whole
    assert max(shares) < whole / 4 + 4096 * len(layout.blocks)
    quarter, whole = ([s.changing(b) for b in layout.blocks] for s in (Slice(0, 4), Slice()))
    assert disk_bytes(quarter) < disk_bytes(whole) / 3


def test_a_host_that_computes_has_one_memory():
    layout = find_layout(make_llama())
    alone = budget(layout, "host", 3, Slice(), on_host=True, resident_bytes=10)
    apart = budget(layout, "host", 3, Slice(), on_host=False, resident_bytes=10)
    assert sum(alone.host.values()) == sum(apart.host.values()) + sum(apart.device.values())
    assert not alone.device


def test_a_sum_is_printed_with_its_terms():
    found = Budget({"slots": 3 * 2**30, "scratch": 2**29, "buffers": 0}, {"weights": 2**20}, {})
    assert str(found) == "device 3.5 GiB = slots 3.0 + scratch 0.5; host 1.0 MiB = weights 1.0"


def test_the_first_lines_of_a_run_show_it(overrides, tmp_path, capsys):
    settings = [*overrides, "memory.store=host", f"run.dir={tmp_path}", "run.steps=1"]
    Trainer(plain_config(settings)).train()
    assert " mesh 1 x 1 x 1; host " in capsys.readouterr().err
