"""The ranks of a run as a mesh, perturb x data x slice: who computes which cell. Pure arithmetic.

The perturb axis splits the rows of the loss table, the data axis its columns, so perturb x data is the number of ranks.
The slice axis cuts the ranks of each node into groups that keep one copy of the weights together. Every rank
contributes the cells it owns and puts all of them in the same places, so nothing depends on who computed one.
"""

from dataclasses import dataclass

from zo.config import MeshConfig, UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes."""

    perturb: int
    data: int
    slice: int = 1

    def __str__(self) -> str:
        sizes = f"mesh.perturb={self.perturb} mesh.data={self.data}"
        return sizes + (f" mesh.slice={self.slice}" if self.slice > 1 else "")


def fit(config: MeshConfig, ranks: int, rows: int, columns: int, local_ranks: int | None = None) -> Shape:
    """The mesh that a configuration asks for, its empty axes filled in (perturb first).

    Args:
        config: sizes that are given.
        ranks: of the run.
        rows: of the loss table.
        columns: of the loss table.
        local_ranks: ranks of a node; all of them by default.

    Raises:
        UserError: perturb x data is not the number of ranks, there are more ranks than cells and no slices that a rank
            without one could serve, or slices do not divide a node.
    """
    local_ranks, slices = local_ranks or ranks, config.slice
    if local_ranks % slices:
        use = ", ".join(str(s) for s in range(1, local_ranks + 1) if local_ranks % s == 0)
        raise UserError(
            f"mesh.slice={slices} does not divide the {local_ranks} rank{'s' * (local_ranks > 1)} of a node, and "
            f"slices do not reach over nodes; use {use}"
        )
    pairs = [Shape(p, ranks // p, slices) for p in range(ranks, 0, -1) if ranks % p == 0]
    # A rank without a cell is of use only where it keeps a slice.
    fits = [s for s in pairs if slices > 1 or (s.perturb <= rows and s.data <= columns)]
    wanted = [s for s in fits if config.perturb in (None, s.perturb) and config.data in (None, s.data)]
    # Even splits first: an axis that does not divide its lines leaves ranks waiting.
    wanted.sort(key=lambda s: (rows % s.perturb != 0) + (columns % s.data != 0))
    if not wanted:
        given = [(axis, getattr(config, axis)) for axis in ("perturb", "data")]
        asked = " ".join(f"mesh.{axis}={size}" for axis, size in given if size is not None) or "an empty mesh"
        raise UserError(
            f"{asked} does not fit {ranks} rank{'s' * (ranks > 1)} and a table of {rows} rows (probes) x {columns} "
            f"columns (micro-batches); "
            + (
                f"use {' or '.join(map(str, fits))}"
                if fits
                else f"start at most {rows * columns} ranks, or make batch.micro smaller"
            )
        )
    return wanted[0]


def share(lines: int, axis: int, index: int) -> range:
    """The contiguous lines of a table that one index of an axis owns; sizes differ by at most one."""
    return range(lines * index // axis, lines * (index + 1) // axis)


def owners(shape: Shape, rows: int, columns: int) -> list[int]:
    """The rank that computes each cell of a table, row by row.

    Where the axes divide the table, rank = perturb index * data size + data index. Else its cells are dealt out in
    order: no rank has more than one above another.
    """
    if rows % shape.perturb == 0 and columns % shape.data == 0:
        tall, wide = rows // shape.perturb, columns // shape.data
        return [r // tall * shape.data + c // wide for r in range(rows) for c in range(columns)]
    ranks = shape.perturb * shape.data
    return [rank for rank in range(ranks) for _ in share(rows * columns, ranks, rank)]
