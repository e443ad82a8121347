"""The slots that blocks pass through: while one computes, the next ones are on their way in and the last one out.

The slots are as large as the largest blocks, one of each; a block takes the smallest that is free and holds it.
Blocks are called in the order of the last pass, which is the order of the model's forward; a slot keeps its block
until it is needed for another, so that a block that is soon visited again (a tied embedding) is not read twice.
"""

from math import inf
from typing import Protocol

from torch import Tensor

from zo.lanes import Lanes, Slot
from zo.layout import Block
from zo.store import DeviceStore, DiskStore, HostStore


class Place(Protocol):
    """Where a visit finds a block's weights."""

    resident: bool
    """Whether masters stay where they are between visits."""

    def begin(self) -> None:
        """A new pass over the model."""
        ...

    def arrive(self, block: Block) -> tuple[list[Tensor], int]:
        """The master's flat tensors, one a segment, and their version."""
        ...

    def depart(self, block: Block, version: int) -> None:
        """End the visit; the master stands at this version now."""
        ...


class Resident:
    """Store ``device``: every block is in its place."""

    resident = True

    def __init__(self, store: DeviceStore) -> None:
        """Of one store."""
        self._store = store

    def begin(self) -> None:
        """See :class:`Place`."""

    def arrive(self, block: Block) -> tuple[list[Tensor], int]:
        """See :class:`Place`."""
        return self._store.segments[block.index], self._store.versions[block.index]

    def depart(self, block: Block, version: int) -> None:
        """See :class:`Place`."""
        self._store.versions[block.index] = version


class Ring:
    """A ring of slots over a store whose blocks come and go."""

    resident = False

    def __init__(self, store: HostStore | DiskStore, lanes: Lanes, slots: int, lag: float) -> None:
        """Make the slots.

        Args:
            store: where blocks come from.
            lanes: what brings them.
            slots: how many, at least two.
            lag: entries that a stored block may lag behind; infinite never writes.
        """
        self._store, self._lanes = store, lanes
        self._lag = lag if store.writable else inf
        blocks = store.layout.blocks
        sizes = sorted((b.size_bytes for b in blocks), reverse=True)[:slots]
        self._slots = [lanes.slot(size) for size in sizes]
        self._order, self._seen, self._next = list(range(len(blocks))), list[int](), 0
        self._used: list[Slot] = list(self._slots)
        """Slots, the one that was used longest ago first."""
        self._current: Slot | None = None

    def begin(self) -> None:
        """A new pass over the model: expect the order of the last one."""
        if self._seen:
            self._order = self._seen
        self._seen, self._next = [], 0
        self._prefetch()

    def arrive(self, block: Block) -> tuple[list[Tensor], int]:
        """See :class:`Place`."""
        self._seen.append(block.index)
        if block.index in self._order[self._next :]:
            self._next = self._order.index(block.index, self._next) + 1
        slot = self._holding(block.index)
        if slot is None:
            slot = self._take(block, wait=True)
            assert slot is not None
            self._lanes.bring(block, slot)
        self._used.remove(slot)
        self._used.append(slot)
        self._current = slot
        self._prefetch()
        self._lanes.arrive(slot)
        if slot.leaving is not None:
            # It is still being written from; a replay must not change it before that is done.
            self._lanes.wait_for(slot.leaving.result)
            slot.leaving = None
        return block.carve(slot.image(block)), slot.version

    def depart(self, block: Block, version: int) -> None:
        """See :class:`Place`; writes the block back where it is due."""
        slot = self._current
        assert slot is not None and slot.block == block.index
        slot.version, pending = version, version - self._store.versions[block.index]
        self._lanes.computed(slot)
        # Each block on a step of its own: what is written is spread over the steps.
        if pending >= self._lag or (pending and self._lag != inf and (version + block.index) % self._lag == 0):
            self._lanes.take_back(block, slot, version)
        self._current = None
        self._prefetch()

    def _holding(self, block: int) -> Slot | None:
        return next((s for s in self._slots if s.block == block), None)

    def _take(self, block: Block, wait: bool) -> Slot | None:
        """The smallest slot for a block that may be emptied: it neither computes, nor comes, nor goes."""
        fitting = [s for s in self._used if s is not self._current and s.size_bytes >= block.size_bytes]
        soon = set(self._order[self._next : self._next + len(self._slots)])
        ready = [s for s in fitting if s.arriving is None and (s.leaving is None or s.leaving.done())]
        ready = [s for s in ready if wait or s.block not in soon]
        if not ready and wait:
            # Everything is on its way: what leaves will be free, else what was called too early is in the way.
            blocked = next((s for s in fitting if s.leaving is not None), fitting[0])
            if blocked.arriving is not None:
                self._lanes.wait_for(blocked.arriving.result)
                blocked.arriving = None
            if blocked.leaving is not None:
                self._lanes.wait_for(blocked.leaving.result)
            ready = [blocked]
        if not ready:
            return None
        slot = min(ready, key=lambda s: s.size_bytes)
        if slot.leaving is not None:
            slot.leaving.result()  # Raises what went wrong with it.
            slot.leaving = None
        slot.block = None
        return slot

    def _prefetch(self) -> None:
        """Call the next blocks into the slots that are free."""
        for index in self._order[self._next : self._next + len(self._slots) - 1]:
            if self._holding(index) is None:
                block = self._store.layout.blocks[index]
                slot = self._take(block, wait=False)
                if slot is None:
                    return
                self._lanes.bring(block, slot)

    def finish(self) -> None:
        """Wait for what is under way, and raise what went wrong with it."""
        for slot in self._slots:
            if slot.arriving is not None:
                slot.arriving.result()
                slot.arriving, slot.block = None, None
            if slot.leaving is not None:
                slot.leaving.result()
                slot.leaving = None
