"""The metrics of a run survive whatever a crash or an editor did to a line of them."""

import json
import math

import pytest
from ranks import train

from zo.observe.metrics import MetricsFile, last_scores

BAD = [
    b'{"step": 2, "loss": \n',
    b"\xff\xfe\x00\n",
    b"[1, 2]\n",
    b'{"loss": 1}\n',
    b'{"step": "two"}\n',
    b'{"step": null}\n',
    b"\x00\x00\x00\n",
    b"\n",
    b"[" * 100_000 + b"\n",
]


def scores_of(file):
    return {step: found.scores for step, found in file.evaluations.items()}


def line(step, **more):
    return json.dumps({"step": step, **more}).encode() + b"\n"


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_costs_no_other_line(tmp_path, bad):
    path, said = tmp_path / "metrics.jsonl", []
    good = (
        line(1, loss=0.5),
        line(2, eval={"accuracy": 0.5}),
        line(3, loss=0.25),
        line(4, eval={"accuracy": 0.75}),
    )
    path.write_bytes(
        good[0] + bad + b"".join(good[1:]) + bad + line(5, eval={"accuracy": 1.0}) + line(5)[:-4]
    )
    assert last_scores(path, 4) == {"accuracy": 0.75}
    file = MetricsFile(path, 4, said.append)
    assert scores_of(file) == {2: {"accuracy": 0.5}, 4: {"accuracy": 0.75}}
    file.write({"step": 5, "loss": 0.125})
    file.close()
    assert path.read_bytes() == good[0] + bad + b"".join(good[1:]) + bad + line(5, loss=0.125)
    assert len(said) == 1
    assert "line 2 and 1 more cannot be read; ignored" in said[0]


def test_steps_that_the_log_does_not_have_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2, eval={"loss": 1.0}) + line(3) + line(2, eval={"loss": 2.0}))
    file = MetricsFile(path, 2)
    assert scores_of(file) == {2: {"loss": 2.0}}
    file.close()
    assert path.read_bytes() == line(1) + line(2, eval={"loss": 1.0}) + line(2, eval={"loss": 2.0})
    for kept in (2, 1, 0):
        MetricsFile(path, kept).close()
        assert [json.loads(text)["step"] for text in path.read_bytes().splitlines()] == [1, 2, 2][
            : (0, 1, 3)[kept]
        ]
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_scores_that_are_not_numbers_are_written_and_read(tmp_path):
    """A diverged model has a loss of not-a-number; writing that must not end its run."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 0, "eval": {"accuracy": 0.5, "loss": math.nan}, "scalars": [math.inf]})
    file.close()
    assert json.loads(path.read_text()) == {
        "step": 0,
        "eval": {"accuracy": 0.5, "loss": None},
        "scalars": [None],
    }
    scores = scores_of(MetricsFile(path, 0))[0]
    assert scores["accuracy"] == 0.5
    assert math.isnan(scores["loss"])


def test_a_run_with_a_bad_line_goes_on(overrides, tmp_path):
    settings = [*overrides, f"run.dir={tmp_path}/run"]
    train([*settings, "run.steps=2"])
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(before[0] + b"\xff{}\n" + b"".join(before[1:]))
    train([*settings, "run.steps=3", "eval.every=0"])
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:-1] == [before[0], b"\xff{}\n", *before[1:]]
    assert json.loads(after[-1])["step"] == 3
