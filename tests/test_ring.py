"""The policy of the slots, without threads or memory, on a clock of numbers."""

import pytest

from zo.streaming.budget import slot_capacities
from zo.streaming.ring import Ring


class Clock:
    """A store that loads one block after another, and a compute that visits them."""

    def __init__(self, sizes, slots, load_s, compute_s):
        self.now = self.link_free = self.waited = 0.0
        self.load_s, self.compute_s, self.loads = load_s, compute_s, 0
        self.ready = {}
        self.ring = Ring(sizes, slots, lambda slot: self.ready.get(slot, 0.0) > self.now)

    def load(self, loads):
        for _, slot in loads:
            self.link_free = max(self.link_free, self.now) + self.load_s
            self.ready[slot] = self.link_free
            self.loads += 1

    def run(self, visits, every=False):
        self.load(self.ring.begin(every))
        for visit in visits:
            block, lookup = visit if isinstance(visit, tuple) else (visit, False)
            slot, loads = self.ring.acquire(block, lookup)
            self.load(loads)
            arrival = self.ready.get(slot, 0.0)
            self.waited += max(0.0, arrival - self.now)
            self.now = max(self.now, arrival) + self.compute_s
            self.load(self.ring.release())


def test_a_block_is_on_its_way_while_the_one_before_computes():
    """Else every load is waited for: a step takes load + compute, not the longer of the two."""
    clock = Clock([100] * 8, slots=3, load_s=1.0, compute_s=1.0)
    clock.run(range(8))
    assert clock.waited == 1.0
    clock.run(range(8))
    assert clock.loads <= 8 + 8 + 2  # And the first two of the next pass.
    assert clock.waited <= 2.0


def test_two_slots_are_enough_to_overlap():
    clock = Clock([100] * 8, slots=2, load_s=0.5, compute_s=1.0)
    for _ in range(3):
        clock.run(range(8))
    assert clock.waited == 0.5


def test_a_model_that_fits_is_loaded_once():
    clock = Clock([100] * 3, slots=3, load_s=1.0, compute_s=1.0)
    for _ in range(5):
        clock.run(range(3))
    assert clock.loads == 3


def test_a_small_block_does_not_take_a_large_one_s_slot():
    """A norm between two matrices has slots of its own."""
    sizes = [1000, 1, 1000, 1, 1000, 1]
    clock = Clock(sizes, slots=2, load_s=1.0, compute_s=1.0)
    assert clock.ring.capacities == [1000, 1000, 1, 1]
    for _ in range(2):
        clock.run(range(6))
    assert clock.waited <= 2.0


def test_a_tied_embedding_stays_for_its_second_visit():
    """The head is visited last and the lookup first: between two steps it is not read twice."""
    visits = [(0, True), 1, 2, 3, (0, False)]
    clock = Clock([100] * 4, slots=3, load_s=1.0, compute_s=1.0)
    clock.run(visits)
    before = clock.loads
    clock.run(visits)
    assert clock.loads - before <= 4


def test_equal_visits_give_equal_loads_whatever_takes_how_long():
    """Ranks that share slices load together: timing must not show."""
    found = []
    for _ in range(2):
        ring, log = Ring([100, 90, 80, 100, 5], 2, lambda slot: False), []
        for every in (False, True, False):
            log.append(ring.begin(every))
            for block in (0, 3, 1, 2, 4):
                log += [ring.acquire(block), ring.release()]
        found.append(log)
    assert found[0] == found[1]


def test_a_block_that_the_last_pass_did_not_visit_leaves_the_order_as_it_is():
    clock = Clock([100] * 6, slots=3, load_s=0.1, compute_s=1.0)
    clock.run([0, 1, 2, 3, 4, 5])
    waited = clock.waited
    clock.run([0, 1, 3, 4, 5])
    clock.run([0, 1, 2, 3, 4, 5])
    assert clock.waited - waited <= 0.2


def test_a_failed_load_is_loaded_again():
    ring = Ring([100] * 3, 2, lambda slot: False)
    ring.begin(False)
    slot, _ = ring.acquire(0)
    ring.forget(slot)
    ring.release()
    _, loads = ring.acquire(0)
    assert 0 in [block for block, _ in loads]


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_slots_fit_the_blocks_that_come_to_them(slots):
    sizes = [700, 300, 300, 20, 700, 10, 10, 650]
    ring = Ring(sizes, slots, lambda slot: False)
    assert ring.capacities == slot_capacities(sizes, slots)
    for every in (False, True):
        loads = ring.begin(every)
        for block in range(len(sizes)):
            slot, more = ring.acquire(block)
            loads = [*loads, *more, *ring.release()]
            assert ring.capacities[slot] >= sizes[block]
        assert all(ring.capacities[slot] >= sizes[block] for block, slot in loads)


def test_a_long_pass_costs_no_more_a_visit():
    """Generation visits every block once a token: 256 tokens of 100 layers are one pass."""
    calls = []
    ring = Ring([100] * 100, 3, lambda slot: calls.append(slot) is None and False)
    visits = list(range(100)) * 256
    for count in (2560, 25600):
        calls.clear()
        ring.begin(False)
        for block in visits[:count]:
            ring.acquire(block)
            ring.release()
        assert len(calls) < 40 * count
