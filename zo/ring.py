"""The slots that blocks pass through: while one computes, the next ones are on their way in and the last one out.

Slots are as large as the largest blocks, one of each, and there are as many again for small blocks: a norm between two
matrices must not keep the second one waiting. Blocks are called in the order of the last pass, which is the order of
the model's forward; a slot keeps its block until it is needed for another, so that a block that is soon visited again
(a tied embedding) is not read twice.
"""

from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Protocol

from torch import Tensor

from zo.lanes import Lanes, Slot
from zo.layout import Block
from zo.replay import Replay
from zo.store import DeviceStore, DiskStore, HostStore

SMALL = 16
"""A block is small if the largest is more than so many times its size."""
HORIZON = 4
"""Visits that are looked ahead, for each slot."""

Visit = tuple[int, bool]
"""A block's number, and whether rows of it are looked up: a tied embedding's lookup and head are different visits."""


class Place(Protocol):
    """Where a visit finds a block's weights."""

    resident: bool
    """Whether masters stay where they are between visits."""

    def begin(self, every: bool = False) -> None:
        """A new pass over the model: of ``every`` block in turn, else of a table."""
        ...

    def arrive(self, block: Block, lookup: bool = False) -> tuple[list[Tensor], int]:
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

    def begin(self, every: bool = False) -> None:
        """See :class:`Place`."""

    def arrive(self, block: Block, lookup: bool = False) -> tuple[list[Tensor], int]:
        """See :class:`Place`."""
        return self._store.segments[block.index], self._store.versions[block.index]

    def depart(self, block: Block, version: int) -> None:
        """See :class:`Place`."""
        self._store.versions[block.index] = version


class Ring:
    """A ring of slots over a store whose blocks come and go.

    Ranks that share slices bring the same blocks in the same order: what a ring does then depends on the visits alone,
    never on how long something took.
    """

    resident = False

    def __init__(self, store: HostStore | DiskStore, lanes: Lanes, replay: Replay, slots: int, lag: float) -> None:
        """Make the slots.

        Args:
            store: where blocks come from.
            lanes: what brings them.
            replay: brings slices up to date before they are exchanged.
            slots: how many, at least two, and as many for small blocks.
            lag: entries that a stored block may lag behind; infinite never writes.
        """
        self._store, self._lanes, self._replay = store, lanes, replay
        self._sliced = store.slice.of > 1
        self._lag = lag if store.writable else inf
        self._blocks, self._count = store.layout.blocks, slots
        sizes = sorted((b.size_bytes for b in self._blocks), reverse=True)
        self._small_bytes = sizes[0] // SMALL
        large = [size for size in sizes if size > self._small_bytes][:slots]
        small = [size for size in sizes if size <= self._small_bytes][:slots]
        self._slots = {False: [lanes.slot(size) for size in large], True: [lanes.slot(size) for size in small]}
        """Large and small ones, of each the one that was used longest ago first."""
        self._every: list[Visit] = [(block.index, False) for block in self._blocks]
        self._table, self._seen = self._every, list[Visit]()
        self._order, self._next, self._learns = self._every, 0, False
        self._current: Slot | None = None

    def begin(self, every: bool = False) -> None:
        """See :class:`Place`; the order of a table is that of the last one."""
        self._table, self._seen = self._seen or self._table, []
        self._order, self._next, self._learns = (self._every if every else self._table), 0, not every
        self._prefetch()

    def arrive(self, block: Block, lookup: bool = False) -> tuple[list[Tensor], int]:
        """See :class:`Place`."""
        visit = (block.index, lookup)
        if self._learns:
            self._seen.append(visit)
        # A block that the last pass did not visit (rows that no token named) leaves the order as it is.
        if visit in self._order[self._next :]:
            self._next = self._order.index(visit, self._next) + 1
        slot = self._holding(block)
        if slot is None:
            slot = self._empty(block)
            self._bring(block, slot)
        used = self._slots[self._is_small(block)]
        used.append(used.pop(used.index(slot)))
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

    def _holding(self, block: Block) -> Slot | None:
        return next((s for s in self._slots[self._is_small(block)] if s.block == block.index), None)

    def _is_small(self, block: Block) -> bool:
        return block.size_bytes <= self._small_bytes

    def _coming(self) -> Iterator[Block]:
        """The next blocks that the slots have room for beside the one that computes, large and small."""
        room, called = dict.fromkeys((True, False), self._count - 1), set[int]()
        horizon = HORIZON * self._count
        # After the last block of a pass the first ones of the next.
        for index, _ in (self._order[self._next :][:horizon] + self._table[:horizon])[:horizon]:
            block = self._blocks[index]
            if index not in called and room[self._is_small(block)]:
                room[self._is_small(block)] -= 1
                called.add(index)
                yield block

    def _fitting(self, block: Block) -> list[Slot]:
        """Slots that may take a block, without the one that computes; the one that was used longest ago first."""
        of_kind = self._slots[self._is_small(block)]
        return [s for s in of_kind if s is not self._current and s.size_bytes >= block.size_bytes]

    def _free(self, block: Block) -> Slot | None:
        """The smallest slot that holds nothing that is soon needed, or on its way."""
        soon = {block.index for block in self._coming()}
        ready = (s for s in self._fitting(block) if s.block not in soon and (self._sliced or not _under_way(s)))
        return min(ready, key=lambda s: s.size_bytes, default=None)

    def _empty(self, block: Block) -> Slot:
        """A slot for a block that is needed now."""
        slot = self._free(block)
        if slot is None:
            # What leaves will be free, else what was called too early is in the way.
            fitting = self._fitting(block)
            slot = next((s for s in fitting if s.leaving is not None and not self._sliced), fitting[0])
        return slot

    def _bring(self, block: Block, slot: Slot) -> None:
        self._lanes.bring(block, slot, partial(self._replay.catch_up, block, newest=self._replay.log.version))

    def _prefetch(self) -> None:
        """Call the next blocks into the slots that are free."""
        full = set[bool]()
        for block in self._coming():
            small = self._is_small(block)
            # Never a later one before an earlier one of its kind.
            if small in full or self._holding(block) is not None:
                continue
            slot = self._free(block)
            if slot is None:
                full.add(small)
            else:
                self._bring(block, slot)

    def finish(self) -> None:
        """Wait for what is under way, and raise what went wrong with it."""
        for slot in (*self._slots[False], *self._slots[True]):
            if slot.arriving is not None:
                slot.arriving.result()
                slot.arriving, slot.block = None, None
            if slot.leaving is not None:
                slot.leaving.result()
                slot.leaving = None


def _under_way(slot: Slot) -> bool:
    return any(job is not None and not job.done() for job in (slot.arriving, slot.leaving))
