"""Mesh shape (perturb x data x slice) and the cells that each rank owns. Pure arithmetic.

The perturb axis splits the rows of the loss table, the data axis its columns, so perturb x data is
the number of ranks; neither splits a fold, whose cells are computed together. The slice axis
divides the ranks of each node into groups; a group stores one copy of the weights. Every rank
contributes its own cells and receives all of them in the same order, so no result depends on which
rank computed a cell.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from zo.config.schema import MeshConfig
from zo.errors import UserError
from zo.method.table import Grid, counted, folds_that_fit


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes."""

    perturb: int
    data: int
    slice: int = 1

    def __str__(self) -> str:
        sizes = f"mesh.perturb={self.perturb} mesh.data={self.data}"
        return sizes + (f" mesh.slice={self.slice}" if self.slice > 1 else "")


def fit(config: MeshConfig, ranks: int, grid: Grid, local_ranks: int | None = None) -> Shape:
    """Return the configured mesh with its empty axes filled in (perturb first).

    Args:
        config: the sizes that are set.
        ranks: number of ranks of the run.
        grid: the folds of the loss table.
        local_ranks: number of ranks of a node; all of them by default.

    Raises:
        UserError: perturb x data is not the number of ranks, a rank would have neither a fold nor a
            slice of the weights, or the slices do not divide the ranks of a node.
    """
    local_ranks, slices = local_ranks or ranks, config.slice
    if local_ranks % slices:
        use = ", ".join(str(s) for s in range(1, local_ranks + 1) if local_ranks % s == 0)
        raise UserError(
            f"mesh.slice={slices} does not divide the {counted(local_ranks, 'rank')} of a node, "
            f"and slices do not span nodes; use {use}"
        )
    fits = _shapes(ranks, slices, grid)
    wanted = [s for s in fits if _is_asked(config, s)]
    # Even splits first: where an axis does not divide its lines, some ranks wait.
    wanted.sort(key=lambda s: (grid.rows % s.perturb != 0) + (grid.wide % s.data != 0))
    if not wanted:
        given = [(axis, getattr(config, axis)) for axis in ("perturb", "data")]
        asked = (
            " ".join(f"mesh.{axis}={size}" for axis, size in given if size is not None)
            or "an empty mesh"
        )
        remedies = list(map(str, fits))
        remedies += [f"batch.fold={f}" for f in _smaller_folds(config, ranks, grid)[:1]]
        most = grid.rows * grid.wide
        raise UserError(
            f"{asked} does not fit {counted(ranks, 'rank')} and a table of {grid}; "
            + (
                f"use {' or '.join(remedies)}"
                if remedies
                else f"start at most {most} ranks, or make batch.micro smaller"
            )
        )
    return wanted[0]


def _shapes(ranks: int, slices: int, grid: Grid) -> list[Shape]:
    """Return the meshes of a number of ranks on which no rank would be useless."""
    pairs = [Shape(p, ranks // p, slices) for p in range(ranks, 0, -1) if ranks % p == 0]
    # A rank without a fold is useful only if it stores a slice.
    return [s for s in pairs if slices > 1 or (s.perturb <= grid.rows and s.data <= grid.wide)]


def _is_asked(config: MeshConfig, shape: Shape) -> bool:
    return config.perturb in (None, shape.perturb) and config.data in (None, shape.data)


def _smaller_folds(config: MeshConfig, ranks: int, grid: Grid) -> list[int]:
    """Return the folds, largest first, that the asked mesh need not split as it would this one."""
    smaller = [f for f in folds_that_fit(grid.height, grid.columns)[::-1] if f < grid.fold]
    return [
        fold
        for fold in smaller
        if any(_is_asked(config, s) for s in _shapes(ranks, config.slice, replace(grid, fold=fold)))
    ]


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
    fold: int = 1,
    cover: str = "full",
) -> str | None:
    """Return a warning about ranks with no or fewer folds of cells, with settings that fill them.

    Args:
        shape: of the mesh.
        rows_of: returns the cells of a column for a number of directions.
        directions: of the step; with cover ``diagonal``, of a micro-batch (``estimator.probes``).
        sequences: per step.
        micro: sequences of a micro-batch.
        fold: cells of a fold.
        cover: ``full`` or ``diagonal``.

    Returns:
        ``None`` where every rank has the same number of cells.
    """
    ranks, grid = shape.perturb * shape.data, Grid(rows_of(directions), sequences // micro)
    grid = replace(grid, fold=fold, cover=cover)
    unit = "cell" if fold == 1 else "fold"
    folds = Counter(grid.owners(shape.perturb, shape.data))
    counts = sorted({folds[rank] for rank in range(ranks)})
    if len(counts) == 1:
        return None
    if counts[0] == 0:
        idle = ranks - len(folds)
        found = f"{idle} of {ranks} ranks {'has' if idle == 1 else 'have'} no {unit}"
    else:
        found = f"ranks have {counts[0]} or {counts[-1]} {unit}s each, and those with fewer wait"
    fills = _fills(ranks, rows_of, directions, sequences, micro, grid)
    remedy = " or ".join(
        f"{setting} ({total} {'cell' if cells == 1 else 'fold'}s)"
        for setting, total, cells in fills
    )
    return (
        f"{found}: the loss table has {grid} for {ranks} ranks; {remedy} gives all ranks the same "
        "number (it changes the result, so use a new run.dir)"
    )


def _fills(
    ranks: int,
    rows_of: Callable[[int], int],
    directions: int,
    sequences: int,
    micro: int,
    grid: Grid,
) -> list[tuple[str, int, int]]:
    """Return nearby settings, their number of folds, a multiple of that of ranks, and its size."""
    found: list[tuple[str, int, int]] = []

    def add(setting: str, height: int, columns: int, fold: int) -> bool:
        """Add a setting, if it cuts its table evenly and gives all ranks the same number."""
        total = height * columns // fold
        fills = fold in folds_that_fit(height, columns) and total % ranks == 0
        if fills:
            found.append((setting, total, fold))
        return fills

    height, columns, fold = grid.height, grid.columns, grid.fold
    smaller = [f for f in folds_that_fit(height, columns)[::-1] if f < fold]
    any(add(f"batch.fold={f}", height, columns, f) for f in smaller)
    divisors = [m for m in range(1, sequences + 1) if sequences % m == 0]
    # The largest micro-batch that is not larger than now costs the least; else the next larger one.
    nearest = sorted(divisors, key=lambda m: (m > micro, abs(m - micro)))
    any(add(f"batch.micro={m}", height, sequences // m, fold) for m in nearest)
    # More rows change the fold that is taken by default, so they are named where it is 1.
    if fold == 1 or not found:
        key = "directions" if grid.cover == "full" else "probes"
        prefix = "batch.fold=1 " if fold > 1 else ""
        more = range(directions + 1, directions + ranks + 1)
        any(add(f"{prefix}estimator.{key}={q}", rows_of(q), columns, 1) for q in more)
    return found
