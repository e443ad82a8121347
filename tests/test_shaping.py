"""Shapes of losses: z-scores and ranks, of a table or of each prompt; populations; agreement."""

import pytest
import torch

from zo.method import estimator
from zo.method.shaping import agreement, ranks, shape, z_scores
from zo.method.table import Grid

EPS = 0.1


def filled(name, directions, grid, losses):
    """Return a table whose cells have losses by prompt, two each, and completions 0 and 1."""
    table = estimator.empty_table(name, 1, directions, EPS, grid)
    cells = [[sum(each), len(each), 1.0, 1.0, *each, 0.0, 1.0] for each in losses]
    return table.fill(torch.tensor(cells, dtype=torch.float64))


def test_equal_losses_share_a_rank_and_have_no_z_score():
    assert ranks([3.0, 1.0, 1.0]) == [0.5, -0.25, -0.25]
    assert ranks([2.0]) == [0.0] and z_scores([0.1, 0.1, 0.1]) == [0.0, 0.0, 0.0]
    assert z_scores([1.0, 3.0]) == [-1.0, 1.0]


def test_a_prompt_that_is_harder_than_others_does_not_count_more():
    """Its losses are a hundred times those of the other, which orders the rows the other way."""
    grid = Grid(2, 1)
    table = filled("spsa", 1, grid, [[100.0, 2.0], [300.0, 1.0]])
    assert estimator.estimate("spsa", table, EPS, "z", "prompt")[0] == (0.0,)
    assert estimator.estimate("spsa", table, EPS, "z", "table")[0] == (-1.0,)
    plain = estimator.estimate("spsa", table, EPS)[0]
    assert plain == (pytest.approx(-99.5 / (2 * EPS)),)


def test_shapes_of_a_diagonal_table_are_of_its_own_columns():
    """Column 1 is the same as column 0 in other units: its directions weigh the same."""
    grid = Grid(4, 2, cover="diagonal")
    one = [[1.0, 2.0], [3.0, 5.0], [2.0, 2.0], [0.0, 1.0]]
    table = filled("spsa", 4, grid, [*one, *[[x * 9 + 4 for x in cell] for cell in one]])
    scalars, skipped = estimator.estimate("spsa", table, EPS, "rank", "prompt")
    assert scalars[:2] == scalars[2:] and scalars[0] != scalars[1] and not skipped


def test_a_population_is_measured_against_the_others():
    grid = Grid(3, 2)
    losses = [[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]] * 2
    table = filled("population", 3, grid, losses)
    assert [probe.scale for probe in table.probes] == [estimator.float32(EPS)] * 3
    plain = estimator.estimate("population", table, EPS)[0]
    assert plain == pytest.approx((-30.0, -15.0, 45.0))
    shaped = estimator.estimate("population", table, EPS, "rank")[0]
    assert shaped == (-0.75, 0.0, 0.75)


def test_shaping_leaves_counts_alone_and_changes_no_order():
    table = filled("spsa", 2, Grid(4, 1), [[1.0, 2.0], [0.0, 0.5], [4.0, 4.0], [3.0, 3.5]])
    for name in ("z", "rank"):
        for per in ("table", "prompt"):
            shaped = shape(table, name, per)
            assert torch.equal(shaped.values[:, 1:], table.values[:, 1:])
            assert shaped.values[:, 0].argsort().tolist() == [1, 0, 3, 2]


def test_agreement_counts_pairs_and_prompts():
    table = filled("spsa", 2, Grid(4, 1), [[1.0, 2.0], [1.0, 0.0], [4.0, 4.0], [4.0, 4.0]])
    table.values[3, -1] = 7.0
    assert agreement(table, [(0, 1), (2, 3)]) == (0.25, 0.75)
    assert estimator.agreement_of("spsa", table) == (0.25, 0.75)
