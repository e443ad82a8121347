"""``CudaDevice`` against its protocol: what orders copies, and what locks pages.

The simulated device of the ordinary tests assumes this behaviour; a real GPU has to show it.
"""

import pytest
import torch

from zo.errors import UserError
from zo.io.host_memory import allocate
from zo.streaming.device import device_of

SIZE = 64 * 2**20
CYCLES = 400_000_000
"""Of the GPU's clock: a fifth of a second or more, which no host thread is late by."""


@pytest.fixture
def device():
    torch.cuda.set_device(0)
    return device_of(torch.device("cuda", 0))


@pytest.fixture
def locked(device):
    memory = allocate(SIZE, torch.device("cpu"))
    device.lock_pages(memory)
    yield memory.fill_(1)
    device.unlock_pages(memory)


def test_a_copy_runs_in_its_streams_order_and_the_host_does_not_wait(device, locked):
    """Else uploads would not run beside the compute, or a slot would change before its turn."""
    slot, upload = device.empty(SIZE).zero_(), device.stream()
    torch.cuda.synchronize()
    with device.use(upload):
        torch.cuda._sleep(CYCLES)
    device.copy(slot, locked, upload)
    copied = device.record(upload)
    assert not device.has_passed(copied)
    assert not slot.any().item()  # On the compute stream, which nothing holds back.
    device.synchronize(copied)
    assert device.has_passed(copied)
    assert bool((slot == 1).all())


def test_a_stream_that_waits_for_an_event_sees_what_came_before_it(device, locked):
    """Else a forward would compute with half of a block."""
    slot, upload, compute = device.empty(SIZE).zero_(), device.stream(), device.compute_stream()
    torch.cuda.synchronize()
    with device.use(upload):
        torch.cuda._sleep(CYCLES)
    begun = device.record(upload)
    device.copy(slot, locked, upload)
    copied = device.record(upload)
    device.wait(compute, copied)
    seen = slot.clone()
    assert not device.has_passed(copied)  # The host queued all of it without waiting.
    assert bool((seen == 1).all())
    assert device.elapsed_s(begun, copied) > 0


def test_a_write_back_that_waits_for_the_compute_stores_what_was_computed(device, locked):
    """Else a block would be stored under a version that its bytes do not have."""
    slot, back, compute = device.empty(SIZE).zero_(), device.stream(), device.compute_stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    slot.fill_(3)
    device.wait(back, device.record(compute))
    device.copy(locked, slot, back)
    device.synchronize(device.record(back))
    assert bool((locked == 3).all())


def test_pages_can_be_locked_again_after_they_were_unlocked(device):
    """A second run in one process may be given the same memory by the allocator."""
    memory = allocate(SIZE, torch.device("cpu"))
    for _ in range(3):
        device.lock_pages(memory)
        assert memory.is_pinned()
        device.unlock_pages(memory)
        assert not memory.is_pinned()


def test_pages_that_cannot_be_locked_are_one_line(device, locked):
    """The driver's own refusal, of memory that is locked already."""
    with pytest.raises(UserError, match=r"memory.pin=true cannot lock .*memory.pin=false"):
        device.lock_pages(locked)
    torch.zeros(1, device="cuda").item()  # The error does not stay behind for a later call.


def test_a_copy_from_unlocked_pages_has_the_bytes(device):
    """``memory.pin=false``: the driver copies through a buffer of its own."""
    memory = torch.arange(SIZE // 8, dtype=torch.int64).view(torch.uint8)
    slot, upload = device.empty(SIZE), device.stream()
    device.copy(slot, memory, upload)
    copied = device.record(upload)
    memory_before = memory.clone()
    device.synchronize(copied)
    assert torch.equal(slot.cpu(), memory_before)


@pytest.mark.gpus(2)
def test_a_worker_queues_on_its_own_gpu():
    """CUDA's current device is a thread's, and begins as the first GPU."""
    second = device_of(torch.device("cuda", 1))
    with second.worker("test") as worker:
        assert worker.submit(torch.cuda.current_device).result() == 1
