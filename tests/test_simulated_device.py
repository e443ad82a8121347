"""The pipeline of a GPU, on a device that delays every copy and finds every access that nothing
orders.
"""

import pytest
import torch
from plain import fingerprint, plain_config, run
from ranks import train
from simulated_device import RaceError, SimulatedDevice, install, simulated
from torch import nn

from zo import Trainer
from zo.streaming import cache as caches
from zo.streaming.transfer import Mark, Queue, Slot, Staging

pytestmark = pytest.mark.slow

BITS = ["model.dtype=bfloat16", "update.weight_decay=0.1", "run.steps=5", "mesh.check_every=2"]
BITS.append("data.dev_examples=4")
PLACES = [
    ["memory.store=host", "memory.unit=layer", "memory.slots=2", "memory.lag=1"],
    ["memory.store=host", "memory.unit=module", "memory.slots=4", "memory.lag=2"],
    ["memory.store=disk", "memory.unit=layer", "memory.slots=3", "memory.lag=2"],
    ["memory.store=disk", "memory.unit=module", "memory.slots=2", "memory.lag=1"],
    ["memory.store=host", "memory.unit=layer", "memory.slots=6", "memory.lag=1"],
]


@pytest.fixture
def expected(overrides):
    return fingerprint(*overrides, *BITS)


def test_a_copy_that_nothing_orders_is_a_race():
    device = SimulatedDevice(0)
    slot, stream = device.empty(4096), device.stream()
    device.copy(slot, torch.ones(4096, dtype=torch.uint8), stream)
    with pytest.raises(
        RaceError, match=r"read by stream 0 is not ordered after copy to by stream 1"
    ):
        device.access(slot, False, "read")


def test_a_copy_runs_late_and_an_event_forces_it():
    device = SimulatedDevice(1)
    device.random.random = lambda: 1.0  # Nothing runs unless it must.
    slot, stream = device.empty(4096), device.stream()
    device.copy(slot, torch.ones(4096, dtype=torch.uint8), stream)
    event = device.record(stream)
    assert not device.has_passed(event)
    assert int(slot[0]) == 0xAB
    device.wait(device.compute_stream(), event)
    device.access(slot, False, "read")
    assert bool((slot == 1).all())


@pytest.mark.parametrize("seed", range(50))
def test_a_run_has_the_bits_of_store_device(overrides, expected, tmp_path, seed):
    with simulated(seed) as made:
        found = run([*overrides, *BITS, *PLACES[seed % len(PLACES)]], tmp_path)
    assert found["fingerprint"] == expected
    assert max(device.counts["copies"] for device in made) > 20
    assert max(device.counts["delayed"] for device in made) > 20


def test_two_runs_in_one_process_and_an_export(overrides, expected, tmp_path):
    with simulated(7):
        for name, place in zip("ab", PLACES[1:3], strict=True):
            found = run([*overrides, *BITS, *place, "export.at_end=true"], tmp_path / name)
            assert found["fingerprint"] == expected
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_model_of_ones_own(tmp_path):
    def fingerprint(*place):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )
        settings = [
            "run.steps=6",
            "batch.sequences=4",
            "batch.micro=2",
            "update.lr=1e-2",
            "export.at_end=false",
        ]
        folder = tmp_path / str(len(place))
        trainer = Trainer(
            plain_config([*settings, *place, f"run.dir={folder}"]),
            model=net,
            objective=lambda net, batch: torch.stack(
                [(net(batch["x"]) - 1).square().sum(), torch.tensor(2.0)]
            ),
            batches=lambda step, column: {"x": torch.full((2, 8), step + column / 2)},
        )
        return trainer.train()["fingerprint"]

    plain = fingerprint()
    with simulated(3):
        assert fingerprint("memory.store=host", "memory.lag=1") == plain


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("store", ["host", "disk"])
def test_ranks_that_share_slices(overrides, expected, tmp_path, store, seed):
    place = [f"memory.store={store}", "memory.unit=module", "memory.lag=2", "mesh.slice=2"]
    found = train(
        [*overrides, *BITS, *place, f"run.dir={tmp_path}"], ranks=2, prelude=(install, seed)
    )
    assert found["fingerprint"] == expected


@pytest.mark.parametrize("seed", range(4))
def test_folds_and_parts(overrides, tmp_path, seed):
    """Probes are corrections: blocks are only read, and the top ones changed."""
    probes = ["estimator.distribution=rank-one", "estimator.cover=diagonal", "batch.micro=1"]
    probes += ["estimator.directions=null", "estimator.part=sampled", "memory.lag=1"]
    plain = run([*overrides, *BITS, *probes], tmp_path / "plain")["fingerprint"]
    with simulated(seed):
        found = run([*overrides, *BITS, *probes, *PLACES[seed % len(PLACES)]], tmp_path / "run")
    assert found["fingerprint"] == plain


def without(function, *names):
    """A function of a slot that first forgets what it should be ordered after."""

    def forgetful(self, *arguments):
        for name in names:
            setattr(self, name, None)
        return function(self, *arguments)

    return forgetful


def run_unordered(self, job, after):
    """A queue whose event is another stream's."""
    return job(), self._device.record(self._device.stream())


def drain_queued(self):
    for slot in self._slots:
        if slot._reading is not None:
            slot._reading.queued()


DEFECTS = {
    # A replay in a slot that is still copied from: torn bytes under a version.
    "write-back races replay": (Slot, "acquire", without(Slot.acquire, "_reading")),
    # An upload over a block that is still computed with.
    "upload races compute": (Slot, "load", without(Slot.load, "_computed")),
    # An upload over a block that is still copied out.
    "upload races write-back": (Slot, "load", without(Slot.load, "_reading", "_computed")),
    # The compute reads what has not come.
    "compute races upload": (Queue, "_run", run_unordered),
    # The host reads the store while the last blocks are on their way to it.
    "drain does not drain": (caches.SlotCache, "drain", drain_queued),
    # The next read into a buffer whose copy has not ended.
    "staging is taken too early": (Staging, "used_by", lambda self, work: None),
    # The write-back of a block that is still computed with.
    "marks mark nothing": (Mark, "wait_on", lambda self, stream: None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_simulation_finds_a_missing_order(overrides, expected, tmp_path, monkeypatch, defect):
    """Each order that a transfer keeps, taken away: some seed must tell."""
    owner, name, broken = DEFECTS[defect]
    monkeypatch.setattr(owner, name, broken)
    for seed in range(6):
        try:
            with simulated(seed):
                found = run([*overrides, *BITS, *PLACES[seed % len(PLACES)]], tmp_path / str(seed))
        except RaceError:
            return
        if found["fingerprint"] != expected:
            return
    pytest.fail("no seed found it")


def test_memory_that_is_zeroed_on_another_stream_is_found(overrides, tmp_path, monkeypatch):
    """A slot that the compute stream clears may be cleared after its first upload."""

    def zeroed(self, size_bytes):
        memory = empty(self, size_bytes)
        memory.zero_()
        return memory

    empty = SimulatedDevice.empty
    monkeypatch.setattr(SimulatedDevice, "empty", zeroed)
    with pytest.raises(RaceError), simulated(0):
        run([*overrides, *BITS, *PLACES[0]], tmp_path)


def test_pages_are_unlocked_when_a_run_ends(overrides, tmp_path):
    with simulated(0) as made:
        run([*overrides, *BITS, *PLACES[2]], tmp_path)
    assert not any(device.locked for device in made)
