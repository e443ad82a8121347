"""Find the blocks of any model, and prove on a small copy that visiting them is the same as a plain forward.

A block is a transformer layer (a member of an outermost ``nn.ModuleList`` whose members are all transformers'
``GradientCheckpointingLayer``) or, outside the layers, the topmost module that owns parameters directly. Modules that
share a parameter are one block with several entrances. No model family is named anywhere.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zo.config import UserError
from zo.layout import Layout, Spec, lay_out
from zo.lockstep import Lockstep
from zo.log import Log
from zo.perturbation import Offset
from zo.replay import Replay
from zo.store import DeviceStore
from zo.streamer import Streamer

SELF_CHECK_SCALE = 0.0625
"""Far larger than any eps, so that a weight of the wrong probe shows in every loss."""

Forward = Callable[[nn.Module], Tensor]
"""A cell of the table as a function of the model: an objective on one micro-batch."""


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of transformer layers, by module name; empty for a model that is not of transformers."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len(module) and all(isinstance(member, GradientCheckpointingLayer) for member in module):
            found[name] = module
    return found


def trainable(model: nn.Module) -> list[tuple[str, ...]]:
    """All names of each trainable parameter, tied ones together, in the model's order."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            # Loaded models tie two Parameter objects on one storage; on meta only identity tells.
            stored = parameter.device.type != "meta" and parameter.numel() > 0
            key = (parameter.data_ptr(), parameter.shape) if stored else id(parameter)
            groups[key].append(name)
    return [tuple(names) for names in groups.values()]


def find_layout(model: nn.Module) -> Layout:
    """Cut a model into blocks and give its trainable parameters their addresses.

    Raises:
        UserError: no parameter is trainable, or one is owned by a module around the layers, which no visit can serve.
    """
    lists = layer_lists(model)
    layers = {f"{name}.{i}" for name, members in lists.items() for i in range(len(members))}
    groups = trainable(model)
    if not groups:
        raise UserError("the model has no trainable parameter; set requires_grad on those to train")
    owners = {name.rpartition(".")[0] for names in groups for name in names}

    def entrance(parameter: str) -> str:
        """The module that a visit waits at for this parameter."""
        path = parameter.split(".")[:-1]
        above = [".".join(path[:n]) for n in range(len(path) + 1)]
        if layer := next((a for a in above if a in layers), None):
            return layer
        if any(name.startswith(f"{above[-1]}." if above[-1] else "") for name in lists):
            raise UserError(
                f"parameter {parameter} belongs to no block: its module {above[-1] or '(root)'} lies around the "
                "transformer layers; freeze it (requires_grad=False) or use a model without it"
            )
        around = [a for a in above if not any(name.startswith(f"{a}." if a else "") for name in lists)]
        return next(a for a in around if a in owners)

    return lay_out(_merge(model, groups, entrance))


def _merge(
    model: nn.Module, groups: Sequence[tuple[str, ...]], entrance: Callable[[str], str]
) -> list[tuple[list[str], list[Spec]]]:
    """Blocks as (entrances, parameters): entrances that share a parameter are joined."""
    named = dict(model.named_parameters(remove_duplicate=False))
    joined: dict[str, list[str]] = {}
    for names in groups:
        members = {m: None for name in names for m in joined.get(entrance(name), [entrance(name)])}
        block = list(members)
        joined.update(dict.fromkeys(block, block))
    blocks: dict[int, tuple[list[str], list[Spec]]] = {}
    for names in groups:
        parameter, modules = named[names[0]], joined[entrance(names[0])]
        spec = Spec(names, tuple(parameter.shape), parameter.dtype)
        blocks.setdefault(id(modules), (modules, []))[1].append(spec)
    return list(blocks.values())


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
    frozen = [(name,) for name, p in named.items() if not p.requires_grad]
    for names in trainable(model) + frozen:
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
    kinds = [(type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters())) for m in members]
    return max(2, 1 + max(kinds.index(kind) for kind in kinds))


def self_check(model: nn.Module, forwards: Sequence[Forward], device: torch.device, distribution: str) -> None:
    """Run the model's miniature in lockstep and by plain forwards, two probes of each, and compare the bits.

    Args:
        model: the model to be trained; it may be on meta.
        forwards: the micro-batches to try.
        device: where to compute.
        distribution: of the directions.

    Raises:
        UserError: a trainable parameter is read outside the forward of its block, so that visits cannot serve it.
    """
    small = move_frozen(miniature(model), device)
    layout = find_layout(small)
    store = DeviceStore(small, layout, device)
    header = {"directions": 1, "seed": 1, "distribution": distribution, "rule": "sgd", "weight_decay": 0.0}
    replay = Replay(store, Log(header))
    probes = [Offset(0, SELF_CHECK_SCALE), Offset(0, -SELF_CHECK_SCALE)]
    cells = [(row, forward) for row in range(len(probes)) for forward in forwards]
    with torch.no_grad():
        plain = list(_plain(small, store, replay, probes, forwards))
        streamer, lockstep = Streamer(replay, device), Lockstep(small, layout)
        streamer.begin(probes, [row for row, _ in cells])
        together = lockstep.run([lambda forward=f: forward(small) for _, f in cells], streamer)  # type: ignore[misc]
    for block in layout.blocks:
        if block.index not in streamer.visited:
            raise UserError(
                f"parameter {block.parameters[0].name} is never visited: the forward of {block.name} is not called, "
                "so its weights are read elsewhere or not at all; freeze it (requires_grad=False)"
            )
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, together, strict=True)):
        raise UserError(
            "the model's loss in lockstep differs from its plain forward: a weight is read outside the module that "
            "owns it; this model cannot be trained block by block"
        )


def _plain(
    model: nn.Module, store: DeviceStore, replay: Replay, probes: Sequence[Offset], forwards: Sequence[Forward]
) -> Iterator[Tensor]:
    """Losses of ordinary forwards of a model whose weights all stand at one probe."""
    blocks = store.layout.blocks
    for probe in probes:
        for block in blocks:
            copies = [
                torch.empty(1, s.numel, dtype=s.dtype, device=t.device)
                for s, t in zip(block.segments, store.segments[block.index], strict=True)
            ]
            replay.visit(block, [probe], copies)
            store.bind(block, [c[0] for c in copies])
        for forward in forwards:
            yield forward(model)
    for block in blocks:
        store.bind(block, store.segments[block.index])


def move_frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """Move what a store does not hold, buffers and frozen parameters, to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(device)
    return model
