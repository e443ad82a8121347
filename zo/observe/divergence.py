"""Detect by the losses of its steps that a run diverges."""

from collections import deque
from collections.abc import Iterable
from math import inf, isfinite
from statistics import fmean

WINDOW = 4
"""Steps whose mean loss is compared, the first with the last: the loss of one step is noise."""
MARGIN = 0.5
"""Least rise, in nats."""
NEAR_UNIFORM = 0.98
"""Of the loss of uniform predictions."""


def is_far(loss: float, start: float, uniform: float = inf) -> bool:
    """Return True if a loss is twice its start, or that of uniform predictions.

    By no less than ``MARGIN``.

    Args:
        loss: mean cross-entropy a term, in nats.
        start: the same at the start.
        uniform: loss of uniform predictions, such as ln(vocabulary).
    """
    return loss > max(min(2 * start, NEAR_UNIFORM * uniform), start + MARGIN)


class Divergence:
    """Compares the mean loss of the last steps with that of the first steps."""

    def __init__(self, losses: Iterable[float] = (), uniform: float = inf) -> None:
        """Begin with the losses of earlier steps.

        Args:
            losses: mean cross-entropy a term of each step so far, in nats; those between the first
                ``WINDOW`` and the last may be left out.
            uniform: see :func:`is_far`.
        """
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._uniform = uniform
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> bool:
        """Add a step's loss; return True if the run diverges.

        Losses that are not finite are passed over.
        """
        if not isfinite(loss):
            return False
        if len(self._first) < WINDOW:
            self._first.append(loss)
        self._last.append(loss)
        return len(self._last) == WINDOW and self.is_far(self.now)

    def is_far(self, loss: float, start: float | None = None) -> bool:
        """See :func:`is_far`; the start is that of the first steps by default."""
        if start is None and not self._first:
            return False
        return is_far(loss, self.start if start is None else start, self._uniform)

    @property
    def start(self) -> float:
        """Mean loss of the first steps; one step at least.

        Where those rise themselves, it is bounded by the first, of which noise is no such multiple.
        """
        return min(fmean(self._first), 2 * self._first[0] + 4 * MARGIN)

    @property
    def now(self) -> float:
        """Mean loss of the last steps; one step at least."""
        return fmean(self._last)
