"""Cut any model into blocks, the units of a visit.

A layer is a member of an outermost ``nn.ModuleList`` whose members are all transformers'
``GradientCheckpointingLayer``. Layers, and the topmost modules outside them that own parameters
directly, are the groups that define addresses. With unit ``layer`` the groups are the blocks; with
``module`` every module that owns parameters is a block, and a large vocabulary (embedding, head) is
cut into chunks of rows. Modules that share a parameter are one block with several entry modules.
No model family is named anywhere.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zo.errors import UserError
from zo.method.perturbation import ALIGNMENT
from zo.model.layout import Layout, Part, Placed, Spec, cut, lay_out

CHUNK_BYTES = 32 * 2**20
"""Largest chunk of a vocabulary that one block of unit ``module`` holds."""

Grouped = list[tuple[list[str], list[Spec]]]


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of transformer layers, by module name.

    Empty for a model that does not use transformers' layers.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(
            name.startswith(f"{outer}.") for outer in found
        ):
            continue
        if len(module) and all(isinstance(member, GradientCheckpointingLayer) for member in module):
            found[name] = module
    return found


def layer_names(model: nn.Module) -> set[str]:
    """Return the names of all layers."""
    return {
        f"{name}.{i}" for name, members in layer_lists(model).items() for i in range(len(members))
    }


def kind_of(layer: nn.Module) -> tuple[object, ...]:
    """Return what layers of a list have in common if they differ in weights alone."""
    return type(layer), *((n, tuple(p.shape)) for n, p in layer.named_parameters())


def tied(model: nn.Module, trainable: bool | None = True) -> list[tuple[str, ...]]:
    """Return all names of each trainable, frozen, or (``None``) any parameter, in model order.

    The names of a tied parameter form one tuple.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trainable in (None, parameter.requires_grad):
            # Loaded models tie two Parameter objects on one storage; on meta only identity tells.
            stored = parameter.device.type != "meta" and parameter.numel() > 0
            key = (parameter.data_ptr(), parameter.shape) if stored else id(parameter)
            groups[key].append(name)
    return [tuple(names) for names in groups.values()]


def find_layout(
    model: nn.Module,
    unit: str = "layer",
    merged: Collection[str] = (),
    resident: Collection[str] = (),
) -> Layout:
    """Cut a model into blocks and give its trainable parameters their addresses.

    Args:
        model: its parameters may be on meta.
        unit: ``layer`` or ``module``.
        merged: modules that form one block with all their descendants, named as by
            :func:`pattern`.
        resident: frozen parameters outside the layers that no visit can serve; as those of modules
            that contain the layers, they are in no block.

    Raises:
        UserError: no parameter is trainable, or one belongs to a module that contains the layers,
            which no visit can serve.
    """
    names = tied(model)
    if not names:
        raise UserError(
            "the model has no trainable parameter; name those to train with model.train, or set "
            "their requires_grad"
        )
    lists = layer_lists(model)
    layers = layer_names(model)
    called = set(callables(model))
    names += [
        frozen
        for frozen in tied(model, trainable=False)
        if all(
            layer_of(name, layers)
            or not (name in resident or is_around(callers(name, called)[-1], lists))
            for name in frozen
        )
    ]
    names.sort(key=_order(model))
    layout = lay_out(_merge(model, names, _group_entry_module(names, called, lists, layers)))
    if unit == "layer":
        return layout

    def owner(parameter: str) -> str:
        return next(
            (m for m in _modules_above(parameter) if pattern(m, lists) in merged),
            parameter.rpartition(".")[0],
        )

    placed = {p.name: p for g in layout.groups for p in (part.parameter for part in g.parts)}
    pieces: list[tuple[Sequence[str], Sequence[Part]]] = []
    for modules, specs in _merge(model, names, owner):
        parameters = [placed[s.names[0]] for s in specs]
        chunks = _chunks(model, modules, parameters, layers, merged)
        pieces += [((), (chunk,)) for chunk in chunks] or [(modules, [Part(p) for p in parameters])]
    return cut(layout, pieces)


def pattern(module: str, lists: Collection[str]) -> str:
    """Return a module's name with ``*`` for its layer's number: the same module of every layer."""
    within = next((name for name in lists if module.startswith(f"{name}.")), None)
    return module if within is None else within + re.sub(r"^\.\d+", ".*", module[len(within) :])


