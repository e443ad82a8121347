"""The policy of the block cache: which block goes to which slot, and when.

It holds numbers alone, no threads, memory or time.

Slots are as large as the largest blocks, one of each, and there are as many again for small blocks,
so that a norm between two matrices does not keep the second one waiting. Blocks are loaded ahead in
the order of the last pass, which is the order of the model's forward; a slot keeps its block until
it is needed for another, so that a block that is soon visited again (a tied embedding) is not read
twice.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from zo.streaming.budget import is_small, slot_capacities

HORIZON = 4
"""Visits to look ahead, for each slot."""

Visit = tuple[int, bool]
"""A block's number, and whether only rows of it are looked up: a tied embedding is visited for its
lookup and for its head.
"""
Load = tuple[int, int]
"""A block's number, and the number of the slot to load it into."""


class Ring:
    """Slots by number, the block in each, and the order of visits."""

    def __init__(self, sizes: Sequence[int], slots: int, is_busy: Callable[[int], bool]) -> None:
        """Start with empty slots.

        Args:
            sizes: bytes of each block.
            slots: how many slots for large blocks, at least two, and for small ones.
            is_busy: whether a transfer to or from a slot is under way. What a ring does depends on
                nothing else that is outside of it, so where it is constant, equal visits give equal
                loads.
        """
        self._sizes, self._count, self._is_busy = sizes, slots, is_busy
        self.capacities = slot_capacities(sizes, slots)
        """Bytes of each slot, the large ones first."""
        self._small = [is_small(size, sizes) for size in sizes]
        self._slots: dict[bool, list[int]] = {
            small: [s for s, size in enumerate(self.capacities) if is_small(size, sizes) == small]
            for small in (False, True)
        }
        """Numbers of the large and the small slots, of each the one that was used longest ago
        first.
        """
        self._held: list[int | None] = [None] * len(self.capacities)
        self._current: int | None = None
        self._every: list[Visit] = [(block, False) for block in range(len(sizes))]
        self._table, self._seen = self._every, list[Visit]()
        self._set_order(self._every)
        self._learns = False

    def _set_order(self, order: list[Visit]) -> None:
        self._order, self._next = order, 0
        self._places: dict[Visit, list[int]] = defaultdict(list)
        for place, visit in enumerate(order):
            self._places[visit].append(place)

    def begin(self, every: bool) -> list[Load]:
        """Start a pass over the model and return the loads to begin with.

        Args:
            every: visit each block once, in order; otherwise the visits of the last such pass are
                expected again.
        """
        self._table, self._seen = self._seen or self._table, []
        self._set_order(self._every if every else self._table)
        self._learns = not every
        return list(self._prefetch())

    def acquire(self, block: int, lookup: bool = False) -> tuple[int, list[Load]]:
        """Visit a block.

        Returns:
            Its slot, and the loads to begin; the block's own comes first, if it is in no slot.
        """
        visit = (block, lookup)
        if self._learns:
            self._seen.append(visit)
        # A visit that the last pass did not have (rows that no token named) leaves the order as it
        # is.
        places = self._places.get(visit, [])
        if (at := bisect_left(places, self._next)) < len(places):
            self._next = places[at] + 1
        loads = []
        slot = self._slot_of(block)
        if slot is None:
            slot = self._free_slot(block)
            if slot is None:
                # One that is busy will be free; else what was loaded too early is in the way.
                soon = set(self._coming())
                slot = min(self._fitting(block), key=lambda s: self._held[s] in soon)
            self._held[slot] = block
            loads.append((block, slot))
        used = self._slots[self._small[block]]
        used.append(used.pop(used.index(slot)))
        self._current = slot
        return slot, [*loads, *self._prefetch()]

    def release(self) -> list[Load]:
        """End the visit and return the loads to begin."""
        self._current = None
        return list(self._prefetch())

    def forget(self, slot: int) -> None:
        """Note that a slot holds no block any more: its load failed or was dropped."""
        self._held[slot] = None

    def _slot_of(self, block: int) -> int | None:
        return next((s for s in self._slots[self._small[block]] if self._held[s] == block), None)

    def _coming(self) -> Iterator[int]:
        """Yield the next blocks that fit the slots beside the one in use, large and small."""
        room, seen = dict.fromkeys((True, False), self._count - 1), set[int]()
        horizon = HORIZON * self._count
        # After the last block of a pass the first ones of the next.
        ahead = self._order[self._next : self._next + horizon] + self._table[:horizon]
        for block, _ in ahead[:horizon]:
            if block not in seen and room[self._small[block]]:
                room[self._small[block]] -= 1
                seen.add(block)
                yield block

    def _fitting(self, block: int) -> list[int]:
        """Return slots for a block, without the one in use; the one used longest ago first."""
        slots = self._slots[self._small[block]]
        return [s for s in slots if s != self._current and self.capacities[s] >= self._sizes[block]]

    def _free_slot(self, block: int) -> int | None:
        """Return the smallest slot that holds nothing needed soon and is not busy."""
        soon = set(self._coming())
        ready = [
            s for s in self._fitting(block) if self._held[s] not in soon and not self._is_busy(s)
        ]
        return min(ready, key=lambda s: self.capacities[s], default=None)

    def _prefetch(self) -> Iterator[Load]:
        full = set[bool]()
        for block in self._coming():
            small = self._small[block]
            # Never a later one before an earlier one of its kind.
            if small in full or self._slot_of(block) is not None:
                continue
            slot = self._free_slot(block)
            if slot is None:
                full.add(small)
            else:
                self._held[slot] = block
                yield block, slot
