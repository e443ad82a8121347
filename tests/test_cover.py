"""Covers: where each micro-batch has directions of its own, their mean is still the gradient of the
batch's mean loss."""

import math
from functools import partial

import pytest
import torch

from zo.config.schema import BatchConfig, Config, EstimatorConfig
from zo.errors import UserError
from zo.method.estimator import ESTIMATORS, directions_of, empty_table, estimate, rows_of, spread
from zo.method.kernels import replay_and_perturb
from zo.method.passes import Matrices
from zo.method.perturbation import Pass, rademacher, rank_one
from zo.method.table import Grid

SIZE, SEED, EPS = 16, 3, 1e-2
TERMS = (1, 4, 0, 2)
"""Of each micro-batch: unequal, and one has none."""


def diagonal(name, step, probes, columns=4):
    grid = Grid(rows_of(name)(probes), columns, 1, "diagonal")
    return empty_table(name, step, probes * columns, EPS, grid)


def quadratics():
    """For each micro-batch and term a matrix, whose squared product with theta is its loss."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(4, SIZE, generator=generator, dtype=torch.float64) for _ in range(count)]
        for count in TERMS
    ]


SQUARE = (Matrices(0, SIZE, 4, 4),)
DIAGONAL = sorted(ESTIMATORS.keys() - {"population"})
"""Estimators whose directions need no other direction's loss of the same micro-batch."""
Z = {
    "rademacher": rademacher,
    "rank-one": partial(rank_one, matrices=SQUARE),
}


def filled(table, theta, matrices, distribution="rademacher"):
    """The table with the losses of its cells, as a step would find them."""
    rows = torch.empty(table.rows, SIZE)
    work = Pass(SEED, distribution, probes=tuple(table.probes))
    replay_and_perturb(theta, 0, work, rows, None, SQUARE)
    values = [
        [
            sum(float((m @ rows[row].double()).square().sum()) for m in matrices[column]),
            TERMS[column],
            7,
            9,
        ]
        for row, column in table.cells
    ]
    return table.fill(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("distribution", Z)
@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.slow
def test_the_mean_of_diagonal_estimates_is_the_gradient_of_the_batch(name, probes, distribution):
    """A micro-batch of few terms that weighs as much as one of many trains something else."""
    theta, matrices = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)), quadratics()
    sums = [sum((2 * m.T @ (m @ theta.double()) for m in c), torch.zeros(SIZE)) for c in matrices]
    gradient, steps, columns = sum(sums) / sum(TERMS), 600, len(TERMS)
    total = torch.zeros(SIZE, dtype=torch.float64)
    for step in range(1, steps + 1):
        table = filled(diagonal(name, step, probes), theta, matrices, distribution)
        scalars, skipped = estimate(name, table, EPS)
        assert skipped == 0
        numbers = directions_of(step, columns * probes)
        z = torch.stack([Z[distribution](SEED, k, 0, SIZE).double() for k in numbers])
        total += (torch.tensor(scalars, dtype=torch.float64)[:, None] * z).mean(0)
    own = [columns * s / sum(TERMS) for s in sums]
    variance = SIZE * sum(float(g @ g) for g in own) / columns
    error = float((total / steps - gradient).norm())
    assert error < 1.5 * math.sqrt(variance / (steps * columns * probes))
    assert error < 0.2 * float(gradient.norm())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loss_of_a_diagonal_table_is_the_batchs(name):
    """The number that a user follows must not depend on the cover."""
    theta, matrices = torch.ones(SIZE), quadratics()
    table = filled(diagonal(name, 1, 2), theta, matrices)
    total = sum(float((m @ theta.double()).square().sum()) for c in matrices for m in c)
    assert table.loss == pytest.approx(total / sum(TERMS), rel=0.1)
    assert (table.tokens, table.padded_tokens) == (7 * len(TERMS), 9 * len(TERMS))


def test_a_direction_sees_its_own_micro_batch_alone():
    cells = diagonal("spsa", 1, 2, columns=2).cells
    assert cells == (*((row, 0) for row in range(4)), *((row, 1) for row in range(4, 8)))
    assert diagonal("one-sided", 1, 1, columns=3).cells == tuple(
        cell for c in range(3) for cell in ((0, c), (c + 1, c))
    )


def test_a_micro_batch_without_terms_moves_nothing_and_a_bad_loss_only_its_own_direction():
    table = filled(diagonal("spsa", 1, 1), torch.ones(SIZE), quadratics())
    assert [g != 0 for g in estimate("spsa", table, EPS)[0]] == [True, True, False, True]
    values = table.values.clone()
    values[2, 0] = math.nan
    scalars, skipped = estimate("spsa", table.fill(values), EPS)
    assert skipped == 1
    assert [g != 0 for g in scalars] == [True, False, False, True]
    assert math.isnan(table.fill(values).loss)
    _, skipped = estimate("spsa", table.fill(values * 0), EPS)
    assert skipped == 4


@pytest.mark.parametrize("cover", ["full", "diagonal"])
@pytest.mark.parametrize("name", DIAGONAL)
def test_the_spread_of_pairs_is_told_apart_from_their_rounding(name, cover):
    """In units of a mean loss: of one-sided pairs against the clean loss of the same data."""
    columns = 2
    grid = Grid(rows_of(name)(1), columns, 1, cover)
    table = empty_table(name, 1, columns if cover == "diagonal" else 1, EPS, grid)
    away = [0.5 if table.probes[row].scale > 0 else 0.25 for row, _ in table.cells]
    values = [[(8 + 4 * c + d) * 3, 3, 1, 1] for (_, c), d in zip(table.cells, away, strict=True)]
    apart, rounding = spread(name, table.fill(torch.tensor(values, dtype=torch.float64)))
    assert apart == 0.25
    assert rounding == pytest.approx(10.375 * 2.0**-24)


BATCH = BatchConfig(sequences=8, micro=2)


@pytest.mark.parametrize(
    ("estimator", "said"),
    [
        (EstimatorConfig(cover="diagonal", directions=3), "directions=3 does not match .* are 4 "),
        (
            EstimatorConfig(cover="diagonal", probes=2, directions=4),
            "4 micro-batches .* x estimator.probes=2 are 8 directions; use that number",
        ),
        (EstimatorConfig(cover="diagonal", probes=2**19), "are 2097152 pairs a step; use at most"),
    ],
)
def test_directions_that_do_not_match_the_cover_are_refused(estimator, said):
    with pytest.raises(UserError, match=said) as error:
        Config(batch=BATCH, estimator=estimator)
    assert "\n" not in str(error.value)


def test_probes_of_a_full_table_and_unknown_covers_are_refused():
    with pytest.raises(UserError, match=r"cover=diagonal, or estimator\.directions=4"):
        EstimatorConfig(probes=4)
    with pytest.raises(UserError, match="use one of diagonal, full"):
        EstimatorConfig(cover="half")


def test_the_number_of_directions_follows_the_cover():
    found = [
        Config(batch=BATCH, estimator=estimator).directions
        for estimator in (
            EstimatorConfig(),
            EstimatorConfig(directions=3),
            EstimatorConfig(cover="diagonal"),
            EstimatorConfig(cover="diagonal", probes=2, directions=8),
        )
    ]
    assert found == [1, 3, 4, 8]
