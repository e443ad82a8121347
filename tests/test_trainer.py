"""The loop: a step is MeZO's step, a user's own model trains, a dead run is reported."""

import json
import math

import pytest
import torch
from conftest import make_llama
from plain import plain_config
from torch import nn

from zo import Trainer, load_config
from zo.errors import UserError
from zo.method.estimator import float32
from zo.method.perturbation import gaussian
from zo.state.log import read

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.


@torch.no_grad()
def test_a_step_is_a_plain_mezo_step_with_the_same_z(tmp_path):
    """Algorithm 1 of Malladi et al. 2023, on a model whose parameters are in address order."""
    eps, lr, seed = 1e-3, 1e-2, 5
    ids = torch.randint(3, 24, (2, 2, 9), generator=torch.Generator().manual_seed(1))

    def objective(model, batch):
        logits = model(input_ids=batch["ids"], use_cache=False).logits[:, :-1].double()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="sum"
        )
        return torch.stack((loss, torch.tensor(16.0, dtype=torch.float64)))

    settings = [
        "batch.sequences=4",
        "batch.micro=2",
        "run.steps=1",
        f"estimator.eps={eps}",
        f"update.lr={lr}",
    ]
    settings += [
        "estimator.distribution=gaussian",
        f"run.seed={seed}",
        f"run.dir={tmp_path}/run",
        "eval.every=0",
    ]
    settings += ["export.at_end=false", "update.schedule=constant", "update.weight_decay=0.1"]
    model = make_llama(tie_word_embeddings=False)
    trainer = Trainer(
        plain_config(settings),
        model=model,
        objective=objective,
        batches=lambda step, column: {"ids": ids[column]},
    )
    trainer.train()

    from zo.model.blocks import find_layout

    plain = make_llama(tie_word_embeddings=False)
    named = dict(plain.named_parameters())
    parameters_in_order = list(find_layout(plain).parameters)

    def perturb(scale):
        for p in parameters_in_order:
            z = gaussian(seed, 0, p.start, p.numel).view(p.spec.shape)
            named[p.name].copy_(before[p.name] + float32(scale * eps) * z)

    def loss():
        sums = sum(objective(plain, {"ids": ids[column]}) for column in range(2))
        return float(sums[0] / sums[1])

    before = {name: parameter.clone() for name, parameter in named.items()}
    perturb(1)
    plus = loss()
    perturb(-1)
    g = float32((plus - loss()) / (2 * eps))
    for p in parameters_in_order:
        z = gaussian(seed, 0, p.start, p.numel).view(p.spec.shape)
        decay = float32(1 - lr * 0.1) if len(p.spec.shape) > 1 else 1.0
        named[p.name].copy_(before[p.name] * decay + float32(-lr * g) * z)
    assert read(tmp_path / "run" / "steps.log")[1][0].scalars == (g,)
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())


class Net(nn.Module):
    """A plain module with a parameter of its own beside its modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x * self.scale)))


def own(tmp_path, objective, *changes, model=None):
    settings = [
        "run.steps=150",
        "batch.sequences=64",
        "batch.micro=32",
        "estimator.directions=4",
        "update.lr=2e-2",
    ]
    settings += [f"run.dir={tmp_path}/run", "eval.every=0", "update.schedule=constant", *changes]
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))

    def batches(step, column):
        return {"x": x[32 * column : 32 * column + 32], "step": torch.tensor(step)}

    return Trainer(
        plain_config(settings),
        model=model or Net(),
        objective=objective,
        batches=batches,
    )


def squares(model, batch):
    error = model(batch["x"]).squeeze(-1) - batch["x"].sum(-1)
    return torch.stack((error.square().sum(), torch.tensor(float(len(error)))))


def test_a_users_own_model_learns(tmp_path):
    summary = own(tmp_path, squares).train()
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.3 * losses[0]
    assert summary["steps"] == 150
    assert not (tmp_path / "run" / "model").exists()


def test_an_objective_without_a_gradient_learns(tmp_path):
    """Accuracy is flat almost everywhere: only a method without gradients can descend it."""

    def wrong(model, batch):
        decided = model(batch["x"]).squeeze(-1) > 0
        return torch.stack(
            ((decided != (batch["x"].sum(-1) > 0)).double().sum(), torch.tensor(32.0).double())
        )

    own(tmp_path, wrong, "estimator.eps=0.1", "update.lr=0.02").train()
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_step_without_a_finite_loss_moves_nothing_and_is_reported(tmp_path, capsys):
    def sometimes(model, batch):
        return squares(model, batch) * (math.nan if batch["step"] == 1 else 1.0)

    own(tmp_path, sometimes, "run.steps=3").train()
    entries = read(tmp_path / "run" / "steps.log")[1]
    assert [any(e.scalars) for e in entries] == [True, False, True]
    assert "step 2: 4 of 4 directions had no finite loss" in capsys.readouterr().err
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line.get("skipped") for line in lines] == [None, 4, None]
    assert lines[1]["loss"] is None


def test_a_run_that_stays_without_finite_losses_stops_with_advice(tmp_path):
    never = lambda model, batch: squares(model, batch) * math.inf  # noqa: E731
    with pytest.raises(
        UserError, match=r"no finite loss in 3 steps in a row .* smaller update\.lr"
    ):
        own(tmp_path, never, "run.max_skipped=3").train()
    assert len(read(tmp_path / "run" / "steps.log")[1]) == 3


def test_a_loss_that_the_perturbation_does_not_change_is_reported(tmp_path, capsys):
    model = Net()
    constant = lambda model, batch: squares(model, batch) * 0 + 1  # noqa: E731
    before = [p.clone() for p in model.parameters()]
    own(tmp_path, constant, "run.steps=1", model=model).train()
    assert "every projected gradient is exactly zero" in capsys.readouterr().err
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_pairs_that_differ_by_their_rounding_are_reported_once(tmp_path, capsys):
    far = lambda model, batch: squares(model, batch).double() + torch.tensor([32e6, 0.0])  # noqa: E731
    own(tmp_path, far, "run.steps=3").train()
    assert capsys.readouterr().err.count("raise estimator.eps") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert 0 < line["pair_spread"] < 8 * line["pair_resolution"]
        assert line["pair_resolution"] == pytest.approx(1e6 * 2.0**-24, rel=1e-3)


def test_a_first_order_learning_rate_is_warned_about_and_not_forbidden(tmp_path, capsys):
    own(
        tmp_path, squares, "run.steps=1", "estimator.distribution=gaussian", "update.lr=2e-5"
    ).train()
    assert "update.lr=2e-05" in capsys.readouterr().err


def test_objective_and_batches_come_together():
    with pytest.raises(UserError, match="together"):
        Trainer(load_config("quickstart"), model=Net())
