"""The loss table of a step: rows are probes, columns are micro-batches, and a cell is one forward.

A step fills the cells that its cover names: every one, or each direction's own micro-batch alone.
A fold is a run of cells that go through one matrix product together, so that it is also what a mesh
deals out. Which rank computes a fold follows from the sizes of the mesh's axes alone, and losses
are summed in the order of the columns, so a step's result does not depend on the mesh.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING

from zo.errors import UserError
from zo.method.passes import Probe

if TYPE_CHECKING:
    from torch import Tensor

COVERS = ("full", "diagonal")
"""Names of the covers, as ``estimator.cover`` takes them."""
FOLDED = "rank-one"
"""The distribution whose probes can share a matrix product."""


def share(lines: int, axis: int, index: int) -> range:
    """Return the contiguous lines of a table that one index of an axis owns.

    Sizes differ by at most one.
    """
    return range(lines * index // axis, lines * (index + 1) // axis)


@lru_cache(maxsize=8)
def owners(rows: int, columns: int, perturb: int, data: int) -> tuple[int, ...]:
    """Return the rank that computes each place of a grid of folds, row by row.

    Where the axes divide the grid, rank = perturb index * data size + data index. Otherwise its
    places are dealt out in order, and no rank has more than one above another.
    """
    if rows % perturb == 0 and columns % data == 0:
        tall, wide = rows // perturb, columns // data
        return tuple(r // tall * data + c // wide for r in range(rows) for c in range(columns))
    ranks = perturb * data
    return tuple(rank for rank in range(ranks) for _ in share(rows * columns, ranks, rank))


@lru_cache(maxsize=8)
def every_cell(rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Return row and column of all cells, column by column."""
    return tuple((row, column) for column in range(columns) for row in range(rows))


