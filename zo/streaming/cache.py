"""The blocks that the compute works with: in place, or in slots that a store's blocks pass through.

A visit is ``acquire``, changes to the block in its slot, ``release``. ``SlotCache`` joins the
policy of ``ring`` with the mechanism of ``transfer``:

    disk --(read)--> host buffer --(upload, own slice)--> slot --(gather)--> whole block
    --(write-back)--> store
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Protocol

from torch import Tensor

from zo.config.schema import MemoryConfig
from zo.distributed.slices import Slices
from zo.io.engines import PAGE
from zo.io.host_memory import return_freed_memory
from zo.model.binding import Binding
from zo.model.layout import Block
from zo.observe.timeline import Timeline
from zo.state.replay import Replay
from zo.streaming.budget import STAGING_BUFFERS, slot_bytes, within_slot
from zo.streaming.device import Device
from zo.streaming.disk_store import DiskStore
from zo.streaming.ring import Load, Ring
from zo.streaming.stores import DeviceStore, HostStore
from zo.streaming.transfer import Ordered, Queue, Slot, Staging, Transfer


@dataclass(frozen=True)
class Traffic:
    """Movements since the cache was made."""

    read_bytes: int = 0
    """To slots, from the store."""
    written_bytes: int = 0
    """Back to the store."""
    gathered_bytes: int = 0
    """From ranks that keep other slices."""
    wait_s: float = 0.0
    """Time that the compute waited for a block."""


class BlockCache(Protocol):
    """The blocks that the compute works with."""

    is_resident: bool
    """Whether a block stays where it is between visits."""

    def begin(self, every: bool = False) -> None:
        """Start a pass over the model: a visit of ``every`` block in turn, or a table's."""
        ...

    def acquire(self, block: Block, lookup: bool = False) -> tuple[list[Tensor], int]:
        """Return a block's flat tensors, one a segment, and their version.

        Raises:
            UserError: the block cannot be read or written.
        """
        ...

    def release(self, block: Block, version: int) -> None:
        """End the visit; the block stands at this version now."""
        ...

    def drain(self) -> None:
        """Block until no transfer is under way, and raise what failed."""
        ...

    def bind_at_rest(self, binding: Binding) -> None:
        """Let the model hold the weights between passes, if they stay in place."""
        ...

    def traffic(self) -> Traffic:
        """Return the movements so far; on a GPU, call it when a step's results are on the host."""
        ...

    def close(self) -> None:
        """Drain and end the worker threads."""
        ...


class ResidentCache:
    """Store ``device``: every block is in its place."""

    is_resident = True

    def __init__(self, store: DeviceStore) -> None:
        """Use the tensors of a store."""
        self._store = store

    def begin(self, every: bool = False) -> None:
        """See :class:`BlockCache`."""

    def acquire(self, block: Block, lookup: bool = False) -> tuple[list[Tensor], int]:
        """See :class:`BlockCache`."""
        return self._store.segments[block.index], self._store.versions[block.index]

    def release(self, block: Block, version: int) -> None:
        """See :class:`BlockCache`."""
        self._store.versions[block.index] = version

    def drain(self) -> None:
        """See :class:`BlockCache`."""

    def bind_at_rest(self, binding: Binding) -> None:
        """See :class:`BlockCache`."""
        for group, segments in zip(binding.layout.groups, self._store.groups, strict=True):
            binding.bind(group, segments)

    def traffic(self) -> Traffic:
        """See :class:`BlockCache`."""
        return Traffic()

    def close(self) -> None:
        """See :class:`BlockCache`."""


