"""Probes that are never written: corrections of outputs against weights that hold the probe."""

import copy
from pathlib import Path

import pytest
import test_units
import torch
from test_lockstep import CPU, FAMILIES, build, forwards
from torch import nn
from torch.nn import functional

from zo.config.schema import MemoryConfig
from zo.errors import UserError
from zo.method.passes import Probe
from zo.method.perturbation import rank_one
from zo.model.blocks import find_layout
from zo.model.folds import Together
from zo.model.form import Form, forward_order, layer_places
from zo.model.layout import Part, Segment
from zo.model.probing import correct_linear, is_plain
from zo.model.source import ModelSource
from zo.model.stacking import Stacker, split
from zo.state.log import Log
from zo.streaming.replica import Replica
from zo.streaming.selfcheck import self_check

MEETS = dict.fromkeys(FAMILIES, "layer") | {"t5": "module"}
"""Where the cells of each family meet; T5 looks biases up by distance, once for a whole batch."""
PROBES = [Probe(0, 0.03125), Probe(0, -0.03125), Probe(3, 0.03125), Probe(4, 0.0)]


def header(checked, layout, model):
    return {
        "directions": 1,
        "seed": 1,
        "distribution": "rank-one",
        "rule": "sgd",
        "weight_decay": 0.0,
        "order": forward_order(layout, model, checked.visits),
        "meet": checked.meet,
        "written": sorted(checked.written),
    }


def replica_of(model, checked, unit="layer", memory=None, folder=None):
    layout = find_layout(model, unit, checked.merged)
    source, memory = ModelSource(model), memory or MemoryConfig()
    replica = Replica(model, layout, lambda engine: source, memory, CPU, folder or Path())
    replica.open(Log(header(checked, layout, model)))
    return replica


