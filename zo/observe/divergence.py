"""Tells by the losses of steps whether a run diverges."""

from collections import deque
from collections.abc import Iterable
from math import inf, isfinite, nan
from statistics import fmean

WINDOW = 4
"""Steps whose mean loss is compared, the first with the last: the loss of one step is noise."""
MARGIN = 0.5
"""Least rise, in nats."""
NEAR_UNIFORM = 0.98
"""Of the loss of uniform predictions."""


class Divergence:
    """Compares the mean loss of the last steps with that of the first steps.

    A run diverges where it is twice as large, or where it comes to the loss of predictions that are
    uniform over the vocabulary; by no less than ``MARGIN``.
    """

    def __init__(self, losses: Iterable[float] = (), uniform: float = inf) -> None:
        """Begin with the losses of earlier steps.

        Args:
            losses: mean cross-entropy a term of each step so far, in nats.
            uniform: the loss of uniform predictions, ln(vocabulary).
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
        else:
            self._last.append(loss)
        limit = max(min(2 * self.start, NEAR_UNIFORM * self._uniform), self.start + MARGIN)
        return len(self._last) == WINDOW and self.now > limit

    @property
    def start(self) -> float:
        """Mean loss of the first steps; not-a-number before the first one."""
        return fmean(self._first) if self._first else nan

    @property
    def now(self) -> float:
        """Mean loss of the last steps; not-a-number before they are complete."""
        return fmean(self._last) if len(self._last) == WINDOW else nan
