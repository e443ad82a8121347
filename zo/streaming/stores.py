"""Stores of the weights between visits: in the device's memory, the host's, or on disk.

A store owns the weights and the version of each block, the last log entry applied to it. Stores
differ in how a block is fetched and kept; nothing else of a run depends on which one it is.

    device   every block in its place            visits read and write it there
    host     every block's bytes in host memory  copied to a slot, and back
    disk     the base, read-only, and over it a file for each block that was written back

With ``mesh.slice`` a host or disk store holds one slice of every block, and the ranks of a node
hold one copy together.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zo.errors import UserError
from zo.io import hardware
from zo.io.host_memory import allocate, return_freed_memory, return_memory_at_once
from zo.model.fingerprint import Fingerprint
from zo.model.layout import WHOLE, Block, Layout, Placed, Slice, runs, spans, views
from zo.model.source import WeightSource
from zo.streaming.budget import stored_bytes, within_slot

ReadTrainable = Callable[[Placed, int, Tensor], None]
"""Fills a flat tensor on CPU with a parameter's elements from a number on."""


class Store(Protocol):
    """Store whose blocks are fetched to slots and kept from them."""

    layout: Layout
    slice: Slice
    """The part of every block that is stored here."""
    base: str
    """Fingerprint of the weights at version 0, once :class:`zo.streaming.replica.Replica` has it of
    all ranks.
    """
    found: Fingerprint
    """Digests of what this store holds of the weights at version 0."""
    versions: list[int]
    """For each block, the last entry applied to what is stored."""
    writable: bool
    buffers: Sequence[Tensor]
    """Host memory that the device copies blocks from and to, as long as the store is used."""

    def allocate(self, size_bytes: int) -> Tensor:
        """Return host memory for ``fetch`` and ``keep``, uint8 of shape ``[size_bytes]``."""
        ...

    def memory(self, block: Block) -> Tensor | None:
        """Return a block's slice in host memory, or ``None`` if it must be fetched first."""
        ...

    def kept(self, block: Block) -> range:
        """Return the bytes of a block that ``keep`` takes over: frozen ones are not touched."""
        ...

    def fetch(self, block: Block, slot: Tensor) -> int:
        """Copy a block's slice to its place in a slot, after a page, and return its version."""
        ...

    def keep(self, block: Block, slot: Tensor, version: int) -> None:
        """Take over the slice of a block from a slot, at a version.

        Raises:
            UserError: the disk refuses; what was stored before stays.
        """
        ...


class DeviceStore:
    """All blocks on one device, where the model computes with them."""

    slice = WHOLE
    is_durable = False

    def __init__(self, layout: Layout, base: WeightSource, device: torch.device) -> None:
        """Fill the memory, a group at a time."""
        self.layout = layout
        self.corrupt: list[str] = []
        self.versions = [0] * len(layout.blocks)
        whole, self.base, self.found = Layout(layout.groups, layout.groups), "", Fingerprint(layout)
        self.groups: list[list[Tensor]] = []
        """The flat tensors of each group of the layout."""
        for group in layout.groups:
            image = allocate(group.size_bytes, device)
            on_host = (
                image if device.type == "cpu" else torch.zeros(group.size_bytes, dtype=torch.uint8)
            )
            base.read(group, whole, on_host)
            if on_host is not image:
                image.copy_(on_host)
            self.groups.append(group.carve(image))
        base.clear_cache()
        self.segments = [self._within(block) for block in layout.blocks]
        """The same memory as the flat tensors of each block."""
        for block, segments in zip(layout.blocks, self.segments, strict=True):
            self.found.add_segments(block, segments)
        return_freed_memory()

    def reload(self, base: WeightSource) -> None:
        """Read the trainable groups once more: version 0."""
        whole = Layout(self.layout.groups, self.layout.groups)
        for group in self.layout.groups:
            if group.trainable:
                image = torch.zeros(group.size_bytes, dtype=torch.uint8)
                base.read(group, whole, image)
                for flat, read in zip(self.groups[group.index], group.carve(image), strict=True):
                    flat.copy_(read)
        base.clear_cache()
        self.versions = [0] * len(self.versions)

    def _within(self, block: Block) -> list[Tensor]:
        """Return the block's segments as parts of its group's."""
        found, group = [], self.layout.group_of[block.index]
        for segment in block.segments:
            for outer, flat in zip(group.segments, self.groups[group.index], strict=True):
                offset = segment.start - outer.start
                if outer.frozen == segment.frozen and 0 <= offset < outer.numel:
                    found.append(flat[offset : offset + segment.numel])
        return found

    def open(self, newest: int, run: str) -> None:
        """See :class:`Store`; all weights are at version 0, or a snapshot's."""

    def fill(self, read: ReadTrainable, version: int) -> Fingerprint:
        """Take over a snapshot's trainable weights, which stand at one version.

        Args:
            read: fills a flat tensor on CPU with a parameter's elements from a number on.
            version: theirs.

        Returns:
            Digests of the weights as they are now, as far as this store holds them.
        """
        found = Fingerprint(self.layout)
        for block, flat in zip(self.layout.blocks, self.segments, strict=True):
            for part, view in views(block, flat):
                if not part.parameter.spec.frozen:
                    values = torch.empty(part.numel, dtype=view.dtype)
                    read(part.parameter, part.start - part.parameter.start, values)
                    view.copy_(values.view(part.shape))
            found.add_segments(block, flat)
            self.versions[block.index] = version
        return found

    def peek(self, block: Block, start: int, image: Tensor) -> int:
        """Copy a block's stored bytes from ``start`` to host memory and return their version."""
        stored = dict(zip(block.segments, self.segments[block.index], strict=True))
        for segment, first, flat in runs(block, image, start):
            flat.copy_(stored[segment][first : first + flat.numel()])
        return self.versions[block.index]


