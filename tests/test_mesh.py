"""Law 1: same bits on any mesh."""

import pytest
from ranks import train

from zo.config import MeshConfig, UserError
from zo.mesh import Shape, fit, share


@pytest.mark.parametrize("extra", [["estimator.directions=1"], ["estimator.directions=3", "model.dtype=bfloat16"]])
def test_same_bits_on_any_mesh(overrides, tmp_path, extra):
    """Log, weights, scores: nothing may depend on who computed a cell."""
    alone = train([*overrides, *extra, f"run.dir={tmp_path}/alone"])
    for perturb, data in ((2, 1), (1, 2), (2, 2)):
        folder = tmp_path / f"{perturb}x{data}"
        mesh = [f"mesh.perturb={perturb}", f"mesh.data={data}", f"run.dir={folder}"]
        found = train([*overrides, *extra, *mesh], ranks=perturb * data)
        assert found["fingerprint"] == alone["fingerprint"]
        assert found["eval"] == alone["eval"]
        assert found["loss"] == alone["loss"]
        assert (folder / "steps.log").read_bytes() == (tmp_path / "alone" / "steps.log").read_bytes()


def test_an_uneven_table_is_shared_whole(overrides, tmp_path):
    """Three ranks on two rows or four columns: no cell is lost or done twice."""
    extra = ["estimator.name=one-sided", "estimator.directions=2", "batch.micro=1"]
    alone = train([*overrides, *extra, f"run.dir={tmp_path}/alone"])
    for mesh in (["mesh.perturb=3"], ["mesh.data=3"]):
        found = train([*overrides, *extra, *mesh, f"run.dir={tmp_path}/{mesh[0][5:9]}"], ranks=3)
        assert found["fingerprint"] == alone["fingerprint"]


def test_shares_cover_every_line_once():
    for lines in range(1, 20):
        for axis in range(1, 8):
            shares = [share(lines, axis, i) for i in range(axis)]
            assert [line for s in shares for line in s] == list(range(lines))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("config", "ranks", "rows", "columns", "expected"),
    [
        (MeshConfig(), 1, 2, 2, Shape(1, 1)),
        (MeshConfig(), 2, 2, 2, Shape(2, 1)),
        (MeshConfig(), 4, 2, 2, Shape(2, 2)),
        (MeshConfig(), 4, 8, 1, Shape(4, 1)),
        (MeshConfig(), 3, 2, 3, Shape(1, 3)),
        (MeshConfig(data=2), 2, 2, 2, Shape(1, 2)),
    ],
)
def test_an_empty_mesh_is_filled_in(config, ranks, rows, columns, expected):
    assert fit(config, ranks, rows, columns) == expected


@pytest.mark.parametrize(
    ("config", "ranks"), [(MeshConfig(perturb=3), 1), (MeshConfig(perturb=2, data=2), 2), (MeshConfig(), 5)]
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_would(config, ranks):
    with pytest.raises(UserError, match=r"use mesh.perturb=\d mesh.data=\d|start at most 4 ranks"):
        fit(config, ranks, 2, 2)
