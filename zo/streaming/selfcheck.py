"""Choose the blocks of a model, and check on a small copy that lockstep equals plain forwards.

A visit can serve only reads inside its block's own forward. Every read of a parameter is watched; a
block with out-of-block reads is merged into its parent. Then the copy runs in lockstep and by plain
forwards, and the losses are compared with ``torch.equal``.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zo.config.schema import MemoryConfig
from zo.errors import UserError, one_line
from zo.io.determinism import explain_nondeterminism
from zo.method.perturbation import Probe
from zo.model.blocks import callables, find_layout, kind_of, layer_lists, pattern, tied
from zo.model.held import NOTHING, Held, find_held
from zo.model.layout import Layout
from zo.model.reads import Forward, out_of_block_reads
from zo.model.source import ModelSource
from zo.state.log import Log, untrained_header
from zo.streaming.probe_check import SEED, choose_meeting, probed
from zo.streaming.replica import Replica
from zo.streaming.stores import DeviceStore

SCALE = 0.0625
"""Far larger than any eps, so that a wrong probe's weight changes every loss."""


def miniature(model: nn.Module, seed: int = 0) -> nn.Module:
    """Copy the first layers of each list, with small random weights on CPU.

    At least two layers, and one of each kind; what is trained in any layer is trained in the copy's
    layers. The model may be on meta; no large tensor is copied.
    """
    generator = torch.Generator().manual_seed(seed)
    lists, named = layer_lists(model), dict(model.named_parameters(remove_duplicate=False))
    kept = {name: _kinds_seen(members) for name, members in lists.items()}
    left_out = [member for name, members in lists.items() for member in list(members)[kept[name] :]]
    memo: dict[int, object] = {id(member): nn.Identity() for member in left_out}
    skipped = {id(p) for member in left_out for p in member.parameters()}
    trained = {pattern(name, lists) for names in tied(model) for name in names}
    for names in tied(model) + tied(model, trainable=False):
        original = named[names[0]]
        if any(id(named[name]) not in skipped for name in names):
            small = torch.randn(original.shape, generator=generator).mul_(0.05).to(original.dtype)
            is_trained = any(pattern(name, lists) in trained for name in names)
            shared = nn.Parameter(small, requires_grad=is_trained)
            memo.update((id(named[name]), shared) for name in names)
    small_model = copy.deepcopy(model, memo)
    for name, count in kept.items():
        del small_model.get_submodule(name)[count:]  # type: ignore[operator]
    return small_model.eval()


def _kinds_seen(members: nn.ModuleList) -> int:
    """Return the number of first members that include each kind (class, shapes); at least two."""
    kinds = [kind_of(member) for member in members]
    return max(2, 1 + max(kinds.index(kind) for kind in kinds))


@dataclass(frozen=True)
class Checked:
    """What a self-check found."""

    merged: frozenset[str]
    """Modules that are one block with their descendants (see
    :func:`zo.model.blocks.find_layout`)."""
    visits: tuple[str, ...]
    """Modules that enter groups of the layout, in the order of the forward."""
    meet: str = ""
    """See :class:`zo.model.form.Form`."""
    written: frozenset[str] = frozenset()
    """See :class:`zo.model.form.Form`."""
    held: Held = NOTHING
    """Parameters of the small copy that are not trained."""
    resident: frozenset[str] = frozenset()
    """Frozen parameters that no visit can serve (see :func:`zo.model.blocks.find_layout`)."""