class HostStore:
    """Every block's bytes in host memory, locked for the copies of a GPU."""

    writable = True
    is_durable = False

    def __init__(self, layout: Layout, base: WeightSource, slice: Slice = WHOLE) -> None:
        """Check that there is room, take it, fill it.

        Raises:
            UserError: too little host memory, or it cannot be locked.
        """
        return_memory_at_once()
        self.layout, self.slice = layout, slice
        self.versions = [0] * len(layout.blocks)
        needed, free = stored_bytes(layout, slice), hardware.available_host_bytes()
        if needed > free:
            raise UserError(
                f"memory.store=host needs {needed} bytes ({needed / 2**30:.2f} GiB) of host memory "
                f"and {free} ({free / 2**30:.2f} GiB) are free; use memory.store=disk, or a "
                "machine with more"
            )
        memory = allocate(needed, torch.device("cpu"))
        self.buffers = [memory]
        self.corrupt: list[str] = []
        self._images, start, self.base, self.found = [], 0, "", Fingerprint(layout)
        for block in layout.blocks:
            own = slice.within(block)
            self._images.append(memory[start : start + len(own)])
            start += len(own)
            base.read(block, layout, self._images[-1], own.start)
            self.found.add(block, self._images[-1], own.start)
            self.found.complete(base.read)
        base.clear_cache()
        return_freed_memory()

    def reload(self, base: WeightSource) -> None:
        """See :class:`DeviceStore`."""
        for block, image in zip(self.layout.blocks, self._images, strict=True):
            if self.versions[block.index]:
                base.read(block, self.layout, image, self.slice.within(block).start)
        base.clear_cache()
        self.versions = [0] * len(self.versions)

    def allocate(self, size_bytes: int) -> Tensor:
        """See :class:`Store`."""
        return allocate(size_bytes, torch.device("cpu"))

    def memory(self, block: Block) -> Tensor | None:
        """See :class:`Store`."""
        return self._images[block.index]

    def fetch(self, block: Block, slot: Tensor) -> int:
        """See :class:`Store`."""
        within_slot(slot, self.slice.within(block)).copy_(self._images[block.index])
        return self.versions[block.index]

    def kept(self, block: Block) -> range:
        """See :class:`Store`."""
        return self.slice.changing(block)

    def keep(self, block: Block, slot: Tensor, version: int) -> None:
        """See :class:`Store`."""
        kept = self.kept(block)
        self._images[block.index][: len(kept)].copy_(within_slot(slot, kept))
        self.versions[block.index] = version

    def open(self, newest: int, run: str) -> None:
        """See :class:`Store`; all weights are at version 0, or a snapshot's."""

    def fill(self, read: ReadTrainable, version: int) -> Fingerprint:
        """See :class:`DeviceStore`."""
        found = Fingerprint(self.layout)

        def read_image(block: Block, layout: Layout, image: Tensor, start: int) -> None:
            for part, first, flat in spans(block, image, start):
                if not part.parameter.spec.frozen:
                    read(part.parameter, part.start - part.parameter.start + first, flat)

        for block, kept in zip(self.layout.blocks, self._images, strict=True):
            own = self.slice.within(block)
            read_image(block, self.layout, kept, own.start)
            found.add(block, kept, own.start)
            found.complete(read_image)
            self.versions[block.index] = version
        found.take_over(self.found, frozen=True)
        return found

    def peek(self, block: Block, start: int, image: Tensor) -> int:
        """See :class:`DeviceStore`."""
        first = start - self.slice.within(block).start
        image.copy_(self._images[block.index][first : first + image.numel()])
        return self.versions[block.index]