def in_folds(replica, model, cells, part=0, fold=None):
    """Return the results of all probes on each cell; a column's probes are one fold by default."""
    table = [(row, column) for column in range(len(cells)) for row in range(len(PROBES))]
    folds = [c if fold is None else n // fold for n, (_, c) in enumerate(table)]
    return replica.table(
        PROBES,
        [row for row, _ in table],
        [lambda f=cells[column]: f(model) for _, column in table],
        Together([column for _, column in table], folds, part),
    )


@torch.no_grad()
def written(model, cells, order, part=0):
    """Return the same from weights that hold each probe wherever a part of the model uses them."""
    results = []
    for probe in PROBES:
        probed = copy.deepcopy(model)
        layout, parameters = (
            find_layout(probed),
            dict(model.named_parameters(remove_duplicate=False)),
        )
        for parameter in layout.parameters:
            matrices = Segment((Part(parameter),)).matrices
            z = rank_one(1, probe.direction, parameter.start, parameter.numel, CPU, matrices)
            for name in parameter.spec.names:
                owner, _, leaf = name.rpartition(".")
                above = [m for m in order if name.startswith(f"{m}.")]
                if order.index(above[-1]) >= part:
                    stored = parameters[name].data
                    new = stored + (z.view(stored.shape).double() * probe.scale).to(stored.dtype)
                    # A tied parameter has another value at each use.
                    setattr(probed.get_submodule(owner), leaf, nn.Parameter(new))
        results.append([cell(probed) for cell in cells])
    return [results[row][column] for column in range(len(cells)) for row in range(len(PROBES))]


def agree(found, expected):
    return all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_corrected_probe_is_the_written_one(name, unit):
    """In float64, for all blocks and for a part of them, in folds of several sizes."""
    model = build(name, torch.float64)
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # Grouped products have no float64.
    cells, reference = forwards(model), copy.deepcopy(model)
    checked = self_check([build(name)], cells, CPU, "rank-one", unit)
    assert checked.meet == MEETS[name]
    replica = replica_of(model, checked, unit)
    layout = find_layout(reference)
    order = forward_order(layout, reference, checked.visits)
    layers = layer_places(reference, order)
    for part in (0, layers[-2]):
        expected = written(reference, cells, order, part)
        for fold in (None, 1, 2) if unit == "layer" else (None,):
            assert agree(in_folds(replica, model, cells, part, fold), expected), (part, fold)
    assert not agree(expected[:1], expected[1:2])


@pytest.mark.parametrize("store", ["host", "disk"])
@torch.no_grad()
def test_cells_that_meet_at_modules_find_their_weights_in_any_store(tmp_path, store):
    """A layer is a block of several meeting points: each needs the block's weights in a slot."""
    cells = forwards(build("t5"))
    checked = self_check([build("t5")], cells, CPU, "rank-one")
    assert checked.meet == "module"
    found = []
    for memory in (MemoryConfig(), MemoryConfig(store=store, slots=2)):
        model = build("t5")
        replica = replica_of(model, checked, memory=memory, folder=tmp_path)
        layers = layer_places(model, forward_order(find_layout(model), model, checked.visits))
        found.append([r for part in (0, layers[-1]) for r in in_folds(replica, model, cells, part)])
        replica.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_modules_whose_weights_are_read_elsewhere_are_written():
    """And a fold of them still has the probes' losses."""
    for name, make in test_units.ELSEWHERE.items():
        torch.manual_seed(0)
        model = make().eval()
        cells = forwards(model)
        checked = self_check([model], cells, CPU, "rank-one")
        assert checked.written, name
        reference = copy.deepcopy(model)
        found = in_folds(replica_of(model, checked), model, cells)
        order = forward_order(find_layout(reference), reference, checked.visits)
        expected = written(reference, cells, order)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Doubled(nn.Linear):
    """A linear layer that reads its weight in another way."""

    def forward(self, x):
        return functional.linear(x, 2 * self.weight, self.bias)


def test_only_exact_types_are_corrected():
    assert is_plain(nn.Linear(3, 4)) and is_plain(nn.Embedding(3, 4))
    assert not is_plain(Doubled(3, 4)) and not is_plain(nn.Embedding(3, 4, max_norm=1.0))
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not is_plain(hooked)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert not is_plain(parametrised)


def test_a_correction_is_added_before_the_product_is_rounded():
    """Of two neighbours in bfloat16 that a probe moves by a tenth of their distance, some move."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 512, 64, generator=generator).bfloat16()
    x[1] = x[0]
    weight = torch.randn(32, 64, generator=generator).bfloat16()
    rows = torch.tensor([[1.0], [-1.0]]).expand(2, 32).bfloat16() * 2**-8
    columns = torch.ones(2, 64).bfloat16()
    found = correct_linear(x.flatten(0, 1), weight, rows, columns).view(2, 512, 32)
    difference = (found[0].double() - found[1].double()).mean((0, 1))
    exact = 2 * 2**-8 * x[0].double().sum(-1).mean()
    torch.testing.assert_close(difference.mean(), exact, rtol=0.05, atol=1e-4)


def test_what_stacks_and_what_does_not():
    stack = Stacker().stack
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    one, positions = torch.ones(1, 3), torch.arange(3)
    stacked = stack([((a, one, positions), {"x": None}), ((b, one, positions), {"x": None})])
    assert torch.equal(stacked[0][0], torch.cat((a, b)))
    assert stacked[0][1] is one and stacked[0][2] is positions
    assert torch.equal(split(stacked[0][0], 2)[1], b)
    other = stack([(a, one), (b, 2 * one)])
    assert torch.equal(other[1], torch.cat((one.expand(2, 3), 2 * one.expand(2, 3))))
    assert stack([a, b[:1]]) is None and stack([(a, 1), (b, 2)]) is None
    assert stack([(a, positions), (b, positions + 1)]) is None
    pieces = torch.arange(12.0).view(4, 3).split(2)
    assert stack(pieces).data_ptr() == pieces[0].data_ptr()


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"order": ["model.norm", 7]}, "lacks"), ({"meet": "anywhere"}, "meet='anywhere'")],
)
def test_a_log_of_another_model_is_refused_in_one_line(changed, said):
    layout = find_layout(build("llama"))
    facts = {"seed": 1, "distribution": "rank-one"}
    with pytest.raises(UserError, match=said) as error:
        Form.of(facts | changed, layout)
    assert "\n" not in str(error.value)