def self_check(
    models: Sequence[nn.Module],
    forwards: Sequence[Forward],
    device: torch.device,
    distribution: str,
    unit: str = "layer",
    short: Mapping[torch.dtype, Sequence[Forward]] | None = None,
    may_hold: bool = False,
) -> Checked:
    """Choose the blocks of a model and the form of its probes, and check them.

    Args:
        models: the model to train, after narrower ones of the same structure if there are any; they
            may be on meta.
        forwards: the micro-batches to try.
        device: the device to compute on.
        distribution: of the directions.
        unit: ``layer`` or ``module``.
        short: short micro-batches to try probes with, for a model in float64 and in float32;
            several cells of them are computed at once. By default ``forwards``.
        may_hold: hold parameters that no visit can serve, in place of an error.

    Returns:
        The blocks to merge, the order of the forward, and the form of the probes.

    Raises:
        UserError: a trainable parameter is read outside its layer, which no visit can serve, or a
            copy of the first layers does not run.
    """
    for model in models[:-1]:
        try:
            return _check(miniature(model), forwards, device, distribution, unit, short, may_hold)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError):
            continue  # Not every narrow model can run; the full width decides.
    try:
        return _check(miniature(models[-1]), forwards, device, distribution, unit, short, may_hold)
    except (RuntimeError, ValueError, IndexError):
        _run_plain(miniature(models[-1]), forwards, device)
        raise


def _run_plain(small: nn.Module, forwards: Sequence[Forward], device: torch.device) -> None:
    """Run a small copy as it is.

    Raises:
        UserError: it does not run, or calls an operation that has no deterministic form.
    """
    move_resident(small, device, everything=True)
    try:
        with torch.no_grad(), explain_nondeterminism():
            for forward in forwards:
                forward(small)
    except UserError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            "this model cannot be checked, so it is not trained: a copy of its first layers does "
            f"not run by itself ({one_line(error)})"
        ) from error


def _check(
    small: nn.Module,
    forwards: Sequence[Forward],
    device: torch.device,
    distribution: str,
    unit: str,
    short: Mapping[torch.dtype, Sequence[Forward]] | None,
    may_hold: bool,
) -> Checked:
    merged: frozenset[str] = frozenset()
    lists = layer_lists(small)
    move_resident(small, device, everything=True)
    held = find_held(small, forwards, may_hold)
    resident = _frozen_read_elsewhere(small, forwards)
    while True:
        layout = find_layout(small, unit, merged, resident)
        if unit == "module" and (outside := _merged_for_reads(small, layout, forwards, merged)):
            merged |= outside
            continue
        visited, same = _compare(small, layout, forwards, device, distribution)
        unvisited = next((b for b in layout.blocks if b.index not in visited and b.trainable), None)
        if unvisited is None and same:
            entered = _order_of_visits(small, layout, forwards[0])
            if distribution != "rank-one":
                return Checked(merged, entered, held=held, resident=resident)
            written = _read_outside_their_module(small, forwards, resident)
            short = short or dict.fromkeys((torch.float64, torch.float32), forwards)
            meet = choose_meeting(small, short, device, written, entered, resident)
            form = meet, written if meet else frozenset()
            return Checked(merged, entered, *form, held, resident)
        owners = {
            n.rpartition(".")[0]
            for b in layout.blocks
            for p in b.parts
            if p.rows
            for n in p.parameter.spec.names
        }
        if owners:
            # A product with rows of a matrix may differ in bits from that with the whole matrix.
            merged |= owners
            continue
        tops = {pattern(module, lists) for group in layout.groups for module in group.modules}
        if unit == "module" and not tops <= merged:
            merged |= tops
            continue
        if unvisited is not None:
            raise UserError(
                f"parameter {unvisited.parts[0].parameter.name} is never visited: the forward of "
                f"{unvisited.name} is not called, so its weights are unused or read elsewhere; "
                "leave it out of model.train"
            )
        raise UserError(
            "the model's loss in lockstep differs from its plain forward: a weight is read outside "
            "the module that owns it; this model cannot be trained block by block"
        )


def _order_of_visits(model: nn.Module, layout: Layout, forward: Forward) -> tuple[str, ...]:
    """Return the modules that enter groups, in the order of their first calls."""
    called: dict[str, None] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: called.setdefault(name)
        )
        for group in layout.groups
        for name in group.modules
    ]
    with torch.no_grad():
        forward(model)
    for hook in hooks:
        hook.remove()
    return tuple(called)


def _frozen_read_elsewhere(small: nn.Module, forwards: Sequence[Forward]) -> frozenset[str]:
    """Return frozen parameters that are read outside of the module that a visit would enter."""
    frozen = {name for names in tied(small, trainable=False) for name in names}
    if not frozen:
        return frozenset()
    return frozenset(frozen & out_of_block_reads(small, find_layout(small), forwards))


