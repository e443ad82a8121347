"""Weight sources: a block's weights before the first step, from a seed or a model in memory.

A store is filled block by block, so that a second copy of the model is never in memory. The source
that reads checkpoints is in :mod:`zo.model.checkpoint`.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zo.model.layout import Block, Layout, Part, spans, views


class WeightSource(Protocol):
    """The weights at version 0, block by block."""

    is_rereadable: bool
    """True if blocks can be read again later without keeping the model in memory."""

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """Fill ``image`` with a block's bytes from ``start``, and padding with zeros.

        Args:
            block: the block to read.
            layout: the layout that the block belongs to.
            image: uint8 on CPU, of any length up to the rest of the block; modified in place.
            start: a multiple of :data:`zo.model.layout.GRAIN`.
        """
        ...

    def is_expensive(self, block: Block) -> bool:
        """Return True if making a block takes much longer than reading it from a disk."""
        ...

    def clear_cache(self) -> None:
        """Free what is cached between reads."""
        ...

    def attach_buffers(self, model: nn.Module) -> None:
        """Copy everything but parameters (saved buffers, name conversions) to ``model``."""
        ...


class SharedSource:
    """A weight source that several threads read; one at a time."""

    def __init__(self, source: WeightSource) -> None:
        """Serve ``source``."""
        self._source, self._lock = source, Lock()
        self.is_rereadable = source.is_rereadable

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """See :class:`WeightSource`."""
        with self._lock:
            self._source.read(block, layout, image, start)

    def is_expensive(self, block: Block) -> bool:
        """See :class:`WeightSource`."""
        return self._source.is_expensive(block)

    def clear_cache(self) -> None:
        """See :class:`WeightSource`."""
        with self._lock:
            self._source.clear_cache()

    def attach_buffers(self, model: nn.Module) -> None:
        """See :class:`WeightSource`."""
        self._source.attach_buffers(model)


class ModelSource:
    """The weights of a model that is in memory already."""

    is_rereadable = False

    def __init__(self, model: nn.Module) -> None:
        """Keep the tensors; the parameters will be pointed at other memory."""
        self._tensors = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """See :class:`WeightSource`."""
        image.zero_()
        for part, first, flat in spans(block, image, start):
            flat.copy_(elements_of(part, self._tensors[part.parameter.name], first, flat.numel()))

    def is_expensive(self, block: Block) -> bool:
        """See :class:`WeightSource`."""
        return False

    def clear_cache(self) -> None:
        """Do nothing: the tensors are needed if a block must be rebuilt."""

    def attach_buffers(self, model: nn.Module) -> None:
        """See :class:`WeightSource`."""


class RandomSource:
    """Random weights as transformers initialises a new model, one group of the layout at a time.

    Each group has its own seed, so its weights do not depend on other groups or on read order.
    """

    is_rereadable = True

    def __init__(self, model: nn.Module, seed: int) -> None:
        """Use the structure and configuration of a transformers ``model``; it may be on meta."""
        self._model, self._seed = model, seed
        self._cached: tuple[Block, Tensor] | None = None

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """See :class:`WeightSource`."""
        group = layout.group_of[block.index]
        if self._cached is None or self._cached[0] is not group:
            self._cached = None
            self._cached = group, self._initialised(group)
        made = {
            part.parameter.name: view for part, view in views(group, group.carve(self._cached[1]))
        }
        image.zero_()
        for part, first, flat in spans(block, image, start):
            flat.copy_(elements_of(part, made[part.parameter.name], first, flat.numel()))

    def _initialised(self, group: Block) -> Tensor:
        image = torch.zeros(group.size_bytes, dtype=torch.uint8)
        inside = {
            part.parameter.spec.names: view for part, view in views(group, group.carve(image))
        }
        by_name = {name: view for names, view in inside.items() for name in names}
        owners = {name.rpartition(".")[0] for name in by_name}
        # Outermost last, as transformers does: a module may initialise its children's parameters.
        modules = [
            m
            for m, _ in self._model.named_modules()
            if any(o == m or o.startswith(f"{m}.") for o in owners)
        ]
        tops = set(group.modules)
        modules = [
            m
            for m in modules
            if any(m == t or m.startswith(f"{t}." if t else "") for t in tops) or m in owners
        ]
        digest = hashlib.sha256(f"{self._seed} {group.name}".encode()).digest()
        with torch.random.fork_rng([]), filled(self._model, by_name):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            for name in reversed(modules):
                self._initialiser(name)(self._model.get_submodule(name))
        return image

    def _initialiser(self, module: str) -> Callable[[nn.Module], Any]:
        """Return ``_init_weights`` of the innermost transformers model that contains ``module``."""
        path = module.split(".") if module else []
        above = [self._model.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)]
        return next(m._init_weights for m in reversed(above) if hasattr(m, "_init_weights"))  # type: ignore[return-value]

    def is_expensive(self, block: Block) -> bool:
        """See :class:`WeightSource`."""
        return True

    def clear_cache(self) -> None:
        """Free the last initialised group."""
        self._cached = None

    def attach_buffers(self, model: nn.Module) -> None:
        """See :class:`WeightSource`."""


def elements_of(part: Part, values: Tensor, first: int, count: int) -> Tensor:
    """Return ``count`` elements of a part from element ``first``, flat.

    Args:
        part: all rows of a parameter, or some.
        values: the whole parameter.
        first: counted from the part's own first element.
        count: number of elements.
    """
    rows = values if part.rows is None else values[part.rows[0] : part.rows[1]]
    return rows.reshape(-1)[first : first + count]


@contextmanager
def filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Replace a model's parameters, by name, with real tensors inside a ``with`` block."""
    before = []
    shared: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        before.append((module, leaf, module._parameters[leaf]))
        module._parameters[leaf] = shared.setdefault(
            tensor.data_ptr(), nn.Parameter(tensor, requires_grad=False)
        )
    try:
        yield
    finally:
        for module, leaf, parameter in before:
            module._parameters[leaf] = parameter