class SlotCache:
    """Slots over a store whose blocks come and go.

    Ranks that share slices load the same blocks in the same order: which slot a block comes to
    depends on the visits alone there, never on how long something took.
    """

    is_resident = False

    def __init__(
        self,
        store: HostStore | DiskStore,
        replay: Replay,
        memory: MemoryConfig,
        device: Device,
        timeline: Timeline,
        slices: Slices | None = None,
    ) -> None:
        """Allocate the slots and start the threads.

        Args:
            store: where blocks come from.
            replay: brings slices up to date before they are gathered.
            memory: number of slots, entries to lag behind, and whether to lock pages.
            device: that computes.
            timeline: records the transfers.
            slices: the ranks that keep the rest of every block, if any do.
        """
        self._store, self._replay, self._device, self._slices = store, replay, device, slices
        self._timeline, self._lag = timeline, memory.lag if store.writable else inf
        self._blocks = store.layout.blocks
        sizes = [block.size_bytes for block in self._blocks]
        self._ring = Ring(
            sizes, memory.slots, lambda s: slices is None and self._slots[s].is_busy()
        )
        allocate = store.allocate if device.shares_host_memory else device.empty
        of = store.slice.of
        self._slots = [Slot(device, allocate(slot_bytes(c, of))) for c in self._ring.capacities]
        self._upload, self._write_back = Queue(device, "zo-read"), Queue(device, "zo-write")
        self._gather = Queue(device, "zo-gather") if slices else None
        self._staging: dict[str, Staging] = {}
        self._locked = list(store.buffers)
        if not device.shares_host_memory and not store.buffers:
            for way in ("in", "out"):
                buffers = [
                    store.allocate(slot_bytes(max(sizes), of)) for _ in range(STAGING_BUFFERS)
                ]
                self._staging[way], self._locked = Staging(buffers), self._locked + buffers
        self._locked = self._locked if memory.pin else []
        for buffer in self._locked:
            device.lock_pages(buffer)
        self._stored: dict[int, Ordered] = {}
        """The last write-back of each block, which its next load is ordered after."""
        self._current: int | None = None
        self._stalls: list[tuple[object, object]] = []
        self._read_bytes = self._written_bytes = 0
        self._wait_s = 0.0

    def begin(self, every: bool = False) -> None:
        """See :class:`BlockCache`."""
        return_freed_memory()
        self._load(self._ring.begin(every))

    def acquire(self, block: Block, lookup: bool = False) -> tuple[list[Tensor], int]:
        """See :class:`BlockCache`."""
        number, loads = self._ring.acquire(block.index, lookup)
        self._current = number
        self._load(loads)
        stream = self._device.compute_stream()
        begun = self._device.record(stream)
        try:
            with self._timeline.span("wait", "block"):
                image, version = self._slots[number].acquire(block, stream)
        except BaseException:
            self._ring.forget(number)
            raise
        self._stalls.append((begun, self._device.record(stream)))
        return block.carve(image), version

    def release(self, block: Block, version: int) -> None:
        """See :class:`BlockCache`; writes the block back where that is due."""
        assert self._current is not None
        slot, self._current = self._slots[self._current], None
        slot.release(version, self._device.compute_stream())
        if self._is_due(block, version):
            self._stored[block.index] = slot.write_back(
                partial(self._submit_write_back, block, version)
            )
        self._load(self._ring.release())

    def _is_due(self, block: Block, version: int) -> bool:
        stored = self._store.versions[block.index]
        if self._lag == inf or not self._replay.changes_anything(block, stored, version):
            return False
        # Each block on a step of its own: writes are spread over the steps.
        return version - stored >= self._lag or (version + block.index) % self._lag == 0

    def _load(self, loads: Sequence[Load]) -> None:
        for number, slot in loads:
            self._slots[slot].load(
                self._blocks[number], partial(self._submit_load, self._blocks[number])
            )

    def _submit_load(self, block: Block, memory: Tensor, after: Sequence[Ordered]) -> Transfer[int]:
        if (stored := self._stored.pop(block.index, None)) is not None:
            after = [*after, stored]
        filled = self._upload.submit(partial(self._fill, block, memory), after)
        if self._gather is None:
            return filled
        # The version of now: the queue may reach this job a step later on one rank than on another.
        exchange = partial(self._exchange, block, memory, filled, self._replay.log.version)
        return self._gather.submit(exchange, [filled])

    def _fill(self, block: Block, memory: Tensor) -> int:
        """Queue the copy of a block's slice to a slot, and return its version."""
        own, image = self._store.slice.within(block), self._store.memory(block)
        self._read_bytes += len(own)
        if self._device.shares_host_memory:
            with self._timeline.span("upload" if image is not None else "read", block.name):
                return self._store.fetch(block, memory)
        version = self._store.versions[block.index]
        staged = self._staging.get("in")
        if image is None and staged is not None:
            buffer = staged.take()
            with self._timeline.span("read", block.name, on_stream=False):
                version = self._store.fetch(block, buffer)
            image = within_slot(buffer, own)
        assert image is not None
        with self._timeline.span("upload", block.name):
            self._device.copy(within_slot(memory, own), image, self._upload.stream)
        if staged is not None:
            staged.used_by(self._upload.mark())
        return version

    def _exchange(self, block: Block, memory: Tensor, filled: Transfer[int], newest: int) -> int:
        """Bring the slice in a slot to version ``newest``, then gather the others beside it."""
        assert self._slices is not None
        own, stride = self._store.slice.within(block), self._store.slice.stride(block)
        version = filled.queued()
        with self._timeline.span("catch-up", block.name):
            version = self._replay.catch_up(
                block, within_slot(memory, own), own.start, version, newest
            )
        with self._timeline.span("gather", block.name):
            self._slices.gather(memory[PAGE : PAGE + self._store.slice.of * stride])
        return version

    def _submit_write_back(
        self, block: Block, version: int, memory: Tensor, after: Sequence[Ordered]
    ) -> Transfer[None]:
        return self._write_back.submit(partial(self._keep, block, version, memory), after)

    def _keep(self, block: Block, version: int, memory: Tensor) -> None:
        """Queue the copy of what a store keeps of a block out of a slot; to a disk, end it."""
        own, image = self._store.kept(block), self._store.memory(block)
        if self._device.shares_host_memory:
            with self._timeline.span("write-back", block.name):
                self._store.keep(block, memory, version)
        elif image is not None:
            with self._timeline.span("write-back", block.name):
                kept = within_slot(memory, own)
                self._device.copy(image[: len(own)], kept, self._write_back.stream)
            self._store.versions[block.index] = version
        else:
            staged = self._staging["out"]
            buffer = staged.take()
            with self._timeline.span("write-back", block.name):
                self._device.copy(
                    within_slot(buffer, own), within_slot(memory, own), self._write_back.stream
                )
            self._write_back.mark().done_on_host()
            self._store.keep(block, buffer, version)
        self._written_bytes += len(own)

    def drain(self) -> None:
        """See :class:`BlockCache`."""
        failed: list[Exception] = []
        stored, self._stored = list(self._stored.values()), {}
        for finish in (
            *(slot.drain for slot in self._slots),
            *(work.done_on_host for work in stored),
        ):
            try:
                finish()
            except Exception as error:
                failed.append(error)
        for number, slot in enumerate(self._slots):
            if slot.block is None:
                self._ring.forget(number)
        if failed:
            raise failed[0]

    def bind_at_rest(self, binding: Binding) -> None:
        """See :class:`BlockCache`."""

    def traffic(self) -> Traffic:
        """See :class:`BlockCache`."""
        passed = [(begun, ended) for begun, ended in self._stalls if self._device.has_passed(ended)]
        self._wait_s += sum(self._device.elapsed_s(begun, ended) for begun, ended in passed)
        self._stalls = []
        gathered = self._slices.gathered_bytes if self._slices else 0
        return Traffic(self._read_bytes, self._written_bytes, gathered, self._wait_s)

    def close(self) -> None:
        """See :class:`BlockCache`."""
        try:
            self.drain()
        finally:
            for queue in (self._upload, self._gather, self._write_back):
                if queue is not None:
                    queue.close()
            for buffer in self._locked:
                self._device.unlock_pages(buffer)
            self._locked = []
