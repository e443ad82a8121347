"""Replay says beforehand if entries can change a block."""

import pytest
import torch
from conftest import make_llama

from zo.method.entry import Entry
from zo.method.passes import Matrices
from zo.method.perturbation import rank_one
from zo.method.update import RULES
from zo.model.blocks import find_layout
from zo.model.layout import GRAIN, views
from zo.state.log import Log
from zo.state.replay import Replay

HEADER = {"directions": 2, "seed": 1, "distribution": "rademacher", "rule": "sgd"}


def blocks():
    model = make_llama()
    model.model.layers[0].requires_grad_(False)
    return find_layout(model, "layer").blocks


@pytest.mark.parametrize(
    "scalars", [(0.0, 0.0), (0.0, 1.0)], ids=["nothing measured", "something measured"]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_changes_nothing_is_known_and_what_changes_something_too(scalars, weight_decay):
    """The answer against replay itself, on weights with negative zeros, block by block."""
    log = Log(
        {**HEADER, "weight_decay": weight_decay},
        [Entry(1, 1, 1e-2, scalars), Entry(2, 2, 1e-2, (0.0, 0.0))],
    )
    replay, answers = Replay(log), set()
    for block in blocks():
        image = torch.zeros(block.size_bytes, dtype=torch.uint8)
        for flat in block.carve(image):
            flat.copy_(torch.randn(flat.numel()))
            flat[::3] = -0.0
        for version in (0, 1, 2):
            replayed = image.clone()
            replay.catch_up(block, replayed, 0, version, 2)
            said = replay.changes_anything(block, version, 2)
            answers.add(said)
            assert said == (not torch.equal(image, replayed))
    assert False in answers
    assert (True in answers) == (scalars != (0.0, 0.0) or weight_decay > 0)


@pytest.mark.parametrize("unit", ["layer", "module"])
def test_rank_one_directions_follow_the_parameters_however_they_are_cut(unit, monkeypatch):
    """A block of a vocabulary's rows, or a slice, replays what the whole matrix would."""
    monkeypatch.setattr("zo.model.blocks.CHUNK_BYTES", 1024)
    entry = Entry(1, 1, 1e-2, (0.5, -3.0))
    header = {**HEADER, "distribution": "rank-one", "weight_decay": 0.0}
    replay, change = Replay(Log(header, [entry])), RULES["sgd"](entry, 0.0)
    for block in find_layout(make_llama(vocab_size=200), unit).blocks:
        image = torch.zeros(block.size_bytes, dtype=torch.uint8)
        for start in range(0, block.size_bytes, GRAIN):
            replay.catch_up(block, image[start : start + GRAIN], start, 0, 1)
        for part, view in views(block, block.carve(image)):
            p = part.parameter
            first, stop = part.start - p.start, part.start - p.start + part.numel
            whole = [Matrices(p.start, p.numel, *p.spec.shape[-2:])] if p.decays else []
            z = [rank_one(1, d, p.start, p.numel, matrices=whole) for d in change.directions]
            c = change.coefficients
            assert torch.equal(view.reshape(-1), (z[0] * c[0] + z[1] * c[1])[first:stop])
