"""Find the blocks of a model that visits can serve, and prove on a small copy that they are the same as a forward.

A block serves only what is read inside its own forward. Each read of a parameter is watched; a block whose
parameters are read elsewhere is coarsened to its parent. Then the copy runs in lockstep and by plain forwards, and
the bits are compared.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zo.config.schema import MemoryConfig
from zo.errors import UserError
from zo.method.perturbation import Probe
from zo.model.blocks import callables, find_layout, layer_lists, pattern, tied
from zo.model.layout import Layout
from zo.model.source import OwnBase
from zo.state.log import Log
from zo.state.replay import Replay
from zo.streaming.replica import Replica
from zo.streaming.stores import DeviceStore

SCALE = 0.0625
"""Far larger than any eps, so that a weight of the wrong probe shows in every loss."""
READING_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}
"""Properties of a tensor that give its values; the others tell of its shape and type."""
ASKING_METHODS = {
    "size",
    "dim",
    "numel",
    "stride",
    "element_size",
    "is_floating_point",
    "get_device",
    "nelement",
}

Forward = Callable[[nn.Module], Tensor]
"""A cell of the table as a function of the model: an objective on one micro-batch."""


def miniature(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with the first layers of each list, at least two and one of each kind, and small random weights on CPU.

    The model itself may be on meta; none of its large tensors is copied.
    """
    generator = torch.Generator().manual_seed(seed)
    lists, named = layer_lists(model), dict(model.named_parameters(remove_duplicate=False))
    kept = {name: _kinds_seen(members) for name, members in lists.items()}
    left_out = [member for name, members in lists.items() for member in list(members)[kept[name] :]]
    memo: dict[int, object] = {id(member): nn.Identity() for member in left_out}
    skipped = {id(p) for member in left_out for p in member.parameters()}
    for names in tied(model) + tied(model, trainable=False):
        original = named[names[0]]
        if any(id(named[name]) not in skipped for name in names):
            small = torch.randn(original.shape, generator=generator).mul_(0.05).to(original.dtype)
            shared = nn.Parameter(small, requires_grad=original.requires_grad)
            memo.update((id(named[name]), shared) for name in names)
    small_model = copy.deepcopy(model, memo)
    for name, count in kept.items():
        del small_model.get_submodule(name)[count:]  # type: ignore[operator]
    return small_model.eval()


def _kinds_seen(members: nn.ModuleList) -> int:
    """How many first members hold one of each kind (class and shapes of parameters); at least two."""
    kinds = [
        (type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters())) for m in members
    ]
    return max(2, 1 + max(kinds.index(kind) for kind in kinds))


def self_check(
    models: Sequence[nn.Module],
    forwards: Sequence[Forward],
    device: torch.device,
    distribution: str,
    unit: str = "layer",
) -> frozenset[str]:
    """Find the blocks of a model, and prove them.

    Args:
        models: the model to be trained, or first a narrower one of the same structure; they may be on meta.
        forwards: the micro-batches to try.
        device: where to compute.
        distribution: of the directions.
        unit: what a block is to be.

    Returns:
        The modules that must be one block with all they hold (see :func:`zo.model.blocks.find_layout`).

    Raises:
        UserError: a trainable parameter is read outside its layer, so that visits cannot serve it.
    """
    for model in models[:-1]:
        try:
            return _check(miniature(model), forwards, device, distribution, unit)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError):
            continue  # Not every model can be made narrower; the model as it is will tell.
    return _check(miniature(models[-1]), forwards, device, distribution, unit)


def _check(
    small: nn.Module,
    forwards: Sequence[Forward],
    device: torch.device,
    distribution: str,
    unit: str,
) -> frozenset[str]:
    whole: frozenset[str] = frozenset()
    lists = layer_lists(small)
    move_resident(small, device, everything=True)
    while True:
        layout = find_layout(small, unit, whole)
        strays = set() if unit == "layer" else _strays(small, layout, forwards)
        if strays:
            whole |= {_coarser(small, layout, name, whole) for name in strays}
            continue
        visited, same = _compare(small, layout, forwards, device, distribution)
        unvisited = next((b for b in layout.blocks if b.index not in visited and b.trainable), None)
        if unvisited is None and same:
            return whole
        owners = {
            n.rpartition(".")[0]
            for b in layout.blocks
            for p in b.parts
            if p.rows
            for n in p.parameter.spec.names
        }
        if owners:
            # Products with a part of a matrix need not have the bits of the product with the whole.
            whole |= owners
            continue
        tops = {pattern(module, lists) for group in layout.groups for module in group.modules}
        if unit == "module" and not tops <= whole:
            whole |= tops
            continue
        if unvisited is not None:
            raise UserError(
                f"parameter {unvisited.parts[0].parameter.name} is never visited: the forward of {unvisited.name} is "
                "not called, so its weights are read elsewhere or not at all; freeze it (requires_grad=False)"
            )
        raise UserError(
            "the model's loss in lockstep differs from its plain forward: a weight is read outside the module that "
            "owns it; this model cannot be trained block by block"
        )


