"""The arithmetic of one pass over weights, as plain values: changes to replay and probes to write.

``perturbation`` has the equations. Nothing here imports torch, so that the configuration can read
the names of distributions, estimators and rules without the seconds that takes.
"""

from dataclasses import dataclass
from functools import cached_property

DISTRIBUTIONS = ("rademacher", "gaussian", "rank-one")
"""Names of the distributions of z, as ``estimator.distribution`` takes them."""


GROUP = 4
"""Directions of a change that are summed before their sum is added to the weights."""


@dataclass(frozen=True)
class Matrices:
    """A parameter with two or more dims, ``[..., rows, width]``: matrices one after the other.

    Row i of matrix e has the number ``e * rows + i``, column j of it ``e * width + j``.
    """

    start: int
    """Address of the first element."""
    numel: int
    """Elements of all its matrices."""
    rows: int
    """Rows of each matrix, >= 1."""
    width: int
    """Columns of each matrix, >= 1."""

    def __post_init__(self) -> None:
        """Check that the elements are whole matrices."""
        assert self.start >= 0 and self.rows >= 1 and self.width >= 1, self
        assert self.numel >= 1 and self.numel % (self.rows * self.width) == 0, self

    @property
    def stop(self) -> int:
        """Address after the last element."""
        return self.start + self.numel


@dataclass(frozen=True)
class Change:
    """One log entry, applied: ``w <- decay * w + sum_k coefficients[k] * z(directions[k])``.

    The sum is taken in groups of ``GROUP`` directions (see ``perturbation``).
    """

    step: int
    """The entry's step, >= 0; names the stream of its stochastic rounding."""
    directions: tuple[int, ...]
    coefficients: tuple[float, ...]
    """One float32 value per direction."""
    decay: float = 1.0
    """float32 factor of the weights before the directions are added; 1.0 leaves them alone."""
    part: int = 0
    """First position, in the model's order of layers, that is changed; 0: all of it."""


@dataclass(frozen=True)
class Probe:
    """One evaluation point of the loss, ``w + scale * z(direction)``; scale 0 is ``w`` itself."""

    direction: int
    scale: float


@dataclass(frozen=True)
class Pass:
    """Arithmetic of one pass over memory: the changes, then the probes of the result.

    Hashable and independent of an address, so that a kernel caches its launch table by it for all
    segments of a step.
    """

    seed: int
    """The run's seed, in [0, 2**64)."""
    distribution: str
    """One of ``DISTRIBUTIONS``."""
    changes: tuple[Change, ...] = ()
    """Log entries to apply, oldest first; each is rounded to the stored dtype.

    float32 is exact, the 16-bit dtypes are rounded stochastically.
    """
    probes: tuple[Probe, ...] = ()
    """The probes."""

    def __post_init__(self) -> None:
        """Check ranges: numbers beyond the counter would wrap differently on each device."""
        assert 0 <= self.seed < 1 << 64, self.seed
        numbers = [c.step for c in self.changes] + [d for c in self.changes for d in c.directions]
        numbers += [probe.direction for probe in self.probes]
        assert all(0 <= number < 1 << 32 for number in numbers), (min(numbers), max(numbers))

    @cached_property
    def _hash(self) -> int:
        return hash((self.seed, self.distribution, self.changes, self.probes))

    def __hash__(self) -> int:
        """Return the hash, computed once: a long replay has thousands of changes."""
        return self._hash
