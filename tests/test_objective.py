"""Objectives from Python: what is a loss trains, and what is none is refused in a sentence."""

import pytest
import torch
from conftest import make_llama
from test_trainer import Net, own
from torch import nn

from zo import Trainer
from zo.errors import UserError
from zo.state.log import read


def mean(model, batch):
    return (model(batch["x"]).squeeze(-1) - batch["x"].sum(-1)).square().mean()


FORMS = {
    "a mean": mean,
    "a mean of one dim": lambda model, batch: mean(model, batch).view(1),
    "a number": lambda model, batch: mean(model, batch).item(),
    "two numbers": lambda model, batch: (mean(model, batch).item(), 1),
    "a tensor of two": lambda model, batch: torch.stack((mean(model, batch), torch.tensor(1.0))),
    "a mean with a gradient": lambda model, batch: mean(model, batch).requires_grad_(),
}


def test_a_mean_trains_as_the_sum_and_number_of_terms_do(tmp_path):
    scalars = []
    for name, form in FORMS.items():
        own(tmp_path / name, form, "run.steps=2").train()
        entries = read(tmp_path / name / "run" / "steps.log")[1]
        scalars.append([entry.scalars for entry in entries])
    assert any(scalars[0][0])
    assert all(found == scalars[0] for found in scalars)


def test_the_loss_of_a_transformers_model_trains(tmp_path):
    ids = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(1))
    config = own(tmp_path, mean, "run.steps=2", "batch.sequences=2", "batch.micro=2").config
    loss = lambda model, batch: model(**batch).loss  # noqa: E731
    batches = lambda step, column: {"input_ids": ids, "labels": ids}  # noqa: E731
    Trainer(config, model=make_llama(), objective=loss, batches=batches).train()
    assert any(read(tmp_path / "run" / "steps.log")[1][0].scalars)


class Output(dict):
    def __init__(self, loss):
        super().__init__(loss=loss)
        self.loss = loss


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda loss: None, "returned None; return a loss"),
        (lambda loss: Output(loss), r"returned a Output, not a loss; return its \.loss"),
        (lambda loss: loss.expand(32), r"a tensor of shape \[32\], not one loss; return its mean"),
        (lambda loss: "low", "returned a str that is not a loss; return a number"),
        (lambda loss: [loss, loss, loss], "returned a list that is not a loss"),
        (lambda loss: loss * 1j, "returned a Tensor that is not a loss"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_sentence(tmp_path, result, said):
    with pytest.raises(UserError, match=said) as error:
        own(tmp_path, lambda model, batch: result(mean(model, batch))).train()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "steps.log").exists()


def test_a_loss_in_bf16_that_hides_the_pairs_difference_is_warned_of(tmp_path, capsys):
    """Next to 3.4 the numbers of bf16 are 0.016 apart, and the losses of a pair 0.001."""
    coarse = lambda model, batch: mean(model, batch).bfloat16()  # noqa: E731
    own(tmp_path, coarse, "run.steps=2", model=Net()).train()
    said = capsys.readouterr().err
    assert "the objective returns its loss in bfloat16; compute it in float32" in said
    own(tmp_path / "fine", mean, "run.steps=2", model=nn.Sequential(Net())).train()
    assert "bfloat16" not in capsys.readouterr().err
