"""Estimators: the rows of a step's loss table, and the projected gradients computed from it.

``spsa``, two-sided: rows (z_k, +1), (z_k, -1) for each k;   g_k = (l(+) - l(-)) / (2 eps)
``one-sided``:       row (theta), then (z_k, +1);            g_k = (l(+) - l(theta)) / eps
``population``:      row (z_k, +1);                          g_k = (l(+) - m_k) / eps

l is the mean loss of the batch where every probe sees it (cover ``full``), and m_k that of the
other rows. Where direction k sees one micro-batch alone (``diagonal``), l is the sum of that
micro-batch's losses over the mean number of terms of a micro-batch, so that the mean of g_k z_k
estimates the gradient of the same mean loss.

Both estimate z_k . grad; a rule of ``update`` turns them into a step. Pure functions.
Sources: Spall 1992 (SPSA); Malladi et al. 2023 (MeZO); Salimans et al. 2017 (populations, of
evolution strategies).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, nan, sqrt

from zo.errors import UserError
from zo.method.passes import Probe
from zo.method.shaping import Agreement, agreement, shape
from zo.method.table import Grid, LossTable

UNIT_ROUNDOFF = 2.0**-24
"""Of float32: the relative error of a loss that a model computes."""


def float32(value: float) -> float:
    """Return the nearest float32 number, infinite beyond the largest.

    Scalars and coefficients are kept and applied in float32.
    """
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return inf if value > 0 else -inf


@dataclass(frozen=True)
class Estimator:
    """One row of :data:`ESTIMATORS`."""

    scales: Callable[[int], list[tuple[int, float]]]
    """Number of directions q -> the rows, as (k < q, c) of the probe theta + c eps z_k."""
    pairs: Callable[[int], list[tuple[int, int]]]
    """Number of rows -> for each direction the two rows whose losses are subtracted."""
    scalars: Callable[[LossTable, float], list[float]]
    """A filled table and eps -> projected gradients, one per direction."""


def _neighbours(rows: int) -> list[tuple[int, int]]:
    return [(row, row + 1) for row in range(0, rows, 2)]


def _with_first(rows: int) -> list[tuple[int, int]]:
    return [(row, 0) for row in range(1, rows)]


def _with_next(rows: int) -> list[tuple[int, int]]:
    return [(row, (row + 1) % rows) for row in range(rows)]


def _over_others(table: LossTable, eps: float) -> list[float]:
    losses = table.row_losses()
    # The mean of all would share a part of each loss, and shorten the estimate by as much.
    total, others = sum(losses), len(losses) - 1
    return [(loss - (total - loss) / others) / eps for loss in losses]


def _differences(table: LossTable, pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return for each pair a difference of two losses, and the terms that each of them sums.

    In a full table they are mean losses of the batch, of one term so to speak; in a diagonal one,
    sums over the direction's own micro-batch.
    """
    if table.is_full:
        losses = table.row_losses()
        return [(losses[one] - losses[other], 1.0) for one, other in pairs]
    of_cells = dict(zip(table.cells, table.cell_values(), strict=True))
    width, found = len(pairs) // table.columns, []
    for k, (one, other) in enumerate(pairs):
        first, second = (of_cells[row, k // width] for row in (one, other))
        found.append((first[0] - second[0] if first[1] else 0.0, first[1]))
    return found


def _slopes(table: LossTable, pairs: list[tuple[int, int]], length: float) -> list[float]:
    """Return each pair's difference over its length, in mean losses of the batch."""
    mean_terms = 1.0 if table.is_full else sum(table.column_terms()) / table.columns
    found = _differences(table, pairs)
    return [difference / length / mean_terms if mean_terms else nan for difference, _ in found]


ESTIMATORS = {
    "spsa": Estimator(
        lambda q: [(k, c) for k in range(q) for c in (1.0, -1.0)],
        _neighbours,
        lambda table, eps: _slopes(table, _neighbours(table.rows), 2 * eps),
    ),
    "one-sided": Estimator(
        lambda q: [(0, 0.0), *((k, 1.0) for k in range(q))],
        _with_first,
        lambda table, eps: _slopes(table, _with_first(table.rows), eps),
    ),
    "population": Estimator(lambda q: [(k, 1.0) for k in range(q)], _with_next, _over_others),
}
"""The estimators, by the name that ``estimator.name`` takes."""


def check_directions(steps: int, directions: int) -> None:
    """Refuse a run whose last direction has a number beyond the generator's 32-bit counter.

    Raises:
        UserError: ``steps * directions`` is 2**32 or more; a number that wraps would repeat an
            earlier direction.
    """
    if steps * directions >= 1 << 32:
        raise UserError(
            f"run.steps={steps} x estimator.directions={directions} is {steps * directions} "
            "directions, and a run has fewer than 2**32; use at most "
            f"run.steps={((1 << 32) - 1) // directions} or fewer directions"
        )


def directions_of(step: int, directions: int) -> tuple[int, ...]:
    """Return the numbers of the directions of step 1, 2, ...; none is used twice in a run.

    Raises:
        UserError: a number would not fit 32 bits.
    """
    check_directions(step, directions)
    return tuple(range((step - 1) * directions, step * directions))


def rows_of(name: str) -> Callable[[int], int]:
    """Return a function from a number of directions to the number of rows that they have."""
    return lambda directions: len(ESTIMATORS[name].scales(directions))


def probes(name: str, step: int, directions: int, eps: float) -> list[Probe]:
    """Return the probes of one step, one per row of its table."""
    numbers = directions_of(step, directions)
    return [Probe(numbers[k], float32(c * eps)) for k, c in ESTIMATORS[name].scales(directions)]


@lru_cache(maxsize=8)
def diagonal_cells(name: str, directions: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Return row and column of the cells of a diagonal table, column by column.

    Direction k sees micro-batch ``k // (directions / columns)`` alone, and the unperturbed row all.
    """
    assert directions % columns == 0, (directions, columns)
    width = directions // columns
    rows: list[list[int]] = [[] for _ in range(columns)]
    for row, (k, scale) in enumerate(ESTIMATORS[name].scales(directions)):
        for column in range(columns) if scale == 0.0 else (k // width,):
            rows[column].append(row)
    return tuple((row, column) for column in range(columns) for row in rows[column])


def empty_table(name: str, step: int, directions: int, eps: float, grid: Grid) -> LossTable:
    """Return the table of a step, from 1, before its cells are filled.

    Args:
        name: of the estimator.
        step: from 1.
        directions: of the step; with a diagonal grid a multiple of its columns.
        eps: length of the step along a direction.
        grid: the sizes of the table.
    """
    diagonal, columns = grid.cover == "diagonal", grid.columns
    cells = diagonal_cells(name, directions, columns) if diagonal else ()
    return LossTable(probes(name, step, directions, eps), columns, cells, grid.fold)


def estimate(
    name: str, table: LossTable, eps: float, shaping: str = "none", per: str = "table"
) -> tuple[tuple[float, ...], int]:
    """Return the projected gradients of a filled table, and the number that were not finite.

    They are float32 values; those that were not finite are zero. A direction whose micro-batch has
    no terms has a projected gradient of zero.

    Args:
        name: of the estimator.
        table: filled.
        eps: length of the step along a direction.
        shaping: ``none``, or a shape of the losses, whose differences are not divided by ``eps``.
        per: see :func:`zo.method.shaping.shape`.
    """
    if shaping != "none":
        table, eps = shape(table, shaping, per), 1.0
    raw = [float32(g) for g in ESTIMATORS[name].scalars(table, eps)]
    kept = tuple(g if isfinite(g) else 0.0 for g in raw)
    return kept, sum(not isfinite(g) for g in raw)


def spread(
    name: str, table: LossTable, unit_roundoff: float = UNIT_ROUNDOFF
) -> tuple[float, float]:
    """Return how far the losses of a table's pairs are apart, and how far rounding puts them.

    A loss is a float32 mean over terms, each of which comes from logits of the model's dtype, whose
    roundings average out.

    Args:
        name: of the estimator.
        table: filled.
        unit_roundoff: of the model's dtype.

    Returns:
        Root mean square of the difference of a pair's mean losses, and the mean of the losses'
        magnitudes times their relative rounding; over the losses that are finite, not-a-number
        where none is.
    """
    found = _differences(table, ESTIMATORS[name].pairs(table.rows))
    apart = [difference / terms for difference, terms in found if terms and isfinite(difference)]
    rounded = [
        max(UNIT_ROUNDOFF, unit_roundoff / sqrt(cell[1])) * abs(cell[0] / cell[1])
        for cell in table.cell_values()
        if cell[1] and isfinite(cell[0] / cell[1])
    ]
    return (
        sqrt(sum(d * d for d in apart) / len(apart)) if apart else nan,
        sum(rounded) / len(rounded) if rounded else nan,
    )


def agreement_of(name: str, table: LossTable) -> Agreement | None:
    """Return how far the probes of an estimator's pairs agree.

    See :func:`zo.method.shaping.agreement`.
    """
    return agreement(table, ESTIMATORS[name].pairs(table.rows))