def _modules_above(parameter: str) -> list[str]:
    """Return the modules that contain a parameter, outermost first."""
    path = parameter.split(".")[:-1]
    return [".".join(path[:n]) for n in range(len(path) + 1)]


def callers(parameter: str, called: Collection[str]) -> list[str]:
    """Return the modules that are called and contain a parameter, outermost first."""
    return [module for module in _modules_above(parameter) if module in called]


def unserved(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the trainable parameters of modules that contain the layers: no visit serves them."""
    lists, called = layer_lists(model), set(callables(model))
    layers = layer_names(model)
    return [
        names
        for names in tied(model)
        if any(
            layer_of(name, layers) is None and is_around(callers(name, called)[-1], lists)
            for name in names
        )
    ]


def layer_of(parameter: str, layers: Collection[str]) -> str | None:
    """Return the layer that contains a parameter; ``None`` if it is outside the layers."""
    return next((m for m in _modules_above(parameter) if m in layers), None)


def is_around(module: str, lists: Collection[str]) -> bool:
    """Return True if a module contains a list of layers."""
    return any(name.startswith(f"{module}." if module else "") for name in lists)


def _order(model: nn.Module) -> Callable[[tuple[str, ...]], int]:
    """Return a sort key that puts groups of names into the model's order."""
    place = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return lambda names: place[names[0]]


def _group_entry_module(
    groups: Sequence[tuple[str, ...]],
    called: Collection[str],
    lists: Collection[str],
    layers: Collection[str],
) -> Callable[[str], str]:
    owners = {callers(name, called)[-1] for names in groups for name in names}

    def entry_module(parameter: str) -> str:
        """Return the module whose forward a visit of this parameter hooks."""
        if layer := layer_of(parameter, layers):
            return layer
        above = callers(parameter, called)
        if is_around(above[-1], lists):
            raise UserError(
                f"parameter {parameter} is not in a block: its module "
                f"{above[-1] or '(root)'} contains the transformer layers; leave it out of "
                "model.train, or use a model without it"
            )
        return next(m for m in above if not is_around(m, lists) and m in owners)

    return entry_module


def _merge(
    model: nn.Module, groups: Sequence[tuple[str, ...]], entry_module: Callable[[str], str]
) -> Grouped:
    """Return blocks as (entry modules, parameters); modules that share a parameter are joined."""
    named = dict(model.named_parameters(remove_duplicate=False))
    joined: dict[str, list[str]] = {}
    for names in groups:
        members = {
            m: None for name in names for m in joined.get(entry_module(name), [entry_module(name)])
        }
        block = list(members)
        joined.update(dict.fromkeys(block, block))
    blocks: dict[int, tuple[list[str], list[Spec]]] = {}
    for names in groups:
        parameter, modules = named[names[0]], joined[entry_module(names[0])]
        spec = Spec(names, tuple(parameter.shape), parameter.dtype, not parameter.requires_grad)
        blocks.setdefault(id(modules), (modules, []))[1].append(spec)
    return list(blocks.values())


def _chunks(
    model: nn.Module,
    modules: Sequence[str],
    parameters: Sequence[Placed],
    layers: Collection[str],
    merged: Collection[str],
) -> list[Part]:
    """Cut a vocabulary's matrix into parts; empty if it is small, or not read row by row."""
    matrix = parameters[0]
    itemsize, shape = matrix.spec.dtype.itemsize, matrix.spec.shape
    if len(parameters) > 1 or len(shape) != 2 or matrix.numel * itemsize <= CHUNK_BYTES:
        return []
    if any(
        m in merged or layer_of(f"{m}.weight", layers) or not read_by_rows(model.get_submodule(m))
        for m in modules
    ):
        return []
    rows = max(ALIGNMENT, CHUNK_BYTES // (shape[1] * itemsize) // ALIGNMENT * ALIGNMENT)
    return [
        Part(matrix, (first, min(first + rows, shape[0]))) for first in range(0, shape[0], rows)
    ]


def read_by_rows(module: nn.Module) -> bool:
    """Return True for a plain embedding or head: each row of its weight gives its own output."""
    # A subclass that overrides forward may read its weight in any way.
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    return type(module) is nn.Linear and module.bias is None


def callables(model: nn.Module) -> Iterator[str]:
    """Yield the names of the modules that are called, which containers are not."""
    for name, module in model.named_modules():
        if not isinstance(
            module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict
        ):
            yield name
