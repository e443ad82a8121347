"""Transfers of blocks beside the compute, and the slots that they fill.

A queue is a worker thread with a stream, and a transfer is one of its jobs. A job queues copies and
returns at once; a transfer holds both the job's future and the event after its copies, and nothing
else in the project does. ``Slot`` is memory for one block. Its accesses, by transfers and by the
compute, can only be made in an order in which each waits for those before it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from zo.io.engines import PAGE
from zo.model.layout import Block
from zo.streaming.device import Device, Event, Stream

T = TypeVar("T")


class Ordered(Protocol):
    """Work of the device that other work can be ordered after."""

    def wait_on(self, stream: Stream) -> object:
        """Hold back what is queued on a stream from now on until this work is done."""
        ...

    def done_on_host(self) -> object:
        """Block until this work is done."""
        ...

    def is_done(self) -> bool:
        """Return whether this work is done."""
        ...


class Mark:
    """All work that a stream had when the mark was made."""

    def __init__(self, device: Device, stream: Stream) -> None:
        """Mark the end of what is queued on a stream."""
        self._device, self._event = device, device.record(stream)

    def wait_on(self, stream: Stream) -> None:
        """See :class:`Ordered`."""
        self._device.wait(stream, self._event)

    def done_on_host(self) -> None:
        """See :class:`Ordered`."""
        self._device.synchronize(self._event)

    def is_done(self) -> bool:
        """See :class:`Ordered`."""
        return self._device.has_passed(self._event)


class Transfer(Generic[T]):
    """A job of a queue, from its submission to the end of the copies that it queues."""

    def __init__(self, device: Device, future: "Future[tuple[T, Event]]") -> None:
        """Wrap the future of the job's result and of the event after its copies."""
        self._device, self._future = device, future

    def queued(self) -> T:
        """Block until the job has run and return its result.

        Raises:
            Exception: what the job raised.
        """
        return self._future.result()[0]

    def wait_on(self, stream: Stream) -> T:
        """Let a stream wait for the copies, once they are queued, and return the job's result.

        Raises:
            Exception: what the job raised.
        """
        value, event = self._future.result()
        self._device.wait(stream, event)
        return value

    def done_on_host(self) -> T:
        """Block until the copies are done and return the job's result.

        Raises:
            Exception: what the job raised.
        """
        value, event = self._future.result()
        self._device.synchronize(event)
        return value

    def is_done(self) -> bool:
        """See :class:`Ordered`; a job that raised is done."""
        if not self._future.done():
            return False
        return self._future.exception() is not None or self._device.has_passed(
            self._future.result()[1]
        )


class _IfItSucceeds:
    """A prefetch that may fail: the block is read again when it is needed, which raises."""

    def __init__(self, transfer: Transfer[int]) -> None:
        self._transfer = transfer

    def wait_on(self, stream: Stream) -> None:
        if self._transfer._future.exception() is None:
            self._transfer.wait_on(stream)

    def done_on_host(self) -> None:
        if self._transfer._future.exception() is None:
            self._transfer.done_on_host()

    def is_done(self) -> bool:
        return self._transfer.is_done()


class Queue:
    """A worker thread and a stream, whose jobs run one after another."""

    def __init__(self, device: Device, name: str) -> None:
        """Start the thread."""
        self._device, self.stream = device, device.stream()
        self._worker = device.worker(name)

    def submit(self, job: Callable[[], T], after: Sequence[Ordered] = ()) -> Transfer[T]:
        """Run a job in the thread, its copies and kernels ordered after other work.

        Args:
            job: queues on the thread's compute stream, which is this queue's.
            after: work that must be done before what the job queues begins; where it failed, the
                job does not run.
        """
        return Transfer(self._device, self._worker.submit(self._run, job, tuple(after)))

    def _run(self, job: Callable[[], T], after: Sequence[Ordered]) -> tuple[T, Event]:
        for work in after:
            work.wait_on(self.stream)
        with self._device.use(self.stream):
            value = job()
        return value, self._device.record(self.stream)

    def mark(self) -> Mark:
        """Return a mark after all that the queue's stream has now."""
        return Mark(self._device, self.stream)

    def close(self) -> None:
        """Wait for the jobs and end the thread."""
        self._worker.shutdown()


