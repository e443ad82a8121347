"""Replay says beforehand if entries can change a block."""

from dataclasses import replace

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


def layout():
    model = make_llama()
    model.model.layers[0].requires_grad_(False)
    return find_layout(model, "layer")


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
    of = layout()
    replay, answers = Replay(log, of), set()
    for block in of.blocks:
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


def test_replay_changes_nothing_that_a_part_does_not_reach():
    """Blocks in the order of the forward, which is not that of their addresses."""
    of = layout()
    names = [group.modules[0] for group in of.groups]
    order = [names[i] for i in (0, 2, 1, 3, 4)] + [m for g in of.groups for m in g.modules[1:]]
    entries = [Entry(s, s, 0.5, (1.0, 1.0), part) for s, part in enumerate((2, 0, 3, 1, 0), 1)]
    log = Log({**HEADER, "weight_decay": 0.1, "order": order}, entries[:1])
    replay = Replay(log, of)
    replay.visit(of.blocks[0], _zeros(of.blocks[0]), 0)
    log.extend(entries[1:])
    for block in of.blocks:
        position = max(order.index(module) for module in block.modules)
        reached = [e for e in entries if e.part <= position]
        for version in (0, 1, 3):
            found, expected = _zeros(block), _zeros(block)
            assert replay.visit(block, found, version) == 5
            for entry in (e for e in reached if e.step > version):
                alone = Log(log.header | {"order": None}, entries[: entry.step - 1])
                alone.extend([replace(entry, part=0)])
                Replay(alone, of).visit(block, expected, entry.step - 1)
            assert all(map(torch.equal, found, expected)), (block.name, version)
            said = replay.changes_anything(block, version, 5)
            assert said == (any(e.step > version for e in reached) and bool(block.trainable))


def _zeros(block):
    return block.carve(torch.zeros(block.size_bytes, dtype=torch.uint8))


@pytest.mark.parametrize("unit", ["layer", "module"])
def test_rank_one_directions_follow_the_parameters_however_they_are_cut(unit, monkeypatch):
    """A block of a vocabulary's rows, or a slice, replays what the whole matrix would."""
    monkeypatch.setattr("zo.model.blocks.CHUNK_BYTES", 1024)
    entry = Entry(1, 1, 1e-2, (0.5, -3.0))
    header = {**HEADER, "distribution": "rank-one", "weight_decay": 0.0}
    of = find_layout(make_llama(vocab_size=200), unit)
    replay, change = Replay(Log(header, [entry]), of), RULES["sgd"](entry, 0.0)
    for block in of.blocks:
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
