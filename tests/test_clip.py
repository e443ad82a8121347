"""A limit of projected gradients: a function of what the log holds, so that every life of a run
finds the same."""

import json
import math

import pytest
from logs import same_log
from ranks import train

from zo.config.schema import UpdateConfig
from zo.errors import UserError
from zo.method.entry import Entry
from zo.method.estimator import float32
from zo.method.update import CLIP_ENTRIES, clip


def entries(*scalars):
    return [Entry(i, i, 1.0, given) for i, given in enumerate(scalars, 1)]


def test_a_limit_is_a_multiple_of_the_usual_size():
    before = entries((3.0, -4.0), (5.0, 0.0))
    usual = math.sqrt((9 + 16 + 25) / 4)
    found = clip((1.0, 100.0, -100.0), before, 2.0)
    assert found == (1.0, float32(2 * usual), -float32(2 * usual))


def test_the_first_step_is_measured_by_itself():
    assert clip((1.0, -1.0, 1.0, 7.0), [], 1.0)[3] == float32(math.sqrt(13))


def test_only_the_last_entries_count_and_zeros_set_no_limit():
    before = entries((1e6,), *[(1.0,)] * CLIP_ENTRIES)
    assert clip((50.0,), before, 1.5) == (1.5,)
    assert clip((50.0, 0.0), entries(*[(0.0, 0.0)] * 20), 1.5) == (50.0, 0.0)


@pytest.mark.parametrize("limit", [-1.0, 0.0, math.nan, math.inf])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(UserError, match=r"^update\.clip=\S+ must be a number above 0[^\n]*$"):
        UpdateConfig(clip=limit)


@pytest.mark.slow
def test_a_resumed_run_is_limited_alike(overrides, tmp_path):
    """The bits of one long run, with steps that were limited before and after the stop."""
    settings = [*overrides, "update.clip=0.7", "eval.every=0", "estimator.directions=3"]
    expected = train([*settings, "run.steps=8", f"run.dir={tmp_path}/long"])
    train([*settings, "run.steps=4", f"run.dir={tmp_path}/run"])
    found = train([*settings, "run.steps=8", f"run.dir={tmp_path}/run"])
    assert found["fingerprint"] == expected["fingerprint"]
    assert same_log(tmp_path / "run" / "steps.log", tmp_path / "long" / "steps.log")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    clipped = [json.loads(line)["clipped"] for line in lines]
    assert any(clipped[:4])
    assert any(clipped[4:])
    assert all(count <= 3 for count in clipped)