class Slot:
    """Device memory for one block, after a page that a file's header takes.

    It is empty, or holds a block that is on its way in, at rest, or computed with. Loading it,
    computing with it and writing it back are methods, each ordered after what touched the memory
    before; there is no other way to it.
    """

    def __init__(self, device: Device, memory: Tensor) -> None:
        """Take ``memory``, uint8: a page and room for a block."""
        self._device, self._memory = device, memory
        self.block: int | None = None
        """Index of the block that is held or on its way in."""
        self._version = 0
        self._filling: Transfer[int] | None = None
        self._reading: Transfer[None] | None = None
        self._computed: Mark | None = None
        self._in_use = False

    def is_busy(self) -> bool:
        """Return whether a transfer to or from it is under way."""
        return any(t is not None and not t.is_done() for t in (self._filling, self._reading))

    def load(
        self, block: Block, fill: Callable[[Tensor, Sequence[Ordered]], Transfer[int]]
    ) -> None:
        """Begin to fill it with a block.

        Args:
            block: which block.
            fill: given the memory and the work to order after, submits the transfer, which returns
                the version.
        """
        assert not self._in_use
        before: list[Ordered] = [
            work for work in (self._reading, self._computed) if work is not None
        ]
        if self._filling is not None:
            before.append(_IfItSucceeds(self._filling))
        self.block, self._reading, self._computed = block.index, None, None
        self._filling = fill(self._memory, before)

    def acquire(self, block: Block, stream: Stream) -> tuple[Tensor, int]:
        """Let a stream compute with the block.

        Returns:
            The block's bytes, uint8 of shape ``[size_bytes]``, which the stream may change, and
            their version.

        Raises:
            UserError: the block cannot be read, or what was written back from here cannot be
                written.
        """
        assert self.block == block.index and not self._in_use
        if self._filling is not None:
            filling, self._filling, self.block = self._filling, None, None
            self._version = filling.wait_on(stream)
            self.block = block.index
        if self._reading is not None:
            # A replay must not change what is still being copied from.
            reading, self._reading = self._reading, None
            reading.wait_on(stream)
        self._in_use = True
        return self._memory[PAGE : PAGE + block.size_bytes], self._version

    def release(self, version: int, stream: Stream) -> None:
        """End the computing; the block stands at ``version`` now."""
        assert self._in_use
        self._in_use, self._version, self._computed = False, version, Mark(self._device, stream)

    def write_back(
        self, read: Callable[[Tensor, Sequence[Ordered]], Transfer[None]]
    ) -> Transfer[None]:
        """Begin to copy the block out of it; ``read`` submits the transfer, as in :meth:`load`."""
        assert self._computed is not None and not self._in_use and self._reading is None
        self._reading = read(self._memory, [self._computed])
        return self._reading

    def drain(self) -> None:
        """Block until nothing is under way and raise what failed; drop a block on its way in."""
        filling, reading, computed = self._filling, self._reading, self._computed
        self._filling, self._reading, self._computed = None, None, None
        if filling is not None:
            self.block = None
            filling.done_on_host()
        for work in (reading, computed):
            if work is not None:
                work.done_on_host()


class Staging:
    """Host buffers that blocks pass through between a disk and the device, used in turn."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        """Take two or more buffers, so that a read and a copy can overlap."""
        self._buffers = list(buffers)
        self._busy: list[Ordered | None] = [None] * len(buffers)
        self._turn = 0

    def take(self) -> Tensor:
        """Return the next buffer once no copy uses it."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if (copy := self._busy[self._turn]) is not None:
            copy.done_on_host()  # The worker waits here, not the thread that computes.
        return self._buffers[self._turn]

    def used_by(self, work: Ordered) -> None:
        """Note the copy that uses the buffer taken last."""
        self._busy[self._turn] = work