@dataclass(frozen=True)
class Grid:
    """Folds of a loss table, as the axes of a mesh split them.

    A fold is part of a column, or several whole columns: ``rows x wide`` folds.
    """

    height: int
    """Cells of a column."""
    columns: int
    """Number of micro-batches."""
    fold: int = 1
    """Cells of a fold; one of :func:`folds_that_fit`."""
    cover: str = "full"

    @property
    def rows(self) -> int:
        """Folds of a column, which the perturb axis splits."""
        return max(1, self.height // self.fold)

    @property
    def wide(self) -> int:
        """Folds side by side, which the data axis splits."""
        return self.columns // max(1, self.fold // self.height)

    def owners(self, perturb: int, data: int) -> tuple[int, ...]:
        """Return the rank of a mesh that computes each fold, column by column."""
        by_row, wide = owners(self.rows, self.wide, perturb, data), self.wide
        return tuple(by_row[r * wide + c] for c in range(wide) for r in range(self.rows))

    def __str__(self) -> str:
        if self.cover == "full":
            cells = f"{counted(self.height, 'row')} (probes)"
        else:
            cells = f"{counted(self.height, 'probe')} a column"
        cells += f" x {counted(self.columns, 'column')} (micro-batches)"
        if self.fold == 1:
            return cells
        folds = counted(self.rows * self.wide, "fold")
        return f"{cells}, in {folds} of {self.fold} cells (batch.fold)"


def counted(count: int, name: str) -> str:
    """Return a number with its noun."""
    return f"{count} {name}{'s' * (count != 1)}"


def folds_that_fit(height: int, columns: int) -> list[int]:
    """Return the folds that cut a table of ``columns`` columns of ``height`` cells evenly."""
    parts = [fold for fold in range(1, height + 1) if height % fold == 0]
    return parts + [m * height for m in range(2, columns + 1) if columns % m == 0]


def resolve_fold(fold: int | None, distribution: str, height: int, columns: int) -> int:
    """Return the number of cells of a fold; ``None`` is the largest within one column that can be.

    Raises:
        UserError: the fold does not cut the table evenly, or is of probes that share no product.
    """
    if fold is None:
        return height if distribution == FOLDED else 1
    if fold not in (fits := folds_that_fit(height, columns)):
        cells = height * columns
        wrong = (
            f"is larger than the loss table of {counted(cells, 'cell')}"
            if fold > cells
            else f"does not cut {counted(columns, 'column')} of {counted(height, 'cell')} evenly"
        )
        raise UserError(f"batch.fold={fold} {wrong}; use {', '.join(map(str, fits))}")
    if fold > 1 and distribution != FOLDED:
        raise UserError(
            f"batch.fold={fold} needs probes that share a matrix product, and those of "
            f"estimator.distribution={distribution} cannot; use batch.fold=1, or "
            f"estimator.distribution={FOLDED}"
        )
    return fold


@lru_cache(maxsize=8)
def _cell_owners(grid: Grid, perturb: int, data: int) -> tuple[int, ...]:
    return tuple(rank for rank in grid.owners(perturb, data) for _ in range(grid.fold))


@dataclass(frozen=True)
class LossTable:
    """Loss table of one step; every cell of its cover is filled."""

    probes: Sequence[Probe]
    """One per row."""
    columns: int
    """Number of micro-batches."""
    cells: tuple[tuple[int, int], ...] = ()
    """Row and column of the cells to fill: column by column, the same number in each, and inside a
    column by row. Every cell by default."""
    fold: int = 1
    """Consecutive cells that are computed together; one of :func:`folds_that_fit`."""
    part: int = 0
    """Position of the first block that the probes reach."""
    values: "Tensor | None" = None
    """float64 of shape ``[len(cells), k]`` once filled.

    A cell holds the sum of losses, the number of terms, the number of tokens, and that with
    padding; where completions are rewarded, the loss of each of its prompts follows, and a number
    of each completion, which equal ones share.
    """

    def __post_init__(self) -> None:
        """Name every cell where none is named."""
        if not self.cells:
            object.__setattr__(self, "cells", every_cell(self.rows, self.columns))
        assert len(self.cells) == self.height * self.columns, (len(self.cells), self.columns)

    @property
    def rows(self) -> int:
        """Number of probes."""
        return len(self.probes)

    @property
    def height(self) -> int:
        """Number of cells of a column."""
        return len(self.cells) // self.columns

    @property
    def is_full(self) -> bool:
        """True if every probe sees every micro-batch."""
        return self.height == self.rows

    def owners(self, perturb: int, data: int) -> tuple[int, ...]:
        """Return the rank of a mesh that computes each cell, in the order of ``cells``."""
        return _cell_owners(Grid(self.height, self.columns, self.fold), perturb, data)

    def folds(self, rank: int, perturb: int, data: int) -> list[list[int]]:
        """Return the folds that a rank of a mesh computes, each as numbers of ``cells``."""
        of_cells, fold = self.owners(perturb, data), self.fold
        first_cells = range(0, len(of_cells), fold)
        return [list(range(at, at + fold)) for at in first_cells if of_cells[at] == rank]

    def fill(self, values: "Tensor") -> "LossTable":
        """Return the table with values, float64 of shape ``[len(cells), k]``, in cells' order."""
        assert len(values) == len(self.cells), (values.shape, len(self.cells))
        return replace(self, values=values)

    def cell_values(self) -> list[list[float]]:
        """Return the values of each cell, in the order of ``cells``."""
        assert self.values is not None
        found: list[list[float]] = self.values.tolist()
        return found

    def row_losses(self) -> list[float]:
        """Return the mean loss of each row in float64; not-a-number where a row has no terms."""
        totals, terms = [0.0] * self.rows, [0.0] * self.rows
        for (row, _), cell in zip(self.cells, self.cell_values(), strict=True):
            totals[row] += cell[0]
            terms[row] += cell[1]
        return [total / count if count else nan for total, count in zip(totals, terms, strict=True)]

    def column_terms(self) -> list[float]:
        """Return the number of terms of each micro-batch."""
        return [cell[1] for cell in self.cell_values()[:: self.height]]

    @property
    def loss(self) -> float:
        """Mean loss of the batch over its probes; not-a-number where there are no terms."""
        if self.is_full:
            losses = self.row_losses()
            return sum(losses) / len(losses)
        total, terms = sum(cell[0] for cell in self.cell_values()), sum(self.column_terms())
        return total / self.height / terms if terms else nan

    @property
    def tokens(self) -> int:
        """Number of tokens in the micro-batches, each counted once."""
        return int(sum(cell[2] for cell in self.cell_values()[:: self.height]))

    @property
    def padded_tokens(self) -> int:
        """Number of tokens in the micro-batches with their padding, each counted once."""
        return int(sum(cell[3] for cell in self.cell_values()[:: self.height]))
