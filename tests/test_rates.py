"""A learning rate is found by trials, and a run that uses it is any other run."""

import json

import pytest
import torch
from plain import plain_config, run
from ranks import train

from zo import Trainer, load_config
from zo.config.recipes import recipe_for
from zo.errors import UserError
from zo.method.rates import Trial, choose, largest_rate, rates_below, search
from zo.run.rates import NAME
from zo.state.log import read

AUTO = ("update.lr=auto", "batch.sequences=8", "estimator.directions=8", "mesh.check_every=1")


def test_rates_are_round_numbers_from_large_to_small():
    found = [rate for rate, _ in zip(rates_below(0.25), range(4), strict=False)]
    assert found == [0.1, 0.03, 0.01, 0.003]
    assert next(rates_below(0.3)) == 0.3


def quadratic(lr):
    """Gradient descent on x^2 from 1, four steps: 2^0.5 is the best rate, 1 diverges."""
    return Trial(lr, (1 - 2 * lr) ** 8)


def test_the_search_ends_below_the_best_rate():
    trials = search(1.0, 10.0, quadratic)
    assert [t.lr for t in trials] == [10.0, 3.0, 1.0, 0.3, 0.1, 0.03]
    assert choose(1.0, trials) == 0.1


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ([9.0, 9.0, 1.0, 1.5, 1.9], 0.03),  # The rate above the best diverges.
        ([9.0, 1.8, 1.0, 1.5, 1.9], 0.1),  # It lowers the loss, too.
        ([1.0, 1.5, 1.9], 1.0),
        ([9.0, 2.0, 2.0, 2.0], None),
    ],
)
def test_the_largest_rate_with_a_margin_is_chosen(losses, chosen):
    trials = [Trial(lr, loss) for lr, loss in zip(rates_below(1.0), losses, strict=False)]
    rate = choose(2.0, trials)
    assert rate == chosen


def test_a_step_that_says_nothing_gives_no_rate():
    assert largest_rate(2.0, (0.0, 0.0)) is None
    assert largest_rate(float("nan"), (1.0,)) is None
    assert largest_rate(2.0, (2.0, -2.0)) == 5.0


def probed(folder):
    return json.loads((folder / f"{NAME}.json").read_text())


def test_a_run_finds_a_rate_and_resumes_with_it(overrides, tmp_path, capsys):
    """Its bits are those of a run that is given the rate: nothing of a trial stays."""
    first = run(overrides, tmp_path / "found", *AUTO, "run.steps=2")
    assert "trial of update.lr=" in capsys.readouterr().err
    rate, trials = probed(tmp_path / "found")["lr"], probed(tmp_path / "found")["trials"]
    assert rate in [trial["lr"] for trial in trials]
    assert (tmp_path / "found" / f"{NAME}.png").stat().st_size > 1000
    given = (f"update.lr={rate}", *AUTO[1:])
    assert (
        run(overrides, tmp_path / "given", *given, "run.steps=2")["fingerprint"]
        == (first["fingerprint"])
    )
    assert {entry.lr for entry in read(tmp_path / "found" / "steps.log")[1]} == {rate}

    long = run(overrides, tmp_path / "given", *given, "run.steps=4")
    capsys.readouterr()
    resumed = run(overrides, tmp_path / "found", *AUTO, "run.steps=4")
    assert "trial of" not in capsys.readouterr().err
    assert resumed["fingerprint"] == long["fingerprint"]
    with pytest.raises(UserError, match=r"holds another run: update\.lr"):
        run(overrides, tmp_path / "found", *AUTO, "update.lr=1e-9", "run.steps=5")
    with pytest.raises(UserError, match=r"holds another run: update\.lr .* -> auto"):
        run(overrides, tmp_path / "given", *AUTO, "run.steps=5")


def test_a_model_of_three_layers_with_its_own_data_needs_no_recipe(overrides, tmp_path):
    """Model and data are all that is given but for the size of the test."""
    given = [o for o in overrides if o.startswith(("model.name", "data.", "batch.max"))]
    size = ["batch.sequences=4", "estimator.probes=4", "run.steps=2", "export.at_end=false"]
    chosen = [*given, *size, "run.trackers=[]", f"run.dir={tmp_path}/run"]
    assert Trainer(load_config(recipe_for(chosen), chosen)).train()["steps"] == 2
    assert probed(tmp_path / "run")["lr"] == read(tmp_path / "run" / "steps.log")[1][0].lr


@pytest.mark.slow
def test_every_mesh_and_store_finds_the_same_rate(overrides, tmp_path):
    settings = [*overrides, *AUTO, "run.steps=1"]
    one = train([*settings, f"run.dir={tmp_path}/one"])
    two = train(
        [*settings, f"run.dir={tmp_path}/two", "memory.store=host", "mesh.slice=2"], ranks=2
    )
    assert two["fingerprint"] == one["fingerprint"]
    assert probed(tmp_path / "two") == probed(tmp_path / "one")


def test_a_model_of_the_users_own_keeps_its_weights_through_the_trials(tmp_path):
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 1), torch.randn(8, 4)

    def squares(model, batch):
        error = model(batch["x"]).squeeze(-1) - batch["x"].sum(-1)
        return torch.stack((error.square().sum(), torch.tensor(4.0)))

    settings = ["update.lr=auto", "batch.sequences=8", "batch.micro=4", "estimator.directions=4"]
    settings += [f"run.dir={tmp_path}/run", "eval.every=0", "run.steps=0"]
    before = net.weight.clone()
    trainer = Trainer(
        plain_config(settings),
        model=net,
        objective=squares,
        batches=lambda step, column: {"x": x[4 * column : 4 * column + 4]},
    )
    trainer.train()
    assert torch.equal(net.weight, before)


def test_weights_on_disk_are_refused_before_anything_is_written(overrides, tmp_path):
    with pytest.raises(UserError, match=r"^update\.lr=auto tries rates on weights in memory"):
        run(overrides, tmp_path / "run", *AUTO, "memory.store=disk")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_no_rate_lowers_is_refused_in_a_line(tmp_path):
    x = torch.zeros(4, 4)
    net = torch.nn.Linear(4, 1)
    constant = lambda model, batch: torch.stack(  # noqa: E731
        (model(batch["x"]).sum() * 0 + 8.0, torch.tensor(4.0))
    )
    settings = ["update.lr=auto", "batch.sequences=4", "batch.micro=4", f"run.dir={tmp_path}/run"]
    trainer = Trainer(
        plain_config([*settings, "eval.every=0"]),
        model=net,
        objective=constant,
        batches=lambda step, column: {"x": x},
    )
    with pytest.raises(UserError, match=r"^update\.lr=auto found no rate .* give update\.lr"):
        trainer.train()
    assert not (tmp_path / "run" / "config.yaml").exists()
