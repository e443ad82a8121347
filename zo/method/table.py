"""The loss table of a step: rows are probes, columns are micro-batches, and a cell is one forward.

Which rank computes a cell follows from the sizes of the mesh's axes alone, and a row's loss is
summed in the order of the columns, so a step's result does not depend on the mesh.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING

from zo.method.passes import Probe

if TYPE_CHECKING:
    from torch import Tensor


def share(lines: int, axis: int, index: int) -> range:
    """Return the contiguous lines of a table that one index of an axis owns.

    Sizes differ by at most one.
    """
    return range(lines * index // axis, lines * (index + 1) // axis)


@lru_cache(maxsize=8)
def owners(rows: int, columns: int, perturb: int, data: int) -> tuple[int, ...]:
    """Return the rank that computes each cell, row by row.

    Where the axes divide the table, rank = perturb index * data size + data index. Otherwise its
    cells are dealt out in order, and no rank has more than one above another.
    """
    if rows % perturb == 0 and columns % data == 0:
        tall, wide = rows // perturb, columns // data
        return tuple(r // tall * data + c // wide for r in range(rows) for c in range(columns))
    ranks = perturb * data
    return tuple(rank for rank in range(ranks) for _ in share(rows * columns, ranks, rank))


@dataclass(frozen=True)
class LossTable:
    """Loss table of one step; every cell is filled."""

    probes: Sequence[Probe]
    """One per row."""
    columns: int
    """Number of micro-batches."""
    values: "Tensor | None" = None
    """float64 of shape ``[rows, columns, 3]`` once filled.

    A cell holds the sum of losses, the number of terms and the number of tokens.
    """

    @property
    def rows(self) -> int:
        """Number of probes."""
        return len(self.probes)

    def owners(self, perturb: int, data: int) -> tuple[int, ...]:
        """Return the rank of a mesh that computes each cell, row by row."""
        return owners(self.rows, self.columns, perturb, data)

    def cells(self, rank: int, perturb: int, data: int) -> list[tuple[int, int]]:
        """Return row and column of the cells that a rank of a mesh computes, row by row."""
        of_cells = self.owners(perturb, data)
        return [divmod(cell, self.columns) for cell, owner in enumerate(of_cells) if owner == rank]

    def fill(self, values: "Tensor") -> "LossTable":
        """Return the table with values, float64 of shape ``[rows * columns, 3]``, row by row."""
        return replace(self, values=values.view(self.rows, self.columns, -1))

    def row_losses(self) -> list[float]:
        """Return the mean loss of each row in float64; not-a-number where a row has no terms."""
        assert self.values is not None
        means = []
        for row in self.values.tolist():
            total = terms = 0.0
            for cell in row:
                total, terms = total + cell[0], terms + cell[1]
            means.append(total / terms if terms else nan)
        return means

    @property
    def tokens(self) -> int:
        """Number of tokens in the micro-batches, each counted once."""
        assert self.values is not None
        return int(self.values[0, :, 2].sum())
