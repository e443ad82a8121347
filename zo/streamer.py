"""Lends blocks to the cells that wait for them: the visit.

At a visit the master catches up with the log, and the weights of at most ``SLOTS`` probes at a time are written
beside it into scratch memory that all blocks share; the cells of those probes run; the next probes follow. The master
is never perturbed. With store ``device`` every block is already in its place, so a visit moves nothing else.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from zo.layout import Block
from zo.perturbation import Offset
from zo.replay import Replay
from zo.store import allocate

SLOTS = 2
"""Probes whose weights are in scratch memory at once: the two signs of a direction share its z."""


class Streamer:
    """The lender of a store's blocks (see :class:`zo.lockstep.Lender`)."""

    def __init__(self, replay: Replay, device: torch.device) -> None:
        """Allocate scratch for ``SLOTS`` copies of the largest block."""
        self._replay, self._store = replay, replay.store
        layout = self._store.layout
        memory = allocate(SLOTS * layout.largest_block_bytes, device)
        self._scratch = [self._carve(memory, block) for block in layout.blocks]
        self._probes: list[Offset] = []
        self._rows: list[int] = []
        self.visited: set[int] = set()
        """Blocks entered since the streamer was made; a block that never is cannot be trained."""

    @staticmethod
    def _carve(memory: Tensor, block: Block) -> list[Tensor]:
        """The scratch memory as one tensor of shape ``[SLOTS, numel]`` for each segment of a block."""
        carved, start = [], 0
        for segment in block.segments:
            stop = start + SLOTS * segment.size_bytes
            carved.append(memory[start:stop].view(segment.dtype).view(SLOTS, segment.numel))
            start = stop
        return carved

    def begin(self, probes: Sequence[Offset], rows: Sequence[int]) -> None:
        """Set the probes of a table and, for each cell, the row it belongs to (non-decreasing)."""
        self._probes, self._rows = list(probes), list(rows)

    def lend(self, block: int, cells: Sequence[int], row_numbers: Sequence[Tensor | None]) -> Iterator[int]:
        """Yield the cells in order, each when the block's weights are its probe's."""
        here, scratch = self._store.layout.blocks[block], self._scratch[block]
        self.visited.add(block)
        read = self._rows_read(here, row_numbers)
        by_row = [(row, list(group)) for row, group in groupby(cells, key=self._rows.__getitem__)]
        try:
            for first in range(0, len(by_row), SLOTS):
                lent = by_row[first : first + SLOTS]
                self._replay.visit(here, [self._probes[row] for row, _ in lent], scratch, read)
                for slot, (_, group) in enumerate(lent):
                    self._store.bind(here, [segment[slot] for segment in scratch])
                    yield from group
        finally:
            self._store.bind(here, self._store.segments[block])

    def _rows_read(self, block: Block, row_numbers: Sequence[Tensor | None]) -> Tensor | None:
        """The rows that a lookup in a block of one embedding reads; ``None`` where it may read all.

        A large, tied embedding is visited twice a step, for the lookup and for the head: this saves most of the first.
        """
        known = [numbers.flatten() for numbers in row_numbers if numbers is not None]
        # On a GPU the unique numbers would have to be waited for.
        if len(block.parameters) > 1 or len(known) < len(row_numbers) or known[0].device.type != "cpu":
            return None
        read: Tensor = torch.cat(known).unique()  # type: ignore[no-untyped-call]
        return read
