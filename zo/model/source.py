"""Where a block's weights come from before the first step: a checkpoint's shards, a seed, or a model in memory.

Every store is filled from here block by block, so that no model is ever in memory beside its store.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zo.model.layout import Block, Layout, Part, spans, views


class WeightSource(Protocol):
    """The weights at version 0."""

    is_rereadable: bool
    """Whether it takes no memory to keep it for another read."""

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """Fill ``image``, uint8 on CPU, with a block's bytes from ``start`` (see :func:`zo.model.layout.runs`), else 0."""
        ...

    def is_expensive(self, block: Block) -> bool:
        """Whether a block takes much longer to make than to read."""
        ...

    def clear_cache(self) -> None:
        """Drop what was kept between blocks."""
        ...

    def attach_buffers(self, model: nn.Module) -> None:
        """Give the model that will compute what there is beside parameters."""
        ...


class ModelSource:
    """A user's model, whose weights are in memory: taken out of it once."""

    is_rereadable = False

    def __init__(self, model: nn.Module) -> None:
        """Remember the tensors, not the parameters, which will point elsewhere."""
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
        """Keep everything: a block may have to be made anew."""

    def attach_buffers(self, model: nn.Module) -> None:
        """See :class:`WeightSource`."""


class RandomSource:
    """Weights that transformers would initialise a new model with, a group of the layout at a time.

    Each group has a seed of its own, so that its weights depend on neither the others nor the order of making them.
    """

    is_rereadable = True

    def __init__(self, model: nn.Module, seed: int) -> None:
        """``model``: of transformers; only its structure and configuration are used."""
        self._model, self._seed = model, seed
        self._kept: tuple[int, Tensor] | None = None

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """See :class:`WeightSource`."""
        group = layout.group_of[block.index]
        if self._kept is None or self._kept[0] != group.index:
            self._kept = None
            self._kept = group.index, self._made(group)
        made = {
            part.parameter.name: view for part, view in views(group, group.carve(self._kept[1]))
        }
        image.zero_()
        for part, first, flat in spans(block, image, start):
            flat.copy_(elements_of(part, made[part.parameter.name], first, flat.numel()))

    def _made(self, group: Block) -> Tensor:
        image = torch.zeros(group.size_bytes, dtype=torch.uint8)
        inside = {
            part.parameter.spec.names: view for part, view in views(group, group.carve(image))
        }
        by_name = {name: view for names, view in inside.items() for name in names}
        owners = {name.rpartition(".")[0] for name in by_name}
        # Outermost last, as transformers does: a module may initialise what its children hold.
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
        """The initialiser of the innermost transformers model that holds a module."""
        path = module.split(".") if module else []
        above = [self._model.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)]
        return next(m._init_weights for m in reversed(above) if hasattr(m, "_init_weights"))  # type: ignore[return-value]

    def is_expensive(self, block: Block) -> bool:
        """See :class:`WeightSource`."""
        return True

    def clear_cache(self) -> None:
        """Drop the group that was made last."""
        self._kept = None

    def attach_buffers(self, model: nn.Module) -> None:
        """See :class:`WeightSource`."""


def rows_of(part: Part, whole: Tensor) -> Tensor:
    """The part's rows of a parameter, or of all of it."""
    return whole if part.rows is None else whole[part.rows[0] : part.rows[1]]


def elements_of(part: Part, whole: Tensor, first: int, count: int) -> Tensor:
    """Some elements of a part, flat, of all of its parameter."""
    return rows_of(part, whole).reshape(-1)[first : first + count]


@contextmanager
def filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Put real tensors in the place of a model's parameters for a while."""
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
