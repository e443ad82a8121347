"""Decay toward the base: the same bits anywhere, and old coefficients that shrink."""

import pytest
import torch
from conftest import make_llama
from logs import same_log
from plain import assert_refused, plain_config, run
from test_pairs import PLACES

from zo import Trainer
from zo.method.estimator import directions_of
from zo.method.perturbation import rademacher
from zo.model.blocks import find_layout
from zo.run.restore import load_run
from zo.state.log import read

ANCHOR = ["update.anchor=200", "update.lr=1e-3"]


def weights(folder):
    loaded = load_run(folder)
    found = {name: tensor.clone() for name, tensor in loaded.replica.tensors()}
    loaded.replica.close()
    return found


def test_old_coefficients_decay(overrides, tmp_path):
    """The weights are the base's plus directions with coefficients that decay, biases included."""
    run([*overrides, *ANCHOR, "run.steps=6"], tmp_path / "run", "estimator.directions=2")
    header, entries = read(tmp_path / "run" / "steps.log")
    assert header["anchor"] == 200
    base = make_llama()
    found = weights(tmp_path / "run")
    for placed in find_layout(base).parameters:
        start = base.get_parameter(placed.name).detach().double()
        moved = torch.zeros_like(start)
        for entry in entries:
            moved *= 1 - 200 * entry.lr
            for g, direction in zip(entry.scalars, directions_of(entry.step, 2), strict=True):
                z = rademacher(header["seed"], direction, placed.start, placed.numel)
                moved -= entry.lr * g / 2 * z.double().view(start.shape)
        assert moved.any()
        torch.testing.assert_close(found[placed.name].double() - start, moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [[], ["peft.type=lora", "estimator.distribution=rank-one"]])
def test_an_anchored_run_has_the_same_bits_in_every_store_and_after_a_stop(
    overrides, tmp_path, kind
):
    settings = [*overrides, *ANCHOR, *kind, "mesh.check_every=1", "run.steps=10", "eval.every=5"]
    whole = run(settings, tmp_path / "whole")
    for number, place in enumerate((["run.snapshot_every=3"], *PLACES)):
        folder = tmp_path / str(number)
        run(settings, folder, *place, "run.steps=7")
        assert run(settings, folder, *place)["fingerprint"] == whole["fingerprint"], place
        assert same_log(folder / "steps.log", tmp_path / "whole" / "steps.log")
    assert (
        whole["fingerprint"] != run([*settings, "update.anchor=0"], tmp_path / "no")["fingerprint"]
    )


def test_what_cannot_be_anchored_is_refused(overrides, tmp_path):
    settings = [*overrides, *ANCHOR]
    assert_refused("stored in float32", settings, tmp_path / "run", "model.dtype=bfloat16")
    assert_refused(r"^update\.anchor=-1\.0 is out", overrides, tmp_path / "run", "update.anchor=-1")
    own = {"model": make_llama(), "objective": lambda m, b: m(**b).logits.sum().double().repeat(2)}
    config = plain_config([*ANCHOR, f"run.dir={tmp_path}/own"])
    batches = lambda step, column: {"input_ids": torch.ones(8, 4, dtype=torch.long)}  # noqa: E731
    with pytest.raises(Exception, match="a model of your own is trained in place"):
        Trainer(config, **own, batches=batches).train()
