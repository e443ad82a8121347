"""Run functions that call the model many times, as generation does, under the probes of a table.

The weights stay on the device. A probe of rank one is a correction in every forward, and the cells
of a fold are one call of the function, on the rows of all of them; any other probe is written to a
copy of the trained weights, one probe after the other. The stored weights are never perturbed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from zo.io.host_memory import allocate
from zo.method.passes import Probe
from zo.model.binding import Binding
from zo.model.form import Form
from zo.model.layout import Block
from zo.model.probing import Probing
from zo.state.replay import Replay
from zo.streaming.cache import BlockCache

T = TypeVar("T")


class Whole:
    """A model on the device, held at one probe, or at those of a fold, for many forwards."""

    def __init__(
        self,
        binding: Binding,
        replay: Replay,
        cache: BlockCache,
        probing: Probing | None,
        form: Form,
    ) -> None:
        """Allocate nothing yet.

        Args:
            binding: of the model.
            replay: brings blocks up to date and writes probes.
            cache: of a store that keeps all blocks on the device.
            probing: computes with probes that are not written, if there are any.
            form: of the probes.
        """
        assert cache.is_resident
        self._binding, self._replay, self._cache = binding, replay, cache
        self._probing, self._form = probing, form
        self._scratch: dict[int, list[Tensor]] = {}
        """Memory of a written probe, by block."""

    def run(
        self,
        probes: Sequence[Probe],
        rows: Sequence[int],
        folds: Sequence[Sequence[int]],
        part: int,
        compute: Callable[[Sequence[int]], Sequence[T]],
    ) -> list[T]:
        """Compute cells of a table.

        Args:
            probes: the table's rows.
            rows: for each cell its row.
            folds: numbers of the cells that are computed together, if the model allows it.
            part: position of the first block that probes reach, at all uses of its parameters.
            compute: calls the model once for some cells, whose rows follow one another, and returns
                their results.

        Returns:
            The results, in the order of the cells.
        """
        results: dict[int, T] = {}
        blocks = self._binding.layout.blocks
        stored = {block.index: self._catch_up(block) for block in blocks}
        try:
            if self._probing is not None:
                self._probing.part = part
                stacks = self._form.meet in ("layer", "module") and self._probing.splits_rows_only
                together = folds if stacks else [[cell] for cell in range(len(rows))]
                for fold in together:
                    some = tuple(probes[rows[cell]] for cell in fold)
                    with self._probing.computing(some), self._probing.keeping():
                        results |= zip(fold, compute(fold), strict=True)
            else:
                for row in dict.fromkeys(rows):
                    with self._written(probes[row], stored, part):
                        for cell in (cell for cell, of in enumerate(rows) if of == row):
                            results |= zip([cell], compute([cell]), strict=True)
        finally:
            for block in blocks:
                self._binding.bind(block, stored[block.index])
        return [results[cell] for cell in range(len(rows))]

    def _catch_up(self, block: Block) -> list[Tensor]:
        """Bring a block to the newest version, bind it and return its flat tensors."""
        weights, version = self._cache.acquire(block)
        version = self._replay.visit(block, weights, version)
        self._cache.release(block, version)
        self._binding.bind(block, weights)
        return weights

    @contextmanager
    def _written(self, probe: Probe, stored: dict[int, list[Tensor]], part: int) -> Iterator[None]:
        """Bind the blocks that a probe reaches to copies that hold it."""
        for block in self._binding.layout.blocks:
            weights, is_reached = stored[block.index], self._form.positions[block.index] >= part
            self._binding.bind(block, weights)
            if probe.scale == 0.0 or not is_reached or not block.trainable:
                continue
            copies = self._copies(block, weights)
            self._replay.visit(block, weights, self._replay.log.version, [probe], copies)
            self._binding.bind(block, [copy[0] for copy in copies])
        yield

    def _copies(self, block: Block, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return memory for one probe of a block, ``[1, numel]`` for each trainable segment."""
        if block.index not in self._scratch:
            device = weights[0].device
            self._scratch[block.index] = [
                allocate(segment.numel * segment.dtype.itemsize, device)
                .view(segment.dtype)
                .view(1, segment.numel)
                for segment in block.trainable
            ]
        return self._scratch[block.index]
