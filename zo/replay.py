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
    """Applies a log to blocks, wherever their weights are."""

    def __init__(self, log: Log) -> None:
        """Replay ``log``; entries appended later are seen."""
        self.log, self.recipe = log, Recipe.of(log)

    def visit(
        self,
        block: Block,
        masters: Sequence[Tensor],
        version: int,
        offsets: Sequence[Offset] = (),
        out: Sequence[Tensor] = (),
        row_numbers: Tensor | None = None,
    ) -> int:
        """Bring one block to the newest version and write probes of it.

        Args:
            block: which block.
            masters: its weights, one flat tensor a segment; *modified in place* if they lag. Frozen ones stay.
            version: what they stand at.
            offsets: the probes.
            out: one tensor a trainable segment, of shape ``[>= len(offsets), segment.numel]``; *modified in place*.
            row_numbers: for a block of one matrix, the only rows of it that will be read of ``out``.

        Returns:
            The newest version, at which the weights stand now.
        """
        pending = self.log.entries[version:]
        changes = [self._change(entry) for entry in pending]
        for i, segment in enumerate(block.trainable):
            here = changes if segment.decays else [replace(c, decay=1.0) for c in changes]
            if here or offsets:
                seed, distribution = self.recipe.seed, self.recipe.distribution
                rows = None if row_numbers is None else Rows(row_numbers, segment.parts[0].shape[1])
                written = out[i] if offsets else None
                visit(masters[i], segment.start, seed, distribution, here, offsets, written, rows)
        return version + len(pending)

    def _change(self, entry: Entry) -> Change:
        return RULES[self.recipe.rule](entry, self.recipe.weight_decay)
