"""Serves each block to the forwards waiting for it: the visit.

At a visit the stored weights catch up with the log, and the weights of at most ``PROBES_AT_ONCE``
probes are written beside them into scratch memory that all blocks share; the forwards of those
probes run; the next probes follow. The stored weights are never perturbed.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from zo.distributed.slices import Slices
from zo.io.host_memory import allocate
from zo.method.perturbation import Probe
from zo.model.binding import Binding
from zo.model.layout import Block
from zo.observe.timeline import Timeline
from zo.state.replay import Replay
from zo.streaming.budget import PROBES_AT_ONCE, scratch_bytes
from zo.streaming.cache import BlockCache

UNPERTURBED = Probe(0, 0.0)
"""The probe at the parameters themselves."""


class Streamer:
    """The :class:`zo.model.lockstep.BlockProvider` of a model."""

    def __init__(
        self,
        binding: Binding,
        replay: Replay,
        cache: BlockCache,
        device: torch.device,
        timeline: Timeline,
        slices: Slices | None = None,
        corrects: bool = False,
        positions: Sequence[int] = (),
    ) -> None:
        """Allocate the scratch memory (see :func:`zo.streaming.budget.scratch_bytes`).

        Args:
            binding: of the model.
            replay: brings blocks up to date and writes probes.
            cache: holds the blocks.
            device: that computes.
            timeline: records the visits.
            slices: the ranks that keep the rest of every block, if any do.
            corrects: True if forwards make their probes of the stored weights, so that none are
                written here.
            positions: of the blocks in the order of the forward.
        """
        self._binding, self._replay, self._cache, self._timeline = binding, replay, cache, timeline
        self._blocks = binding.layout.blocks
        self._corrects, self._positions, self._part = corrects, positions, 0
        self._memory = allocate(0 if corrects else scratch_bytes(self._blocks), device)
        self._slices, self._lookup = slices, False
        self._probes: list[Probe] = []
        self._rows: list[int] = []
        self.visited: set[int] = set()
        """Blocks entered since the streamer was made; a block that never is cannot be trained."""

    def _scratch(self, block: Block, copies: int) -> list[Tensor]:
        """Return scratch memory, ``[copies, numel]`` for each trainable segment of a block."""
        carved, start = [], 0
        for segment in block.trainable:
            stop = start + copies * segment.numel * segment.dtype.itemsize
            carved.append(self._memory[start:stop].view(segment.dtype).view(copies, segment.numel))
            start = stop
        return carved

    def begin(self, probes: Sequence[Probe], rows: Sequence[int], part: int = 0) -> None:
        """Set the probes of a table, the row of each forward, and the position they reach from."""
        self._probes, self._rows, self._part = list(probes), list(rows), part
        self._cache.begin()

    def next(self, block: int | None, lookup: bool) -> int | None:
        """See :class:`zo.model.lockstep.BlockProvider`."""
        # Ranks that share slices visit every block together.
        self._lookup = lookup
        if self._slices is None:
            return block
        agreed = self._slices.earliest(None if block is None else 2 * block + (not lookup))
        self._lookup = agreed is not None and agreed % 2 == 0
        return None if agreed is None else agreed // 2

    def _row(self, forward: int) -> int:
        """Return a forward's row; -1 for one that computes what all probes have in common."""
        return self._rows[forward] if forward < len(self._rows) else -1

    def _probe(self, block: int, row: int) -> Probe:
        """Return the probe that the weights of a block are written for."""
        if row < 0 or self._corrects or not self._blocks[block].trainable:
            return UNPERTURBED
        is_reached = self._part == 0 or self._positions[block] >= self._part
        return self._probes[row] if is_reached else UNPERTURBED

    def serve(
        self, block: int, forwards: Sequence[int], row_numbers: Sequence[Tensor | None]
    ) -> Iterator[int]:
        """Yield the forwards row by row, each when the block's weights are its probe's."""
        here = self._blocks[block]
        self.visited.add(block)
        by_row = [
            (self._probe(block, row), list(group))
            for row, group in groupby(sorted(forwards, key=self._row), key=self._row)
        ]
        weights, version = self._cache.acquire(here, lookup=self._lookup)
        self._binding.bind(here, weights)
        try:
            # What is not perturbed is computed with the stored weights themselves.
            unperturbed = [group for probe, group in by_row if probe.scale == 0.0]
            perturbed = [(probe, group) for probe, group in by_row if probe.scale != 0.0]
            if unperturbed:
                version = self._visit(here, weights, version)
                yield from self._each([forward for group in unperturbed for forward in group], here)
            if not forwards:
                version = self._visit(here, weights, version)
            if perturbed:
                yield from self._written(here, weights, version, perturbed, row_numbers)
                version = self._replay.log.version
        finally:
            if self._cache.is_resident:
                self._binding.bind(here, weights)
            else:
                self._binding.release(here)
            self._cache.release(here, version)

    def _written(
        self,
        here: Block,
        weights: Sequence[Tensor],
        version: int,
        perturbed: Sequence[tuple[Probe, list[int]]],
        row_numbers: Sequence[Tensor | None],
    ) -> Iterator[int]:
        """Write probes to scratch memory and yield the forwards of each."""
        fits = self._memory.numel() // max(1, here.trainable_bytes)
        copies = min(PROBES_AT_ONCE, fits) if here.trainable else PROBES_AT_ONCE
        scratch, read = self._scratch(here, copies), self._rows_read(here, row_numbers)
        for first in range(0, len(perturbed), copies):
            together = perturbed[first : first + copies]
            probes = [probe for probe, _ in together]
            version = self._visit(here, weights, version, probes, scratch, read)
            for copy, (_, group) in enumerate(together):
                self._binding.bind(here, [segment[copy] for segment in scratch])
                yield from self._each(group, here)

    def _visit(
        self,
        block: Block,
        weights: Sequence[Tensor],
        version: int,
        probes: Sequence[Probe] = (),
        scratch: Sequence[Tensor] = (),
        read: Tensor | None = None,
    ) -> int:
        with self._timeline.span("replay+perturb", block.name):
            return self._replay.visit(block, weights, version, probes, scratch, read)

    def _each(self, forwards: Sequence[int], block: Block) -> Iterator[int]:
        for forward in forwards:
            with self._timeline.span(f"forward {forward}", block.name):
                yield forward

    def weights(self) -> Iterator[tuple[Block, list[Tensor]]]:
        """Yield every block and its flat tensors at the newest version, one block at a time."""
        self._cache.begin(every=True)
        for block in self._blocks:
            weights, version = self._cache.acquire(block)
            try:
                version = self._visit(block, weights, version)
                yield block, weights
            finally:
                self._cache.release(block, version)

    def _rows_read(self, block: Block, row_numbers: Sequence[Tensor | None]) -> Tensor | None:
        """Return the rows that a lookup in a block reads; ``None`` if it may read all.

        A large, tied embedding is visited twice a step, for the lookup and for the head: this saves
        most of the first.
        """
        known = [numbers.flatten() for numbers in row_numbers if numbers is not None]
        if not known:
            return None
        # On a GPU the unique numbers would have to be waited for.
        if len(block.parts) > 1 or len(known) < len(row_numbers) or known[0].device.type != "cpu":
            return None
        read: Tensor = torch.cat(known).unique()  # type: ignore[no-untyped-call]
        return read
