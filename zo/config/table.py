"""Keys of the loss table: its columns (``batch``), its rows (``estimator``), and how they meet."""

import math
from dataclasses import dataclass

from zo.config.checks import MAX_CELLS, at_least, at_most, choice
from zo.errors import UserError
from zo.method.estimator import ESTIMATORS, rows_of
from zo.method.part import parse
from zo.method.passes import DISTRIBUTIONS
from zo.method.shaping import GROUPS, SHAPES
from zo.method.table import COVERS, Grid, resolve_fold


@dataclass(frozen=True)
class BatchConfig:
    """The columns of the loss table."""

    sequences: int = 16
    """Sequences a step."""
    micro: int = 8
    """Sequences that one forward sees."""
    max_tokens: int = 512
    """Tokens a sequence at most; a longer one loses the start of its prompt."""
    bucket: int | None = None
    """Steps whose sequences are sorted by length together, so that those of a step are alike and
    little of a micro-batch is padding; by default 1."""
    fold: int | None = None
    """Cells of the loss table, micro-batch after micro-batch, that go through one matrix product
    together and that one rank computes: a part of a micro-batch's cells or whole micro-batches. By
    default all cells of a micro-batch with estimator.distribution=rank-one, and 1 with others,
    which have no such product."""

    def __post_init__(self) -> None:
        for key in ("bucket", "fold"):
            if (count := getattr(self, key)) is not None:
                at_least(f"batch.{key}", count, 1)
        for key in ("sequences", "micro"):
            at_least(f"batch.{key}", getattr(self, key), 1)
        at_most("batch.sequences", self.sequences, MAX_CELLS)
        at_least("batch.max_tokens", self.max_tokens, 2)
        if self.sequences % self.micro:
            fits = ", ".join(
                str(d) for d in range(1, self.sequences + 1) if self.sequences % d == 0
            )
            raise UserError(
                f"batch.micro={self.micro} does not divide batch.sequences={self.sequences}; use "
                f"{fits}"
            )

    @property
    def columns(self) -> int:
        """Micro-batches a step."""
        return self.sequences // self.micro


@dataclass(frozen=True)
class EstimatorConfig:
    """The rows of the loss table."""

    name: str = "spsa"
    """``spsa`` (two-sided), ``one-sided``, or ``population``: one side of each, against their
    mean."""
    directions: int | None = None
    """Directions a step; by default 1, and with cover=diagonal micro-batches times probes."""
    cover: str = "full"
    """``full``: every direction sees every micro-batch; ``diagonal``: each sees one alone, so that
    the same forwards have more directions."""
    probes: int = 1
    """Directions of each micro-batch with cover=diagonal."""
    part: str = "all"
    """Layers that a step's directions reach: ``all``, ``top:N``, ``sampled``: a draw for each step,
    mostly of the top, or ``auto``: the top four."""
    eps: float = 1e-3
    """Length of the step along a direction."""
    distribution: str = "rademacher"
    """``rademacher``, ``gaussian``, or ``rank-one``, whose probes are never written."""
    shape: str = "none"
    """``none``; or the estimate is of the losses' ``z`` scores or ``rank`` alone, whose
    differences are not divided by eps: update.lr is then the length of a step."""
    shape_per: str = "table"
    """Losses that are shaped together: of the whole ``table``, or of each ``prompt``."""

    def __post_init__(self) -> None:
        choice("estimator.name", self.name, ESTIMATORS)
        choice("estimator.distribution", self.distribution, DISTRIBUTIONS)
        choice("estimator.cover", self.cover, COVERS)
        choice("estimator.shape", self.shape, ("none", *SHAPES))
        choice("estimator.shape_per", self.shape_per, GROUPS)
        for key in ("directions", "probes"):
            if (count := getattr(self, key)) is not None:
                at_least(f"estimator.{key}", count, 1)
                at_most(f"estimator.{key}", count, MAX_CELLS)
        if self.cover == "full" and self.probes > 1:
            raise UserError(
                f"estimator.probes={self.probes} are directions of one micro-batch, and with "
                "estimator.cover=full every direction sees all; use estimator.cover=diagonal, or "
                f"estimator.directions={self.probes}"
            )
        if self.name == "population" and self.cover != "full":
            raise UserError(
                "estimator.name=population compares directions on the same micro-batches; use "
                f"estimator.cover=full, or another estimator with cover={self.cover}"
            )
        parse(self.part)
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(
                f"estimator.eps={self.eps} must be a number above 0; MeZO uses 1e-3 for full "
                "fine-tuning"
            )


def directions(batch: BatchConfig, estimator: EstimatorConfig) -> int:
    """Return the number of directions a step."""
    if estimator.directions is not None:
        return estimator.directions
    return batch.columns * estimator.probes if estimator.cover == "diagonal" else 1


def grid(batch: BatchConfig, estimator: EstimatorConfig) -> Grid:
    """Return the folds of a step's loss table, as the mesh deals them out.

    Raises:
        UserError: ``batch.fold`` does not cut the table evenly, or cannot be more than 1.
    """
    diagonal = estimator.cover == "diagonal"
    of_column = estimator.probes if diagonal else directions(batch, estimator)
    height = rows_of(estimator.name)(of_column)
    fold = resolve_fold(batch.fold, estimator.distribution, height, batch.columns)
    return Grid(height, batch.columns, fold, estimator.cover)


def check_table(batch: BatchConfig, estimator: EstimatorConfig) -> None:
    """Check that rows and columns fit each other.

    Raises:
        UserError: too many cells, directions that do not match the cover, or a wrong fold.
    """
    count, columns = directions(batch, estimator), batch.columns
    of_batch = f"{columns} micro-batches (batch.sequences / batch.micro)"
    diagonal = estimator.cover == "diagonal"
    if diagonal and count != columns * estimator.probes:
        raise UserError(
            f"estimator.directions={count} does not match estimator.cover=diagonal, where "
            f"{of_batch} x estimator.probes={estimator.probes} are "
            f"{columns * estimator.probes} directions; use that number, or leave it empty"
        )
    if estimator.name == "population" and count < 2:
        raise UserError(
            f"estimator.directions={count} has no other direction to compare with, as "
            "estimator.name=population does; use 2 or more, such as 30"
        )
    if (pairs := count if diagonal else count * columns) > MAX_CELLS:
        key = f"probes={estimator.probes}" if diagonal else f"directions={count}"
        raise UserError(
            f"estimator.{key} on {of_batch} are {pairs} pairs a step; use at most {MAX_CELLS}"
        )
    grid(batch, estimator)
