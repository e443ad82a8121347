"""Schedules and update rules: from the log's scalars to a change of the weights.

``sgd``:  w <- (1 - lr * weight_decay) * w - lr * mean_k(g_k z_k)

Before it is logged, a projected gradient may be limited:  |g| <= clip * r, where r is the root mean
square of the logged ones of the last steps. The log holds what is applied, so a replay needs no
limit, and a resumed run finds the same r.

Source: Malladi et al. 2023 (MeZO), with its weight decay (none on biases and norms).
"""

import math
from collections.abc import Callable, Sequence

from zo.method.entry import Entry
from zo.method.estimator import directions_of, float32
from zo.method.passes import Change

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Factor of the learning rate by the share of the steps after the warm-up that is done, from 0."""


def learning_rate(step: int, steps: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """Return the learning rate of step 1 .. steps: a linear warm-up, then the schedule."""
    if step <= warmup_steps:
        return lr * step / (warmup_steps + 1)
    return lr * SCHEDULES[schedule]((step - 1 - warmup_steps) / max(1, steps - warmup_steps))


def sgd(entry: Entry, weight_decay: float) -> Change:
    """Return one entry as the change of a block, the decay of its matrices included."""
    directions = len(entry.scalars)
    return Change(
        step=entry.step,
        directions=directions_of(entry.step, directions),
        coefficients=tuple(float32(-entry.lr * g / directions) for g in entry.scalars),
        decay=float32(1.0 - entry.lr * weight_decay),
        part=entry.part,
    )


RULES: dict[str, Callable[[Entry, float], Change]] = {"sgd": sgd}
"""The rules, by the name that ``update.name`` takes."""

CLIP_ENTRIES = 16
"""Entries whose scalars say how large a projected gradient usually is."""


def clip(scalars: Sequence[float], entries: Sequence[Entry], factor: float) -> tuple[float, ...]:
    """Return a step's projected gradients, limited to ``factor`` times their usual size.

    The usual size is the root mean square of the scalars of the last ``CLIP_ENTRIES`` entries, and
    of ``scalars`` themselves before the first. Where it is zero there is no limit.

    Args:
        scalars: float32 values.
        entries: of the log so far.
        factor: above 0.

    Returns:
        float32 values, one per scalar.
    """
    usual = [g for entry in entries[-CLIP_ENTRIES:] for g in entry.scalars] or list(scalars)
    limit = float32(factor * math.sqrt(sum(g * g for g in usual) / len(usual)))
    if limit == 0.0:
        return tuple(scalars)
    return tuple(math.copysign(min(abs(g), limit), g) for g in scalars)
