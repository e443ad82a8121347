"""The device that computes: streams, events, copies, locked pages and worker threads.

A copy is queued on a stream and runs in that stream's order, at any time after the call. An event
marks a point of a stream; another stream, or the host, can wait for it. This is the only file that
names CUDA's streams and events. ``HostDevice`` is a machine without a GPU, where a copy is done
when the call returns.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from zo.errors import UserError
from zo.io.host_memory import allocate

Stream = Any
"""A queue of the device; opaque outside this file."""
Event = Any
"""A point of a stream; opaque outside this file."""


class Device(Protocol):
    """The operations that transfers need."""

    shares_host_memory: bool
    """Whether slots are host memory, which a store fills without a copy."""

    def empty(self, size_bytes: int) -> Tensor:
        """Return device memory, uint8 of shape ``[size_bytes]``, that no stream writes to."""
        ...

    def worker(self, name: str) -> Executor:
        """Return a thread that queues work on this device."""
        ...

    def stream(self) -> Stream:
        """Return a new stream, whose work runs beside that of others."""
        ...

    def compute_stream(self) -> Stream:
        """Return the stream that the calling thread computes on."""
        ...

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Let the calling thread compute on a stream inside the ``with`` statement."""
        ...

    def copy(self, destination: Tensor, source: Tensor, stream: Stream) -> None:
        """Queue a copy between two tensors of equal size, one of them in host memory."""
        ...

    def record(self, stream: Stream) -> Event:
        """Return an event at the end of what is queued on a stream now."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Hold back what is queued on a stream from now on until an event has passed."""
        ...

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until an event has passed."""
        ...

    def has_passed(self, event: Event) -> bool:
        """Return whether an event has passed."""
        ...

    def elapsed_s(self, start: Event, stop: Event) -> float:
        """Return the seconds between two events that have passed."""
        ...

    def lock_pages(self, memory: Tensor) -> None:
        """Lock host memory, for copies that do not pass through a buffer of the driver.

        Raises:
            UserError: the system does not allow it.
        """
        ...

    def unlock_pages(self, memory: Tensor) -> None:
        """Undo :meth:`lock_pages`, before the memory is freed."""
        ...


class HostDevice:
    """A machine without a GPU: slots are host memory, and a call returns when its work is done."""

    shares_host_memory = True

    def empty(self, size_bytes: int) -> Tensor:
        """See :class:`Device`."""
        return allocate(size_bytes, torch.device("cpu"))

    def worker(self, name: str) -> Executor:
        """See :class:`Device`."""
        return ThreadPoolExecutor(1, name)

    def stream(self) -> Stream:
        """See :class:`Device`."""
        return None

    def compute_stream(self) -> Stream:
        """See :class:`Device`."""
        return None

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """See :class:`Device`."""
        return nullcontext()

    def copy(self, destination: Tensor, source: Tensor, stream: Stream) -> None:
        """See :class:`Device`."""
        destination.copy_(source)

    def record(self, stream: Stream) -> Event:
        """Return the time, at which all that was queued is done."""
        return time.perf_counter()

    def wait(self, stream: Stream, event: Event) -> None:
        """See :class:`Device`."""

    def synchronize(self, event: Event) -> None:
        """See :class:`Device`."""

    def has_passed(self, event: Event) -> bool:
        """See :class:`Device`."""
        return True

    def elapsed_s(self, start: Event, stop: Event) -> float:
        """See :class:`Device`."""
        return float(stop - start)

    def lock_pages(self, memory: Tensor) -> None:
        """See :class:`Device`; there is no other device to copy to."""

    def unlock_pages(self, memory: Tensor) -> None:
        """See :class:`Device`."""


class CudaDevice:
    """One NVIDIA GPU."""

    shares_host_memory = False

    def __init__(self, device: torch.device) -> None:
        """Use the GPU ``device``, index included."""
        self._device = device

    def empty(self, size_bytes: int) -> Tensor:
        """See :class:`Device`."""
        # Zeroing would write on the compute stream, unordered with the first upload.
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def worker(self, name: str) -> Executor:
        """See :class:`Device`."""
        # A thread that sets no GPU would make a context of 300 MiB or more on the first one.
        return ThreadPoolExecutor(1, name, torch.cuda.set_device, (self._device,))

    def stream(self) -> Stream:
        """See :class:`Device`."""
        return torch.cuda.Stream(self._device)

    def compute_stream(self) -> Stream:
        """See :class:`Device`."""
        return torch.cuda.current_stream(self._device)

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """See :class:`Device`."""
        return torch.cuda.stream(stream)

    def copy(self, destination: Tensor, source: Tensor, stream: Stream) -> None:
        """See :class:`Device`; the host waits for it where the host's pages are not locked."""
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def record(self, stream: Stream) -> Event:
        """See :class:`Device`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """See :class:`Device`."""
        stream.wait_event(event)

    def synchronize(self, event: Event) -> None:
        """See :class:`Device`."""
        event.synchronize()

    def has_passed(self, event: Event) -> bool:
        """See :class:`Device`."""
        return bool(event.query())

    def elapsed_s(self, start: Event, stop: Event) -> float:
        """See :class:`Device`."""
        return float(start.elapsed_time(stop)) / 1e3

    def lock_pages(self, memory: Tensor) -> None:
        """See :class:`Device`."""
        # PyTorch's pinned allocator would round the size up to a power of two.
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(code):
            raise UserError(
                f"memory.pin=true cannot lock {memory.numel()} bytes of host memory (driver error "
                f"{int(code)}); raise the limit (ulimit -l unlimited; Docker: --ulimit memlock=-1 "
                "--shm-size), or set memory.pin=false"
            )

    def unlock_pages(self, memory: Tensor) -> None:
        """See :class:`Device`."""
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


DEVICES: dict[str, Callable[[torch.device], Device]] = {
    "cpu": lambda device: HostDevice(),
    "cuda": CudaDevice,
}
"""The kinds of devices, by PyTorch's name of their type."""


def device_of(device: torch.device) -> Device:
    """Return the device of a ``torch.device``."""
    return DEVICES[device.type](device)
