"""How blocks come to slots and go back, beside the compute: a lane in, a lane out.

A lane is a thread that takes one job after another. On a GPU each has a stream of its own: its jobs queue copies
there, and the compute waits for their events, never the host for the device. From disk a block passes through host
memory first. Where a block is kept in slices, a third lane brings this rank's slice up to date and exchanges it for
the others'.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo.disk import PAGE, Engine
from zo.host_memory import allocate, lock_pages
from zo.layout import Block
from zo.mesh import Slices
from zo.store import DiskStore, HostStore, slot_bytes, within_slot
from zo.timeline import Timeline

CatchUp = Callable[[Tensor, int, int], int]
"""Replays a block's bytes, from a start, at a version: the version at which they stand then."""


@dataclass(eq=False)
class Slot:
    """Memory for one block, its file's header before it."""

    memory: Tensor
    size_bytes: int = 0
    """The largest block that it was made for."""
    block: int | None = None
    version: int = 0
    arriving: "Future[tuple[int, Any]] | None" = None
    leaving: "Future[Any] | None" = None
    free: Any = None
    """On a GPU, the event after which nothing computes with the slot, or copies from it."""

    def image(self, block: Block) -> Tensor:
        """The block's bytes."""
        return self.memory[PAGE : PAGE + block.size_bytes]


class Lanes:
    """The lanes of a machine without a GPU: slots are host memory, and a copy is done when its job is."""

    def __init__(
        self, store: HostStore | DiskStore, engine: Engine | None, timeline: Timeline, slices: Slices | None = None
    ) -> None:
        """Start the threads; ``slices`` are the ranks that keep the rest of every block, if any do."""
        self._store, self._engine, self._timeline, self._slices = store, engine, timeline, slices
        self._in, self._out = ThreadPoolExecutor(1, "zo-read"), ThreadPoolExecutor(1, "zo-write")
        self._between = ThreadPoolExecutor(1, "zo-gather") if slices else None
        self.read_bytes = self.written_bytes = 0
        """Bytes that slots were filled with from the store, and that were written back, so far."""
        self.wait_s = 0.0
        """Seconds that the compute waited for a block, so far."""
        self._lane = "read" if isinstance(store, DiskStore) else "upload"

    @property
    def gathered_bytes(self) -> int:
        """Bytes that came from other ranks, so far."""
        return self._slices.gathered_bytes if self._slices else 0

    def slot(self, block_bytes: int) -> Slot:
        """Memory for blocks up to this size."""
        size = slot_bytes(block_bytes, self._store.slice.of)
        memory = self._engine.allocate(size) if self._engine else allocate(size, torch.device("cpu"))
        return Slot(memory, block_bytes)

    def bring(self, block: Block, slot: Slot, catch_up: CatchUp) -> None:
        """Begin to fill a slot, once nothing is on its way to it or from it any more.

        Ranks that share slices must call this for the same blocks in the same order.
        """
        came, went = slot.arriving, slot.leaving
        slot.block, slot.leaving = block.index, None
        slot.arriving = self._in.submit(self._fill, block, slot, came, went)
        if self._between is not None:
            slot.arriving = self._between.submit(self._exchange, slot.arriving, block, slot, catch_up)

    def _fill(
        self, block: Block, slot: Slot, came: "Future[Any] | None", went: "Future[Any] | None"
    ) -> tuple[int, Any]:
        if came is not None:
            came.exception()  # What went wrong with a read that nobody waited for shows when it is done again.
        if went is not None:
            went.result()
        filled = self._bring(block, slot)
        self.read_bytes += len(self._store.slice.within(block))
        return filled

    def _bring(self, block: Block, slot: Slot) -> tuple[int, Any]:
        with self._timeline.span(self._lane, block.name, on_stream=False):
            return self._store.fetch(block, slot.memory), None

    def _exchange(
        self, arriving: "Future[tuple[int, Any]]", block: Block, slot: Slot, catch_up: CatchUp
    ) -> tuple[int, Any]:
        version, _ = arriving.result()
        return self._gather(block, slot, version, catch_up), None

    def _gather(self, block: Block, slot: Slot, version: int, catch_up: CatchUp) -> int:
        """Bring the slice in a slot up to date, then the other slices beside it."""
        assert self._slices is not None
        own, stride = self._store.slice.within(block), self._store.slice.stride(block)
        with self._timeline.span("catch-up", block.name):
            version = catch_up(within_slot(slot.memory, own), own.start, version)
        with self._timeline.span("gather", block.name):
            self._slices.gather(slot.memory[PAGE : PAGE + self._store.slice.of * stride])
        return version

    def arrive(self, slot: Slot) -> None:
        """Let the compute begin only when the slot is filled.

        Raises:
            UserError: the block could not be read.
        """
        if slot.arriving is not None:
            self.wait_for(slot.arriving.result)
            slot.version, _ = slot.arriving.result()
            slot.arriving = None

    def wait_for(self, wait: Callable[[], Any]) -> None:
        """Wait on the host, and count it."""
        begun = time.perf_counter()
        with self._timeline.span("wait", "block", on_stream=False):
            wait()
        self.wait_s += time.perf_counter() - begun

    def settle(self) -> None:
        """Count what could not be counted at once."""

    def computed(self, slot: Slot) -> None:
        """Nothing that is begun from now on computes with the slot."""

    def take_back(self, block: Block, slot: Slot, version: int) -> None:
        """Begin to write a slot's block back."""
        slot.leaving = self._out.submit(self._take_back, block, slot, version)

    def _take_back(self, block: Block, slot: Slot, version: int) -> Any:
        with self._timeline.span("write-back", block.name, on_stream=False):
            self._store.keep(block, slot.memory, version)
        self.written_bytes += len(self._store.slice.within(block))

    def close(self) -> None:
        """Let what is under way end."""
        for lane in (self._in, self._between, self._out):
            if lane is not None:
                lane.shutdown()


