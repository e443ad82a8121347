"""Search for a learning rate by short trials, each from the same weights, from large to small.

To first order one step of ``sgd`` lowers the loss by lr * mean_k(g_k^2) at most, so a rate far
beyond the usable ones is known before any trial, whatever the model and the estimator:

    top = OVERSHOOT * |loss| / mean_k(g_k^2)

From there each trial has a third of the rate, until smaller ones lower the loss less. Rates are
1 or 3 times a power of ten. Pure functions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

OVERSHOOT = 10.0
"""Losses that a step of the largest rate would take off, if the loss were a plane."""
TRIALS = 16
"""Rates tried at most: eight decades."""
WORSE = 2
"""Rates in a row below the best one that must lower the loss less, for the search to end."""
LEAST = 1e-4
"""Share of the loss that a trial must take off to count: less is rounding."""


@dataclass(frozen=True)
class Trial:
    """Some steps at one rate."""

    lr: float
    loss: float
    """Clean loss of the judged micro-batches afterwards; infinite where the trial diverged."""


def rates_below(top: float) -> Iterator[float]:
    """Yield 1 and 3 times powers of ten, from the largest that is at most ``top`` down."""
    exponent = math.floor(math.log10(top))
    while True:
        for digit in (3, 1):
            if (rate := float(f"{digit}e{exponent}")) <= top:
                yield rate
        exponent -= 1


def largest_rate(loss: float, scalars: Sequence[float]) -> float | None:
    """Return the rate to begin at; ``None`` where the step's projected gradients say nothing.

    Args:
        loss: clean, before any step.
        scalars: projected gradients of a step there.
    """
    squares = sum(g * g for g in scalars) / len(scalars)
    if not (squares > 0.0 and math.isfinite(squares) and math.isfinite(loss)):
        return None
    return OVERSHOOT * (abs(loss) or 1.0) / squares


def search(before: float, top: float, trial: Callable[[float], Trial]) -> list[Trial]:
    """Try rates from ``top`` down until smaller ones lower the loss less.

    Args:
        before: clean loss before any step.
        top: the largest rate.
        trial: tries a rate.

    Returns:
        The trials, from large to small.
    """
    found: list[Trial] = []
    for _, rate in zip(range(TRIALS), rates_below(top), strict=False):
        found.append(trial(rate))
        best = min(range(len(found)), key=lambda at: found[at].loss)
        if _descends(before, found[best]) and len(found) - 1 - best >= WORSE:
            break
    return found


def choose(before: float, trials: Sequence[Trial]) -> float | None:
    """Return the largest rate that lowers the loss well, with a margin; ``None`` if there is none.

    Well: by half of what the best trial does, at least. With a margin: the rate above it, three
    times as large, lowers the loss, too. Where none has such a margin, it is the rate below.

    Args:
        before: clean loss before any step.
        trials: from large to small, each a third of the one before.
    """
    best = min((trial.loss for trial in trials), default=before)
    for above, trial in zip([None, *trials], trials, strict=False):
        if not _descends(before, trial) or before - trial.loss < (before - best) / 2:
            continue
        has_margin = above is None or _descends(before, above)
        return trial.lr if has_margin else next(rates_below(trial.lr * 0.9))
    return None


def _descends(before: float, trial: Trial) -> bool:
    return before - trial.loss > LEAST * abs(before)
