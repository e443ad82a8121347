"""A step is a table of losses; an estimator says which rows it has and what they tell.

``spsa``, two-sided:      rows (z_k, +1), (z_k, -1) for each direction k;   g_k = (l(+) - l(-)) / (2 eps)
``one-sided``:            row (theta), then (z_k, +1);                      g_k = (l(+) - l(theta)) / eps

Both are estimates of z_k . grad; a rule of ``update`` makes steps of them. Pure functions.
Sources: Spall 1992 (SPSA); Malladi et al. 2023 (MeZO).
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan

from torch import Tensor

from zo.config import UserError
from zo.perturbation import Offset


def float32(value: float) -> float:
    """The nearest float32 number: scalars and coefficients are kept and applied in float32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return inf if value > 0 else -inf


@dataclass(frozen=True)
class Estimator:
    """One row of :data:`ESTIMATORS`."""

    scales: Callable[[int], list[tuple[int, float]]]
    """Number of directions q -> the table's rows as (which of the q directions, c) of the probe theta + c eps z."""
    scalars: Callable[[Sequence[float], float], list[float]]
    """Row losses and eps -> projected gradients, one a direction."""


ESTIMATORS = {
    "spsa": Estimator(
        scales=lambda q: [(k, c) for k in range(q) for c in (1.0, -1.0)],
        scalars=lambda losses, eps: [
            (plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)
        ],
    ),
    "one-sided": Estimator(
        scales=lambda q: [(0, 0.0), *((k, 1.0) for k in range(q))],
        scalars=lambda losses, eps: [(plus - losses[0]) / eps for plus in losses[1:]],
    ),
}
"""The estimators, by the name that ``estimator.name`` takes."""


def check_directions(steps: int, directions: int) -> None:
    """Refuse a run whose last direction has a number beyond the generator's 32-bit counter.

    Raises:
        UserError: ``steps * directions`` is 2**32 or more; a wrapped number would repeat an earlier direction.
    """
    if steps * directions >= 1 << 32:
        raise UserError(
            f"run.steps={steps} x estimator.directions={directions} is {steps * directions} directions, and a run has "
            f"fewer than 2**32; use at most run.steps={((1 << 32) - 1) // directions} or fewer directions"
        )


def directions_of(step: int, directions: int) -> tuple[int, ...]:
    """Return the numbers of the directions of step 1, 2, ...: never used twice in a run.

    Raises:
        UserError: a number would not fit 32 bits.
    """
    check_directions(step, directions)
    return tuple(range((step - 1) * directions, step * directions))


def probes(name: str, step: int, directions: int, eps: float) -> list[Offset]:
    """The rows of one step's table, as points around the parameters."""
    numbers = directions_of(step, directions)
    return [Offset(numbers[k], float32(c * eps)) for k, c in ESTIMATORS[name].scales(directions)]


def row_losses(table: Tensor) -> list[float]:
    """Mean loss of each row, summed in the order of the columns so that any mesh gives the same bits.

    Args:
        table: float64 of shape ``[rows, columns, >= 2]``; the last dim begins with (sum of losses, number of terms).

    Returns:
        One float64 a row; not-a-number where a row has no terms.
    """
    means = []
    for row in table.tolist():
        total = terms = 0.0
        for cell in row:
            total, terms = total + cell[0], terms + cell[1]
        means.append(total / terms if terms else nan)
    return means


def estimate(name: str, losses: Sequence[float], eps: float) -> tuple[tuple[float, ...], int]:
    """Projected gradients of one step, float32, and how many directions were not finite and count as zero."""
    raw = [float32(g) for g in ESTIMATORS[name].scalars(losses, eps)]
    kept = tuple(g if isfinite(g) else 0.0 for g in raw)
    return kept, sum(not isfinite(g) for g in raw)