class GpuLanes(Lanes):
    """The lanes of a GPU: slots are its memory; copies are queued on streams and waited for by events alone."""

    def __init__(
        self,
        store: HostStore | DiskStore,
        engine: Engine | None,
        timeline: Timeline,
        device: torch.device,
        pin: bool,
        slices: Slices | None = None,
    ) -> None:
        """Make the streams and, for a disk, a page-locked buffer in the host for each way."""
        super().__init__(store, engine, timeline, slices)
        self._device = device
        self._upload, self._download, self._link = (torch.cuda.Stream(device) for _ in range(3))
        self._staging: dict[str, Slot] = {}
        self._stored: dict[int, Any] = {}
        self._stalls: list[tuple[Any, Any]] = []
        largest = max(b.size_bytes for b in store.layout.blocks)
        if engine is not None:
            size = slot_bytes(largest, store.slice.of)
            self._staging = {way: Slot(engine.allocate(size)) for way in ("in", "out")}
            for slot in self._staging.values() if pin else ():
                lock_pages(slot.memory)

    def slot(self, block_bytes: int) -> Slot:
        """See :class:`Lanes`."""
        return Slot(allocate(slot_bytes(block_bytes, self._store.slice.of), self._device), block_bytes)

    def _bring(self, block: Block, slot: Slot) -> tuple[int, Any]:
        own, staged = self._store.slice.within(block), self._staging.get("in")
        if staged is not None:
            if staged.free is not None:
                staged.free.synchronize()  # This thread waits, not the one that computes.
            with self._timeline.span("read", block.name, on_stream=False):
                version = self._store.fetch(block, staged.memory)
        with torch.cuda.stream(self._upload):
            for event in (slot.free, self._stored.get(block.index)):
                if event is not None:
                    self._upload.wait_event(event)
            with self._timeline.span("upload", block.name):
                if staged is None:
                    version = self._store.fetch(block, slot.memory)
                else:
                    within_slot(slot.memory, own).copy_(within_slot(staged.memory, own), non_blocking=True)
            filled = torch.cuda.Event()
            filled.record(self._upload)
            if staged is not None:
                staged.free = filled
        return version, filled

    def _exchange(
        self, arriving: "Future[tuple[int, Any]]", block: Block, slot: Slot, catch_up: CatchUp
    ) -> tuple[int, Any]:
        version, filled = arriving.result()
        with torch.cuda.stream(self._link):
            self._link.wait_event(filled)
            version = self._gather(block, slot, version, catch_up)
            whole = torch.cuda.Event()
            whole.record(self._link)
        slot.free = whole  # For the case that the block is never visited.
        return version, whole

    def arrive(self, slot: Slot) -> None:
        """See :class:`Lanes`: the compute's stream waits for the copy; the host only until it is queued."""
        stream = torch.cuda.current_stream(self._device)
        if slot.arriving is None:
            if slot.free is not None:
                stream.wait_event(slot.free)  # It may still be copied from.
            return
        slot.version, filled = slot.arriving.result()
        slot.arriving = None
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record(stream)
        with self._timeline.span("wait", "block"):
            stream.wait_event(filled)
        ended.record(stream)
        self._stalls.append((begun, ended))

    def settle(self) -> None:
        """See :class:`Lanes`: how long the compute's stream waited, once a step's results are on the host."""
        self.wait_s += sum(begun.elapsed_time(ended) for begun, ended in self._stalls if ended.query()) / 1e3
        self._stalls = []

    def computed(self, slot: Slot) -> None:
        """See :class:`Lanes`."""
        slot.free = torch.cuda.Event()
        slot.free.record(torch.cuda.current_stream(self._device))

    def _take_back(self, block: Block, slot: Slot, version: int) -> Any:
        own, staged = self._store.slice.within(block), self._staging.get("out")
        with torch.cuda.stream(self._download):
            self._download.wait_event(slot.free)
            with self._timeline.span("write-back", block.name):
                if staged is None:
                    self._store.keep(block, slot.memory, version)
                else:
                    within_slot(staged.memory, own).copy_(within_slot(slot.memory, own), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._download)
            slot.free = self._stored[block.index] = copied
        if staged is not None:
            copied.synchronize()  # This thread waits, not the one that computes.
            self._store.keep(block, staged.memory, version)
        self.written_bytes += len(own)
        return copied