class _Watch(TorchFunctionMode):
    """Notes every parameter that is read while the forward is in another block than its own."""

    def __init__(self, owner: dict[int, int], here: Callable[[], int | None]) -> None:
        super().__init__()
        self._owner, self._here = owner, here
        self.strays: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _only_asks(func):
            for leaf in tree_leaves((args, kwargs or {})):
                if (
                    isinstance(leaf, nn.Parameter)
                    and self._owner.get(id(leaf), self._here()) != self._here()
                ):
                    self.strays.add(id(leaf))
        return func(*args, **(kwargs or {}))


def _only_asks(func: Any) -> bool:
    """Whether a function of a tensor tells its shape or type, and not its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in READING_PROPERTIES
    return name in ASKING_METHODS


def _strays(model: nn.Module, layout: Layout, forwards: Sequence[Forward]) -> set[str]:
    """Parameters that a plain forward reads outside their blocks, by name."""
    inside: list[int] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, block=b.index: inside.append(block)
        )
        for b in layout.blocks
        for name in b.modules
    ]
    named = dict(model.named_parameters(remove_duplicate=False))
    # Chunks are entered by the module that owns them all, and in no other way.
    owner = {
        id(named[name]): b.index
        for b in layout.blocks
        for part in b.parts
        if part.rows is None
        for name in part.parameter.spec.names
    }
    watch = _Watch(owner, lambda: inside[-1] if inside else None)
    with torch.no_grad(), watch:
        for forward in forwards:
            forward(model)
    for hook in hooks:
        hook.remove()
    return {name for name, p in named.items() if id(p) in watch.strays}


def _coarser(model: nn.Module, layout: Layout, parameter: str, whole: frozenset[str]) -> str:
    """The module that must be one block for this parameter to be read inside it.

    Raises:
        UserError: not even its whole layer is.
    """
    lists = layer_lists(model)
    block = next(b for b in layout.blocks for p in b.parts if parameter in p.parameter.spec.names)
    tops = set(layout.group_of[block.index].modules)
    called = set(callables(model))
    entrance = next(m for m in block.modules if parameter.startswith(f"{m}." if m else ""))
    # A module that reads its own parameter when a child has run is to be one block with its children.
    if pattern(entrance, lists) not in whole and any(
        True for _ in model.get_submodule(entrance).children()
    ):
        return pattern(entrance, lists)
    if entrance in tops:
        raise UserError(
            f"parameter {parameter} is read outside the forward of {entrance}, which owns it, so that no visit can "
            "serve it; freeze it (requires_grad=False) or use a model without it"
        )
    parent = entrance.rpartition(".")[0]
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
    """Blocks that were visited, and whether lockstep has the bits of plain forwards, for two probes."""
    header = {
        "directions": 1,
        "seed": 1,
        "distribution": distribution,
        "rule": "sgd",
        "weight_decay": 0.0,
    }
    replica = Replica(small, layout, lambda engine: OwnBase(small), MemoryConfig(), device, Path())
    replica.open(Log(header))
    probes = [Probe(0, SCALE), Probe(0, -SCALE)]
    cells = [(row, forward) for row in range(len(probes)) for forward in forwards]
    with torch.no_grad():
        together = replica.table(
            probes,
            [row for row, _ in cells],
            [lambda forward=f: forward(small) for _, f in cells],  # type: ignore[misc]
        )
        replica.close()
        store, plain = replica.store, []
        assert isinstance(store, DeviceStore)
        for probe in probes:
            for group, masters in zip(layout.groups, store.groups, strict=True):
                copies = [
                    torch.empty(1, s.numel, dtype=s.dtype, device=device) for s in group.trainable
                ]
                Replay(replica.log).visit(group, masters, 0, [probe], copies)
                replica.binding.bind(group, [c[0] for c in copies])
            plain += [forward(small) for forward in forwards]
        replica.close()
    same = all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, together, strict=True)
    )
    return replica.streamer.visited, same


def move_resident(model: nn.Module, device: torch.device, everything: bool = False) -> nn.Module:
    """Move what no store holds, buffers and frozen parameters outside the layers, to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta" and (everything or not parameter.requires_grad):
                parameter.data = parameter.data.to(device)
    return model
