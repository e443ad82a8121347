"""How blocks come to slots and go back, beside the compute: a lane in, a lane out.

A lane is a thread that takes one job after another. On a GPU each has a stream of its own: its jobs queue copies
there, and the compute waits for their events, never the host for the device. From disk a block passes through host
memory first.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo.disk import PAGE, Engine
from zo.layout import Block
from zo.store import DiskStore, HostStore, allocate, lock_pages, slot_bytes
from zo.timeline import Timeline


@dataclass(eq=False)
class Slot:
    """Memory for one block, its file's header before it."""

    memory: Tensor
    block: int | None = None
    version: int = 0
    arriving: "Future[tuple[int, Any]] | None" = None
    leaving: "Future[Any] | None" = None
    free: Any = None
    """On a GPU, the event after which nothing computes with the slot, or copies from it."""

    @property
    def size_bytes(self) -> int:
        """The largest block that fits."""
        return self.memory.numel() - PAGE

    def image(self, block: Block) -> Tensor:
        """The block's bytes."""
        return self.memory[PAGE : PAGE + block.size_bytes]


class Lanes:
    """The lanes of a machine without a GPU: slots are host memory, and a copy is done when its job is."""

    def __init__(self, store: HostStore | DiskStore, engine: Engine | None, timeline: Timeline) -> None:
        """Start the threads."""
        self._store, self._engine, self._timeline = store, engine, timeline
        self._in, self._out = ThreadPoolExecutor(1, "zo-read"), ThreadPoolExecutor(1, "zo-write")
        self.read_bytes = self.written_bytes = 0
        """Bytes that slots were filled with, and that were written back, so far."""
        self.wait_s = 0.0
        """Seconds that the compute waited for a block, so far."""
        self._lane = "read" if isinstance(store, DiskStore) else "upload"

    def slot(self, block_bytes: int) -> Slot:
        """Memory for blocks up to this size."""
        size = slot_bytes(block_bytes)
        return Slot(self._engine.allocate(size) if self._engine else allocate(size, torch.device("cpu")))

    def bring(self, block: Block, slot: Slot) -> None:
        """Begin to fill a slot, from which nothing is written back any more."""
        slot.block = block.index
        slot.arriving = self._in.submit(self._bring, block, slot)

    def _bring(self, block: Block, slot: Slot) -> tuple[int, Any]:
        with self._timeline.span(self._lane, block.name, on_stream=False):
            version = self._store.fetch(block, slot.memory)
        self.read_bytes += block.size_bytes
        return version, None

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
        self.written_bytes += block.size_bytes

    def close(self) -> None:
        """Let what is under way end."""
        self._in.shutdown()
        self._out.shutdown()


class GpuLanes(Lanes):
    """The lanes of a GPU: slots are its memory; copies are queued on streams and waited for by events alone."""

    def __init__(
        self,
        store: HostStore | DiskStore,
        engine: Engine | None,
        timeline: Timeline,
        device: torch.device,
        pin: bool,
    ) -> None:
        """Make the streams and, for a disk, a page-locked buffer in the host for each way."""
        super().__init__(store, engine, timeline)
        self._device = device
        self._upload, self._download = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._staging: dict[str, Slot] = {}
        self._stored: dict[int, Any] = {}
        self._stalls: list[tuple[Any, Any]] = []
        largest = max(b.size_bytes for b in store.layout.blocks)
        if engine is not None:
            self._staging = {way: Slot(engine.allocate(slot_bytes(largest))) for way in ("in", "out")}
            for slot in self._staging.values() if pin else ():
                lock_pages(slot.memory)

    def slot(self, block_bytes: int) -> Slot:
        """See :class:`Lanes`."""
        return Slot(allocate(slot_bytes(block_bytes), self._device))

    def _bring(self, block: Block, slot: Slot) -> tuple[int, Any]:
        source, staged = slot.memory, self._staging.get("in")
        if staged is not None:
            if staged.free is not None:
                staged.free.synchronize()  # This thread waits, not the one that computes.
            with self._timeline.span("read", block.name, on_stream=False):
                version, source = self._store.fetch(block, staged.memory), staged.memory
        with torch.cuda.stream(self._upload):
            for event in (slot.free, self._stored.get(block.index)):
                if event is not None:
                    self._upload.wait_event(event)
            with self._timeline.span("upload", block.name):
                if staged is None:
                    version = self._store.fetch(block, slot.memory)
                else:
                    slot.image(block).copy_(source[PAGE : PAGE + block.size_bytes], non_blocking=True)
            filled = torch.cuda.Event()
            filled.record(self._upload)
            if staged is not None:
                staged.free = filled
        self.read_bytes += block.size_bytes
        return version, filled

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
        staged = self._staging.get("out")
        with torch.cuda.stream(self._download):
            self._download.wait_event(slot.free)
            with self._timeline.span("write-back", block.name):
                if staged is None:
                    self._store.keep(block, slot.memory, version)
                else:
                    staged.image(block).copy_(slot.image(block), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._download)
            slot.free = self._stored[block.index] = copied
        if staged is not None:
            copied.synchronize()  # This thread waits, not the one that computes.
            self._store.keep(block, staged.memory, version)
        self.written_bytes += block.size_bytes
        return copied
