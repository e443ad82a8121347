"""Mesh shape (perturb x data x slice) and the cells that each rank owns. Pure arithmetic.

The perturb axis splits the rows of the loss table, the data axis its columns, so perturb x data is
the number of ranks. The slice axis divides the ranks of each node into groups; a group stores one
copy of the weights. Every rank contributes its own cells and receives all of them in the same
order, so no result depends on which rank computed a cell.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from zo.config.schema import MeshConfig
from zo.errors import UserError
from zo.method.table import owners


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes."""

    perturb: int
    data: int
    slice: int = 1

    def __str__(self) -> str:
        sizes = f"mesh.perturb={self.perturb} mesh.data={self.data}"
        return sizes + (f" mesh.slice={self.slice}" if self.slice > 1 else "")


def fit(
    config: MeshConfig, ranks: int, rows: int, columns: int, local_ranks: int | None = None
) -> Shape:
    """Return the configured mesh with its empty axes filled in (perturb first).

    Args:
        config: the sizes that are set.
        ranks: number of ranks of the run.
        rows: of the loss table.
        columns: of the loss table.
        local_ranks: number of ranks of a node; all of them by default.

    Raises:
        UserError: perturb x data is not the number of ranks, a rank would have neither a cell nor a
            slice of the weights, or the slices do not divide the ranks of a node.
    """
    local_ranks, slices = local_ranks or ranks, config.slice
    if local_ranks % slices:
        use = ", ".join(str(s) for s in range(1, local_ranks + 1) if local_ranks % s == 0)
        raise UserError(
            f"mesh.slice={slices} does not divide the {_lines(local_ranks, 'rank')} of a node, and "
            f"slices do not span nodes; use {use}"
        )
    pairs = [Shape(p, ranks // p, slices) for p in range(ranks, 0, -1) if ranks % p == 0]
    # A rank without a cell is useful only if it stores a slice.
    fits = [s for s in pairs if slices > 1 or (s.perturb <= rows and s.data <= columns)]
    wanted = [
        s for s in fits if config.perturb in (None, s.perturb) and config.data in (None, s.data)
    ]
    # Even splits first: where an axis does not divide its lines, some ranks wait.
    wanted.sort(key=lambda s: (rows % s.perturb != 0) + (columns % s.data != 0))
    if not wanted:
        given = [(axis, getattr(config, axis)) for axis in ("perturb", "data")]
        asked = (
            " ".join(f"mesh.{axis}={size}" for axis, size in given if size is not None)
            or "an empty mesh"
        )
        raise UserError(
            f"{asked} does not fit {_lines(ranks, 'rank')} and a table of {rows} rows (probes) x "
            f"{columns} columns (micro-batches); "
            + (
                f"use {' or '.join(map(str, fits))}"
                if fits
                else f"start at most {rows * columns} ranks, or make batch.micro smaller"
            )
        )
    return wanted[0]


@lru_cache(8)
def places(owners: tuple[int, ...], ranks: int) -> tuple[int, tuple[int, ...]]:
    """Return the index of each value in an all-gather of all ranks' values.

    Each rank sends its values in order, padded to the largest number that a rank has, and a flag.

    Args:
        owners: the rank of each value.
        ranks: number of ranks of the run.

    Returns:
        The largest number of values of a rank, and for each value
        ``rank * (largest + 1) + number among the rank's``. Takes ``len(owners) + ranks`` steps.
    """
    taken, numbers = [0] * ranks, []
    for rank in owners:
        numbers.append(taken[rank])
        taken[rank] += 1
    most = max(taken)
    return most, tuple(
        rank * (most + 1) + number for rank, number in zip(owners, numbers, strict=True)
    )


def idle_report(
    shape: Shape,
    rows_of: Callable[[int], int],
    directions: int,
    sequences: int,
    micro: int,
) -> str | None:
    """Return a warning about ranks with no or fewer cells, with settings that fill them.

    Args:
        shape: of the mesh.
        rows_of: returns the rows of the loss table for a number of directions.
        directions: per step.
        sequences: per step.
        micro: sequences of a micro-batch.

    Returns:
        ``None`` where every rank has the same number of cells.
    """
    ranks, rows, columns = shape.perturb * shape.data, rows_of(directions), sequences // micro
    cells = Counter(owners(rows, columns, shape.perturb, shape.data))
    counts = sorted({cells[rank] for rank in range(ranks)})
    if len(counts) == 1:
        return None
    if counts[0] == 0:
        idle = ranks - len(cells)
        found = f"{idle} of {ranks} ranks {'has' if idle == 1 else 'have'} no cell"
    else:
        found = f"ranks have {counts[0]} or {counts[-1]} cells each, and those with fewer wait"
    fills = _fills(ranks, rows_of, directions, sequences, micro)
    remedy = " or ".join(f"{setting} ({total} cells)" for setting, total in fills)
    return (
        f"{found}: the loss table has {_lines(rows, 'row')} (probes) x {_lines(columns, 'column')} "
        f"(micro-batches) for {ranks} ranks; {remedy} gives all ranks the same number (it changes "
        "the result, so use a new run.dir)"
    )


def _lines(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _fills(
    ranks: int, rows_of: Callable[[int], int], directions: int, sequences: int, micro: int
) -> Sequence[tuple[str, int]]:
    """Return nearby settings whose number of cells is a multiple of the number of ranks."""
    found, rows, columns = [], rows_of(directions), sequences // micro
    divisors = [m for m in range(1, sequences + 1) if sequences % m == 0]
    # The largest micro-batch that is not larger than now costs the least; else the next larger one.
    for m in sorted(divisors, key=lambda m: (m > micro, abs(m - micro))):
        if rows * (sequences // m) % ranks == 0:
            found.append((f"batch.micro={m}", rows * (sequences // m)))
            break
    for more in range(directions + 1, directions + ranks + 1):
        if rows_of(more) * columns % ranks == 0:
            found.append((f"estimator.directions={more}", rows_of(more) * columns))
            break
    return found