def _read_outside_their_module(
    small: nn.Module, forwards: Sequence[Forward], resident: frozenset[str]
) -> frozenset[str]:
    """Return the modules, as patterns, that contain a read of a descendant's parameter."""
    found: frozenset[str] = frozenset()
    while True:
        layout = find_layout(small, "module", found, resident)
        more = _merged_for_reads(small, layout, forwards, found)
        if not more:
            return found
        found |= more


def _merged_for_reads(
    small: nn.Module, layout: Layout, forwards: Sequence[Forward], merged: frozenset[str]
) -> frozenset[str]:
    """Return the modules to merge for the reads that are outside of their blocks."""
    outside = out_of_block_reads(small, layout, forwards)
    return frozenset(_merge_up(small, layout, name, merged) for name in outside)


def _merge_up(model: nn.Module, layout: Layout, parameter: str, merged: frozenset[str]) -> str:
    """Return the module to merge so that this parameter is read inside its block.

    Raises:
        UserError: it is read outside its layer.
    """
    lists = layer_lists(model)
    block = next(b for b in layout.blocks for p in b.parts if parameter in p.parameter.spec.names)
    tops = set(layout.group_of[block.index].modules)
    called = set(callables(model))
    entry_module = next(m for m in block.modules if parameter.startswith(f"{m}." if m else ""))
    # A module that reads its own parameter after a child has run must include its children.
    if pattern(entry_module, lists) not in merged and any(
        True for _ in model.get_submodule(entry_module).children()
    ):
        return pattern(entry_module, lists)
    if entry_module in tops:
        raise UserError(
            f"parameter {parameter} is read outside the forward of {entry_module}, which owns it, "
            "so no visit can serve it; use a model without it"
        )
    parent = entry_module.rpartition(".")[0]
    while parent not in called:
        parent = parent.rpartition(".")[0]
    return pattern(parent, lists)


def _compare(
    small: nn.Module,
    layout: Layout,
    forwards: Sequence[Forward],
    device: torch.device,
    distribution: str,
) -> tuple[set[int], bool]:
    """Compare lockstep with plain forwards for two probes.

    Returns:
        The indices of the blocks that lockstep visited; True if all losses are equal in bits.
    """
    replica = Replica(
        small, layout, lambda engine: ModelSource(small), MemoryConfig(), device, Path()
    )
    replica.open(Log(untrained_header(distribution, SEED)))
    probes = [Probe(0, SCALE), Probe(0, -SCALE)]
    cells = [(row, forward) for row in range(len(probes)) for forward in forwards]
    with torch.no_grad():
        in_lockstep = replica.table(
            probes,
            [row for row, _ in cells],
            [lambda forward=f: forward(small) for _, f in cells],  # type: ignore[misc]
        )
        replica.close()
        plain = []
        for probe in probes:
            _write_probe(replica, distribution, probe)
            plain += [forward(small) for forward in forwards]
            replica.binding.forget()
        replica.close()
    same = all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, in_lockstep, strict=True)
    )
    return replica.streamer.visited, same


def _write_probe(replica: Replica, distribution: str, probe: Probe) -> None:
    """Bind every parameter to a perturbed copy of its stored weights, group by group."""
    store = replica.store
    assert isinstance(store, DeviceStore)
    for group, stored in zip(replica.layout.groups, store.groups, strict=True):
        replica.binding.bind(group, probed(group, stored, distribution, probe))


def move_resident(model: nn.Module, device: torch.device, everything: bool = False) -> nn.Module:
    """Move buffers, and frozen parameters outside the layers, to the device: no store has them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise UserError(
                    f"buffer {name} of {type(module).__name__} is computed from weights when the "
                    "model is built, before they are loaded: this model cannot be trained"
                )
            module._buffers[name] = buffer.to(device)
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta" and (everything or not parameter.requires_grad):
                parameter.data = parameter.data.to(device)
    return model
