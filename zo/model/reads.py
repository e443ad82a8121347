"""Watch plain forwards of a model: which parameters they read, and in which modules.

A function mode of torch sees the functions that are given a parameter, not what is done with views
of it afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zo.errors import UserError
from zo.model.layout import Layout

VALUE_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}
"""Properties of a tensor that read its values; the others return metadata."""
METADATA_METHODS = {
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


class _Watch(TorchFunctionMode):
    """Torch function mode that records parameters read, and those outside their own block."""

    def __init__(self, owner: dict[int, int], here: Callable[[], int | None]) -> None:
        super().__init__()
        self._owner, self._here = owner, here
        self.read: set[int] = set()
        self.out_of_block_reads: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _reads_metadata(func):
            for leaf in tree_leaves((args, kwargs or {})):
                if not isinstance(leaf, nn.Parameter):
                    continue
                self.read.add(id(leaf))
                if self._owner.get(id(leaf), self._here()) != self._here():
                    self.out_of_block_reads.add(id(leaf))
        return func(*args, **(kwargs or {}))


def _reads_metadata(func: Any) -> bool:
    """Return True if a function of a tensor reads its shape or type, not its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in VALUE_PROPERTIES
    return name in METADATA_METHODS


def out_of_block_reads(model: nn.Module, layout: Layout, forwards: Sequence[Forward]) -> set[str]:
    """Return the names of parameters that plain forwards read outside their blocks."""
    inside: list[int] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, block=b.index: inside.append(block)
        )
        for b in layout.blocks
        for name in b.modules
    ]
    named = dict(model.named_parameters(remove_duplicate=False))
    # Chunks have no entry module; the module that owns all of them serves them.
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
    return {name for name, p in named.items() if id(p) in watch.out_of_block_reads}


def used(model: nn.Module, forwards: Sequence[Forward]) -> tuple[set[str], set[str]]:
    """Return the names of the modules that plain forwards call and of the parameters they read.

    Raises:
        UserError: a forward writes a parameter, as some models do when they are first evaluated.
    """
    versions = [(name, p, p._version) for name, p in model.named_parameters()]
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, a, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    watch = _Watch({}, lambda: None)
    with torch.no_grad(), watch:
        for forward in forwards:
            forward(model)
    for hook in hooks:
        hook.remove()
    if written := [name for name, p, version in versions if p._version != version]:
        raise UserError(
            f"the model's forward changes its own weights ({written[0]}), which a resumed run "
            "would change twice; turn that off in the model's config.json, or use another model"
        )
    named = model.named_parameters(remove_duplicate=False)
    return called, {name for name, p in named if id(p) in watch.read}
