"""A grid of runs: what is varied, what is run again, and which run is the best."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zo.errors import UserError
from zo.run.sweep import Result, best_of, expand, table

ROOT = Path(__file__).resolve().parent.parent


def test_a_grid_is_every_combination_in_the_order_of_the_keys(tmp_path):
    keys = ["update.lr=1e-4,1e-3", "run.steps=3", "estimator.eps=1e-3,1e-2"]
    points = expand("quickstart", keys, tmp_path)
    assert [point.chosen for point in points] == [
        ("update.lr=0.0001", "estimator.eps=0.001"),
        ("update.lr=0.0001", "estimator.eps=0.01"),
        ("update.lr=0.001", "estimator.eps=0.001"),
        ("update.lr=0.001", "estimator.eps=0.01"),
    ]
    assert {point.fixed for point in points} == {("run.steps=3",)}
    assert len({point.folder for point in points}) == 4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["update.lt=1,2"], "unknown key update.lt"),
        (["update.lr=1e-4,-1"], "update.lr=-1"),
        (["run.dir=a,b"], "give dir=FOLDER"),
        (["update.lr=1e-4,"], "is not understood"),
    ],
)
def test_a_mistake_at_any_point_is_found_before_the_first_run(keys, said, tmp_path):
    with pytest.raises(UserError) as error:
        expand("quickstart", keys, tmp_path / "sweep")
    assert said in str(error.value)
    assert not (tmp_path / "sweep").exists()


def result(name, code=0, **scores):
    return Result((name,), f"runs/{name}", code, {"eval": scores} if code == 0 else {}, "error: no")


def test_the_best_has_the_highest_accuracy_or_the_lowest_loss():
    runs = [
        result("a", accuracy=0.5, loss=0.1),
        result("b", accuracy=0.7, loss=0.3),
        result("c", accuracy=0.7, loss=0.2),
        result("d", code=2),
    ]
    assert best_of(runs).chosen == ("b",)
    losses = [result("a", loss=None), result("b", loss=0.3), result("c", loss=0.2)]
    assert best_of(losses).chosen == ("c",)
    assert best_of([result("d", code=2)]) is None
    text = table(runs)
    assert "| b (best) | 0.7 | 0.3 |" in text
    assert "failed: error: no" in text


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_names_the_best(overrides, tmp_path):
    folder = tmp_path / "sweep"
    settings = [o for o in overrides if not o.startswith(("update.lr=", "model.name="))]
    model = next(o for o in overrides if o.startswith("model.name="))

    def sweep():
        return subprocess.run(
            [
                sys.executable,
                ROOT / "launch" / "sweep.py",
                f"dir={folder}",
                "update.lr=1e-4",
                *settings,
                f"{model},{tmp_path}/nowhere",
                "run.steps=2",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    first = sweep()
    assert first.returncode == 2, first.stderr
    assert "error: 1 of 2 runs failed" in first.stderr, first.stderr
    assert first.stdout.count("nowhere is not a folder") == 1
    assert "Best: python launch/train.py recipe=default" in first.stdout
    assert (folder / "sweep.md").read_text() == first.stdout
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "sweep.json").read_text())
    logs = [Path(r["folder"]) / "steps.log" for r in results if r["code"] == 0]
    times = [log.stat().st_mtime_ns for log in logs]
    # Whoever repairs what was wrong starts the same command again.
    (tmp_path / "nowhere").symlink_to(model.partition("=")[2])
    second = sweep()
    assert second.returncode == 0, second.stderr
    assert [log.stat().st_mtime_ns for log in logs] == times
    assert len(logs) == 1
    assert second.stdout.count("failed") == 0
