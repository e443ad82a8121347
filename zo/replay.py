"""Bring a block from its version to a later one: the only code that writes parameters.

    theta_t = replay(theta_0, entries 1..t)

The entries are applied in one pass over the block's memory, and the probes of the visit that asked for it are
written in the same pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from zo.layout import Block
from zo.log import Entry, Log
from zo.perturbation import Change, Offset, Rows, visit
from zo.store import DeviceStore
from zo.update import RULES


@dataclass(frozen=True)
class Recipe:
    """What, beside the entries, decides a replay's bits; kept in the log's header."""

    seed: int
    distribution: str
    rule: str
    weight_decay: float

    @classmethod
    def of(cls, log: Log) -> "Recipe":
        """The recipe that a log was written with."""
        h = log.header
        return cls(h["seed"], h["distribution"], h["rule"], h["weight_decay"])


class Replay:
    """Applies a log to the blocks of a store."""

    def __init__(self, store: DeviceStore, log: Log) -> None:
        """Replay ``log`` on ``store``; entries appended later are seen."""
        self.store, self.log, self.recipe = store, log, Recipe.of(log)

    def visit(
        self,
        block: Block,
        offsets: Sequence[Offset] = (),
        out: Sequence[Tensor] = (),
        row_numbers: Tensor | None = None,
    ) -> None:
        """Bring one block to the newest version and write probes of it.

        Args:
            block: which block; its master weights are *modified in place* if they lag.
            offsets: the probes.
            out: one tensor a segment, of shape ``[len(offsets), segment.numel]``; *modified in place*.
            row_numbers: for a block of one matrix, the only rows of it that will be read of ``out``.
        """
        pending = self.log.entries[self.store.versions[block.index] :]
        changes = [self._change(entry) for entry in pending]
        for i, (segment, master) in enumerate(zip(block.segments, self.store.segments[block.index], strict=True)):
            here = changes if segment.decays else [replace(c, decay=1.0) for c in changes]
            if here or offsets:
                seed, distribution = self.recipe.seed, self.recipe.distribution
                rows = None if row_numbers is None else Rows(row_numbers, segment.parameters[0].spec.shape[1])
                written = out[i] if offsets else None
                visit(master, segment.start, seed, distribution, here, offsets, written, rows)
        self.store.versions[block.index] += len(pending)

    def catch_up(self) -> None:
        """Bring every block to the newest version."""
        for block in self.store.layout.blocks:
            self.visit(block)

    def _change(self, entry: Entry) -> Change:
        return RULES[self.recipe.rule](entry, self.recipe.weight_decay)
