"""Replay says beforehand if entries can change a block."""

import pytest
import torch
from conftest import make_llama

from zo.method.entry import Entry
from zo.model.blocks import find_layout
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
