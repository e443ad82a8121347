"""What the table says, and what a rule makes of it."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from zo.errors import UserError
from zo.method.entry import Entry
from zo.method.estimator import (
    ESTIMATORS,
    check_directions,
    directions_of,
    estimate,
    float32,
    probes,
    spread,
)
from zo.method.kernels import replay_and_perturb
from zo.method.passes import Matrices
from zo.method.perturbation import Pass, Probe, rademacher, rank_one
from zo.method.table import LossTable
from zo.method.update import SCHEDULES, learning_rate, sgd

EPS = 1e-3
FEWEST = {"population": 2}
"""Directions of a step, at least, where one is not enough."""

SQUARE = (Matrices(0, 64, 8, 8),)
Z = {"rademacher": rademacher, "rank-one": partial(rank_one, matrices=SQUARE)}


def table_of(loss, rows, theta, distribution="rademacher"):
    """The table of a function of parameters."""
    out = torch.empty(len(rows), theta.numel(), dtype=theta.dtype)
    work = Pass(3, distribution, probes=tuple(rows))
    replay_and_perturb(theta, 0, work, out, None, SQUARE)
    return filled(rows, [float(loss(row)) for row in out])


def filled(rows, losses):
    """A table of one column with these losses."""
    return LossTable(rows, 1).fill(
        torch.tensor([[value, 1, 1] for value in losses], dtype=torch.float64)
    )


@pytest.mark.parametrize("distribution", Z)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.slow
def test_mean_of_estimates_tends_to_the_gradient(name, distribution):
    """A biased or wrongly scaled estimator trains something else than the loss."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(64, generator=generator)
    matrix = torch.randn(64, 64, generator=generator) / 8
    loss = lambda x: (matrix @ x.double().to(torch.float32)).double().square().sum()  # noqa: E731
    gradient = 2 * matrix.double().T @ (matrix.double() @ theta.double())
    total, count = torch.zeros(64, dtype=torch.float64), 4000
    directions = FEWEST.get(name, 1)
    for step in range(1, count + 1):
        table = table_of(loss, probes(name, step, directions, 1e-2), theta, distribution)
        scalars, skipped = estimate(name, table, 1e-2)
        assert skipped == 0
        for g, k in zip(scalars, directions_of(step, directions), strict=True):
            total += g * Z[distribution](3, k, 0, 64).double() / directions
    # Each coordinate's standard error is |gradient| / sqrt(count); the bias of one-sided SPSA
    # averages out over z.
    error = (total / count - gradient).norm() / gradient.norm()
    assert error < 1.5 * math.sqrt(64 / count)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("directions", [1, 4])
def test_descends_a_quadratic(name, directions):
    """The sign and the scale of the update: the wrong one climbs."""
    theta = torch.randn(256, generator=torch.Generator().manual_seed(1))
    loss = lambda x: x.double().square().sum()  # noqa: E731
    before, directions = loss(theta), max(directions, FEWEST.get(name, 1))
    for step in range(1, 401):
        rows = probes(name, step, directions, EPS)
        scalars, _ = estimate(name, table_of(loss, rows, theta), EPS)
        change = sgd(Entry(step, step, 1e-3 * directions, scalars), 0.0)
        replay_and_perturb(theta, 0, Pass(3, "rademacher", (change,)))
    assert loss(theta) < 0.5 * before


def test_directions_are_never_used_twice():
    used = [d for step in range(1, 50) for d in directions_of(step, 3)]
    assert sorted(used) == list(range(len(used)))


def test_the_pair_of_a_direction_stands_side_by_side():
    """The two signs share one z in a pass only if their rows are neighbours."""
    assert probes("spsa", 2, 2, EPS) == [
        Probe(d, s * float32(EPS)) for d in (2, 3) for s in (1, -1)
    ]
    assert probes("one-sided", 1, 2, EPS) == [
        Probe(0, 0.0),
        Probe(0, float32(EPS)),
        Probe(1, float32(EPS)),
    ]


def test_rows_are_means_over_terms_not_over_micro_batches():
    # Two rows of two columns, column by column; the second row has no terms.
    table = torch.tensor(
        [[10.0, 1, 5, 6], [0.0, 0, 0, 0], [2.0, 5, 9, 9], [0.0, 0, 0, 0]], dtype=torch.float64
    )
    found = LossTable([None, None], 2).fill(table)
    first, empty = found.row_losses()
    assert (found.tokens, found.padded_tokens) == (14, 15)
    assert first == 2.0
    assert math.isnan(empty)


def test_rounding_of_losses_is_that_of_their_logits():
    # Each loss is a mean of four terms.
    cells = torch.tensor([[8.0, 4, 1, 1], [-16.0, 4, 1, 1]], dtype=torch.float64)
    table = LossTable([Probe(0, 1.0), Probe(0, -1.0)], 1).fill(cells)
    assert spread("spsa", table) == (6.0, 3.0 * 2.0**-24)
    assert spread("spsa", table, torch.finfo(torch.bfloat16).eps / 2) == (6.0, 3.0 * 2.0**-9)


def test_only_directions_that_are_not_finite_count_as_zero():
    scalars, skipped = estimate(
        "spsa", filled(range(8), [1.0, 0.5, math.nan, 1.0, math.inf, 2.0, 1e300, -1e300]), 1e-3
    )
    assert skipped == 3
    assert scalars[0] == 250.0
    assert scalars[1:] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_warm_up_and_end_where_they_should(schedule):
    rates = [learning_rate(step, 100, 2.0, schedule, 10) for step in range(1, 101)]
    assert rates[:11] == [pytest.approx(2.0 * (i + 1) / 11) for i in range(11)]
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == (2.0 if schedule == "constant" else pytest.approx(0, abs=0.05))
    assert min(rates) > 0


def test_weight_decay_is_a_factor_of_its_own():
    change = sgd(Entry(1, 16, 0.1, (2.0, 4.0)), 0.5)
    assert change.decay == float32(0.95)
    assert change.coefficients == (float32(-0.1), float32(-0.2))


def test_direction_numbers_that_would_wrap_are_refused():
    """A wrapped number repeats the directions of the first steps, on each device in another way."""
    assert directions_of(2**16 - 1, 2**16)[-1] < 2**32
    check_directions(2**32 - 1, 1)
    for steps, directions in ((2**16, 2**16), (2**32, 1), (20_000, 215_000)):
        with pytest.raises(
            UserError, match=rf"^run\.steps={steps} x estimator\.directions={directions} [^\n]*$"
        ):
            check_directions(steps, directions)
        with pytest.raises(UserError):
            directions_of(steps, directions)
    for wrong in (2**32, -1):
        with pytest.raises(AssertionError):
            rademacher(3, wrong, 0, 128)
        with pytest.raises(AssertionError):
            Pass(3, "rademacher", probes=(Probe(wrong, 1.0),))
    with pytest.raises(AssertionError):
        rademacher(2**64, 0, 0, 128)
