"""Estimators: the rows of a step's loss table, and the projected gradients computed from it.

``spsa``, two-sided: rows (z_k, +1), (z_k, -1) for each k;   g_k = (l(+) - l(-)) / (2 eps)
``one-sided``:       row (theta), then (z_k, +1);            g_k = (l(+) - l(theta)) / eps

Both estimate z_k . grad; a rule of ``update`` turns them into a step. Pure functions.
Sources: Spall 1992 (SPSA); Malladi et al. 2023 (MeZO).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite

from zo.errors import UserError
from zo.method.passes import Probe
from zo.method.table import LossTable


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
    scalars: Callable[[LossTable, float], list[float]]
    """A filled table and eps -> projected gradients, one per direction."""


def _two_sided(table: LossTable, eps: float) -> list[float]:
    losses = table.row_losses()
    return [
        (plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)
    ]


def _one_sided(table: LossTable, eps: float) -> list[float]:
    clean, *losses = table.row_losses()
    return [(plus - clean) / eps for plus in losses]


ESTIMATORS = {
    "spsa": Estimator(lambda q: [(k, c) for k in range(q) for c in (1.0, -1.0)], _two_sided),
    "one-sided": Estimator(lambda q: [(0, 0.0), *((k, 1.0) for k in range(q))], _one_sided),
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
    """Return a function from the number of directions to the number of rows of a table."""
    return lambda directions: len(ESTIMATORS[name].scales(directions))


def probes(name: str, step: int, directions: int, eps: float) -> list[Probe]:
    """Return the probes of one step, one per row of its table."""
    numbers = directions_of(step, directions)
    return [Probe(numbers[k], float32(c * eps)) for k, c in ESTIMATORS[name].scales(directions)]


def estimate(name: str, table: LossTable, eps: float) -> tuple[tuple[float, ...], int]:
    """Return the projected gradients of a filled table, and the number that were not finite.

    They are float32 values; those that were not finite are zero.
    """
    raw = [float32(g) for g in ESTIMATORS[name].scalars(table, eps)]
    kept = tuple(g if isfinite(g) else 0.0 for g in raw)
    return kept, sum(not isfinite(g) for g in raw)
