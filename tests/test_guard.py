"""A run that diverges stops with its log intact; one that is to go on for longer does."""

import json
import math

import pytest
import yaml
from plain import run

from zo.errors import UserError
from zo.method.update import learning_rate
from zo.observe.divergence import Divergence
from zo.state.log import read
from zo.state.log_file import _U32, _packer


def first_alarm(seen, **settings):
    guard = Divergence(**settings)
    return next((step for step, loss in enumerate(seen, 1) if guard.add(loss)), None)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([10.5, 10.4, 10.6, 10.5, 12.0, 20.0, 30.0, 40.0, 60.0], 6),
        ([0.6, 0.9, 0.4, 0.7, 1.1, 1.0, 0.3, 1.2] * 20, None),
        ([3.0] * 4 + [10.8] * 4, 6),
        ([6.0] * 4 + [10.5] * 4, None),
        ([6.0] * 4 + [10.7] * 4, 8),
        ([10.83] * 4 + [10.9] * 20, None),
        ([0.05] * 4 + [0.15] * 20, None),
        ([2.0] * 4 + [math.nan, math.inf] * 8 + [9.0] * 4, 22),
        ([0.71, 0.0, 78.3, 5091.0, 0.69, 0.69], 4),  # Collapsed, which the loss does not show.
        ([0.02, 0.7, 0.9, 0.6, 0.8, 0.7], None),
    ],
)
def test_a_rise_of_the_loss_is_seen_and_noise_is_not(losses, step):
    assert first_alarm(losses, uniform=math.log(50272)) == step


def test_losses_of_an_earlier_process_count():
    assert first_alarm([9.0], losses=[2.0] * 5 + [4.0] * 3) == 1
    assert first_alarm([9.0] * 20) is None


def test_a_run_that_diverges_stops_and_names_the_rate(overrides, tmp_path, capsys):
    settings = ("update.lr=0.1", "run.steps=30", "eval.every=0")
    said = r"diverges with update\.lr=0\.1; .* update\.lr=0\.01, or"
    with pytest.raises(UserError, match=said) as error:
        run(overrides, tmp_path, *settings)
    assert "\n" not in str(error.value)
    stopped = len(read(tmp_path / "steps.log")[1])
    assert 4 <= stopped < 30
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "failed"

    with pytest.raises(UserError, match=rf"^step {stopped + 1}: the loss has risen"):
        run(overrides, tmp_path, *settings)
    summary = run(overrides, tmp_path, *settings, "run.divergence=warn")
    assert summary["steps"] == 30
    printed = capsys.readouterr().err
    assert printed.count("diverges with update.lr=0.1") == 1
    assert "has probably collapsed" in printed
    assert "raise estimator.eps" not in printed


def test_a_held_out_loss_far_over_its_start_stops_a_run(overrides, tmp_path):
    settings = ("update.lr=0.1", "run.steps=3", "eval.every=3")
    with pytest.raises(UserError, match=r"^step 3: the held-out loss has risen from"):
        run(overrides, tmp_path, *settings)


def test_a_schedule_goes_on_over_more_steps_where_it_is_asked_to(overrides, tmp_path, capsys):
    """Stopped and resumed after that, it has the same bits."""
    linear = "update.schedule=linear"
    run(overrides, tmp_path, linear, "run.steps=4")
    with pytest.raises(UserError, match=r"run\.extend=true goes on with the rates of run\.steps=8"):
        run(overrides, tmp_path, linear, "run.steps=8")
    extended = run(overrides, tmp_path, linear, "run.steps=8", "run.extend=true")
    assert "run.steps is 8 now, and was 4: from step 5 (0.0005) on" in capsys.readouterr().err
    path = tmp_path / "steps.log"
    header, entries = read(path)
    of = [4] * 4 + [8] * 4
    assert [e.lr for e in entries] == [
        learning_rate(e.step, steps, 1e-3, "linear", 0)
        for e, steps in zip(entries, of, strict=True)
    ]
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert content["config"]["run"]["steps"] == 8
    assert content["extended"] == [{"after": 4, "steps": 8}]

    size = _packer(header["directions"]).size + _U32.size
    path.write_bytes(path.read_bytes()[: -2 * size])
    resumed = run(overrides, tmp_path, linear, "run.steps=8")
    assert resumed["fingerprint"] == extended["fingerprint"]
