"""Folds: what is computed together is a number of the recipe, and a mesh deals out whole ones."""

import re

import pytest

from zo.config.schema import BatchConfig, Config, EstimatorConfig, MeshConfig
from zo.distributed.mesh import Shape, fit, idle_report
from zo.errors import UserError
from zo.method.estimator import ESTIMATORS, empty_table, rows_of
from zo.method.table import FOLDED, Grid, LossTable, folds_that_fit, owners, resolve_fold

SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 4), (4, 2), (3, 2)]


def table(rows, columns, fold=1):
    return LossTable([None] * rows, columns, fold=fold)


@pytest.mark.parametrize("rows", [1, 2, 6, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 8])
def test_folds_are_dealt_out_once_whole_and_evenly(rows, columns):
    for fold in folds_that_fit(rows, columns):
        for perturb, data in SHAPES:
            ranks = range(perturb * data)
            of_ranks = [table(rows, columns, fold).folds(rank, perturb, data) for rank in ranks]
            dealt = sorted(cells for folds in of_ranks for cells in folds)
            assert dealt == [[*range(i, i + fold)] for i in range(0, rows * columns, fold)]
            counts = list(map(len, of_ranks))
            assert max(counts) - min(counts) <= 1
            by_cell = table(rows, columns, fold).owners(perturb, data)
            assert all(by_cell[n] == r for r in ranks for cells in of_ranks[r] for n in cells)


def test_single_cells_are_dealt_out_as_axes_say():
    """Rank = perturb index * data size + data index, and in order where the axes do not divide."""
    for rows in range(1, 7):
        for columns in range(1, 6):
            for perturb, data in SHAPES:
                by_row = owners(rows, columns, perturb, data)
                found, cells = (
                    table(rows, columns).owners(perturb, data),
                    table(rows, columns).cells,
                )
                assert all(
                    by_row[row * columns + column] == rank
                    for (row, column), rank in zip(cells, found, strict=True)
                )


def test_a_micro_batchs_fold_stays_in_its_column():
    """Two pairs of directions, each a fold: the perturb axis has one, the data axis the columns."""
    found = LossTable([None] * 4, 2, fold=2).owners(2, 2)
    assert found == (0, 0, 2, 2, 1, 1, 3, 3)
    whole = LossTable([None] * 4, 4, fold=8).owners(1, 2)
    assert whole == (0,) * 8 + (1,) * 8


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_default_fold_is_all_cells_of_a_micro_batch(name):
    height = rows_of(name)(2)
    assert resolve_fold(None, FOLDED, height, 8) == height
    assert resolve_fold(None, "rademacher", height, 8) == 1
    grid = Grid(height, 8, height, "diagonal")
    found = empty_table(name, 1, 16, 1e-3, grid)
    assert {found.cells[n][1] for n in found.folds(3, 1, 8)[0]} == {3}


@pytest.mark.parametrize(
    ("fold", "distribution", "said"),
    [
        (3, FOLDED, "batch.fold=3 does not cut 4 columns of 4 cells evenly; use 1, 2, 4, 8, 16"),
        (12, FOLDED, "batch.fold=12 does not cut .* use 1, 2, 4, 8, 16"),
        (17, FOLDED, "batch.fold=17 is larger than the loss table of 16 cells; use 1, 2, 4, 8, 16"),
        (4, "gaussian", "distribution=gaussian cannot; use batch.fold=1, or .*=rank-one"),
    ],
)
def test_a_fold_that_does_not_fit_is_refused_with_those_that_do(fold, distribution, said):
    with pytest.raises(UserError, match=said) as error:
        resolve_fold(fold, distribution, 4, 4)
    assert "\n" not in str(error.value)


def test_a_configuration_knows_its_folds():
    batch = BatchConfig(sequences=4, micro=1, fold=1)
    diagonal = EstimatorConfig(cover="diagonal", probes=2)
    assert Config(batch=batch, estimator=diagonal).grid == Grid(4, 4, 1, "diagonal")
    for fold in (3, 32, 2):
        with pytest.raises(UserError, match=f"batch.fold={fold}"):
            Config(batch=BatchConfig(sequences=4, micro=1, fold=fold), estimator=diagonal)


def test_a_mesh_that_would_split_a_fold_is_told_which_fits():
    with pytest.raises(UserError) as error:
        fit(MeshConfig(perturb=2), 2, Grid(2, 1, 2))
    assert str(error.value) == (
        "mesh.perturb=2 does not fit 2 ranks and a table of 2 rows (probes) x 1 column "
        "(micro-batches), in 1 fold of 2 cells (batch.fold); use batch.fold=1"
    )
    with pytest.raises(UserError, match=r"use mesh\.perturb=1 mesh\.data=2 or batch\.fold=1$"):
        fit(MeshConfig(perturb=2), 2, Grid(2, 8, 2, "diagonal"))
    with pytest.raises(UserError, match=r"use batch\.fold=2$"):
        fit(MeshConfig(), 8, Grid(2, 8, 4, "diagonal"))
    with pytest.raises(UserError, match="start at most 16 ranks"):
        fit(MeshConfig(), 32, Grid(2, 8, 1, "diagonal"))
    assert fit(MeshConfig(), 8, Grid(2, 8, 2, "diagonal")) == Shape(1, 8)


@pytest.mark.parametrize("cover", ["full", "diagonal"])
@pytest.mark.parametrize("rows_of", [lambda q: 2 * q, lambda q: q + 1])
@pytest.mark.parametrize("ranks", range(1, 10))
def test_ranks_without_a_fold_are_named_and_each_remedy_fills_them(rows_of, ranks, cover):
    sequences, micro = 8, 2
    for count in (1, 2):
        for fold in folds_that_fit(rows_of(count), sequences // micro):
            for perturb in (p for p in range(1, ranks + 1) if ranks % p == 0):
                shape = Shape(perturb, ranks // perturb, ranks)
                said = idle_report(shape, rows_of, count, sequences, micro, fold, cover)
                grid = Grid(rows_of(count), sequences // micro, fold)
                dealt = grid.owners(shape.perturb, shape.data)
                if len({dealt.count(rank) for rank in range(ranks)}) == 1:
                    assert said is None
                    continue
                assert "\n" not in said
                remedies = re.findall(r"((?:[a-z]+\.[a-z]+=\d+ )+)\((\d+) (?:cell|fold)s\)", said)
                assert remedies
                for settings, folds in remedies:
                    new = dict(s.split("=") for s in settings.split())
                    q = int(new.get("estimator.directions", new.get("estimator.probes", count)))
                    m, f = int(new.get("batch.micro", micro)), int(new.get("batch.fold", fold))
                    assert f in folds_that_fit(rows_of(q), sequences // m)
                    assert rows_of(q) * (sequences // m) == int(folds) * f
                    assert int(folds) % ranks == 0
                    assert ("estimator.probes" in new) <= (cover == "diagonal")
                    again = idle_report(shape, rows_of, q, sequences, m, f, cover)
                    assert again is None
