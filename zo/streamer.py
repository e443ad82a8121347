"""Lends blocks to the cells that wait for them: the visit.

At a visit the master catches up with the log, and the weights of at most ``SLOTS`` probes at a time are written
beside it into scratch memory that all blocks share; the cells of those probes run; the next probes follow. The
master is never perturbed. Where it comes from and goes to is the place's concern: the device's own memory, or a
ring of slots.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from zo.binding import Binding
from zo.host_memory import allocate
from zo.layout import Block
from zo.mesh import Slices
from zo.perturbation import Offset
from zo.replay import Replay
from zo.ring import Place
from zo.timeline import Timeline

SLOTS = 2
"""Probes whose weights are in scratch memory at once: the two signs of a direction share its z."""


class Streamer:
    """The lender of a model's blocks (see :class:`zo.lockstep.Lender`)."""

    def __init__(
        self,
        binding: Binding,
        replay: Replay,
        place: Place,
        device: torch.device,
        timeline: Timeline,
        slices: Slices | None = None,
    ) -> None:
        """Allocate scratch: two copies of every block but the largest, which may have one at a time."""
        self._binding, self._replay, self._place, self._timeline = binding, replay, place, timeline
        self._blocks = binding.layout.blocks
        sizes = sorted({b.trainable_bytes for b in self._blocks}, reverse=True)
        self._memory = allocate(max(sizes[0], SLOTS * (sizes[1] if len(sizes) > 1 else sizes[0])), device)
        self._slices, self._lookup = slices, False
        self._probes: list[Offset] = []
        self._rows: list[int] = []
        self.visited: set[int] = set()
        """Blocks entered since the streamer was made; a block that never is cannot be trained."""

    def _scratch(self, block: Block, copies: int) -> list[Tensor]:
        """The scratch memory as one tensor of shape ``[copies, numel]`` for each trainable segment of a block."""
        carved, start = [], 0
        for segment in block.trainable:
            stop = start + copies * segment.numel * segment.dtype.itemsize
            carved.append(self._memory[start:stop].view(segment.dtype).view(copies, segment.numel))
            start = stop
        return carved

    def begin(self, probes: Sequence[Offset], rows: Sequence[int]) -> None:
        """Set the probes of a table and, for each cell, the row it belongs to (non-decreasing)."""
        self._probes, self._rows = list(probes), list(rows)
        self._place.begin()

    def next(self, block: int | None, lookup: bool) -> int | None:
        """See :class:`zo.lockstep.Lender`: ranks that share slices visit every block together."""
        self._lookup = lookup
        if self._slices is None:
            return block
        agreed = self._slices.earliest(None if block is None else 2 * block + (not lookup))
        self._lookup = agreed is not None and agreed % 2 == 0
        return None if agreed is None else agreed // 2

    def lend(self, block: int, cells: Sequence[int], row_numbers: Sequence[Tensor | None]) -> Iterator[int]:
        """Yield the cells in order, each when the block's weights are its probe's."""
        here = self._blocks[block]
        self.visited.add(block)
        by_row = [(self._probes[row], list(group)) for row, group in groupby(cells, key=self._rows.__getitem__)]
        masters, version = self._place.arrive(here, lookup=self._lookup)
        self._binding.bind(here, masters)
        try:
            # What is not perturbed is computed with the master itself.
            at_master = [group for probe, group in by_row if probe.scale == 0.0]
            perturbed = [(probe, group) for probe, group in by_row if probe.scale != 0.0]
            if at_master:
                version = self._visit(here, masters, version)
                yield from self._forwards(here, [cell for group in at_master for cell in group])
            if not cells:
                version = self._visit(here, masters, version)
            copies = min(SLOTS, self._memory.numel() // max(1, here.trainable_bytes)) if here.trainable else SLOTS
            scratch, read = self._scratch(here, copies), self._rows_read(here, row_numbers)
            for first in range(0, len(perturbed), copies):
                lent = perturbed[first : first + copies]
                version = self._visit(here, masters, version, [probe for probe, _ in lent], scratch, read)
                for slot, (_, group) in enumerate(lent):
                    self._binding.bind(here, [segment[slot] for segment in scratch])
                    yield from self._forwards(here, group)
        finally:
            if self._place.resident:
                self._binding.bind(here, masters)
            else:
                self._binding.release(here)
            self._place.depart(here, version)

    def _visit(
        self,
        block: Block,
        masters: Sequence[Tensor],
        version: int,
        probes: Sequence[Offset] = (),
        scratch: Sequence[Tensor] = (),
        read: Tensor | None = None,
    ) -> int:
        with self._timeline.span("replay+perturb", block.name):
            return self._replay.visit(block, masters, version, probes, scratch, read)

    def _forwards(self, block: Block, cells: Sequence[int]) -> Iterator[int]:
        for cell in cells:
            with self._timeline.span(f"forward {cell}", block.name):
                yield cell

    def masters(self) -> Iterator[tuple[Block, list[Tensor]]]:
        """Every block in turn, its flat tensors at the newest version; valid until the next one is asked for."""
        self._place.begin(every=True)
        for block in self._blocks:
            masters, version = self._place.arrive(block)
            try:
                version = self._visit(block, masters, version)
                yield block, masters
            finally:
                self._place.depart(block, version)

    def _rows_read(self, block: Block, row_numbers: Sequence[Tensor | None]) -> Tensor | None:
        """The rows that a lookup in a block of one embedding reads; ``None`` where it may read all.

        A large, tied embedding is visited twice a step, for the lookup and for the head: this saves most of the first.
        """
        known = [numbers.flatten() for numbers in row_numbers if numbers is not None]
        if not known:
            return None
        # On a GPU the unique numbers would have to be waited for.
        if len(block.parts) > 1 or len(known) < len(row_numbers) or known[0].device.type != "cpu":
            return None
        read: Tensor = torch.cat(known).unique()  # type: ignore[no-untyped-call]
        return read
