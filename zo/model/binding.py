"""Point a model's parameters at memory (slots, scratch or stored weights) without copying.

Between visits a streamed parameter is a single NaN expanded to its shape: it takes no memory, has
the right dtype and device, and makes every loss NaN if a weight is read outside its visit.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import nan

import torch
from torch import Tensor, nn

from zo.model.layout import Block, Layout, Placed, Spec, views


class Binding:
    """The parameters of one model, bound and released block by block."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        """Replace the weights of a model by placeholders; parameters on meta move to ``device``."""
        self.model, self.layout, self._device = model, layout, device
        self._targets: dict[str, list[nn.Parameter]] = {}
        self.chunks: dict[int, Tensor] = {}
        """Bound rows of a parameter, by the index of the block that holds only these rows."""
        self._placeholders: dict[str, Tensor] = {}
        self._views: dict[tuple[int, int, int], list[tuple[nn.Parameter | None, Tensor]]] = {}
        """For a block and the memory that it was bound to, each parameter and its view of it."""
        for group in layout.groups:
            for part in group.parts:
                placed = part.parameter
                self._placeholders[placed.name] = self._placeholder(placed)
                self._targets[placed.name] = self._take_out(placed)

    def _take_out(self, placed: Placed) -> list[nn.Parameter]:
        """Return the objects that stand for a parameter: one new object if it is on meta."""
        named = {name: self.model.get_parameter(name) for name in placed.spec.names}
        empty = self._placeholders[placed.name]
        if any(p.device.type == "meta" for p in named.values()):
            shared = nn.Parameter(empty, requires_grad=not placed.spec.frozen)
            self._stand_for(placed.spec, shared)
            return [shared]
        objects = list({id(p): p for p in named.values()}.values())
        for parameter in objects:
            parameter.data = empty.to(parameter.device).expand(parameter.shape)
        return objects

    def _placeholder(self, placed: Placed) -> Tensor:
        return torch.full((), nan, dtype=placed.spec.dtype, device=self._device).expand(
            placed.spec.shape
        )

    def bind(self, block: Block, segments: Sequence[Tensor]) -> None:
        """Point a block's parameters at flat tensors, one per segment.

        The list may end early: then only the first segments are bound. A block is bound to the same
        memory in every step (its place, a slot, scratch), so the views of it are kept.
        """
        if not segments:
            return
        # Groups and blocks are both numbered from 0: the object tells them apart.
        key = id(block), segments[0].data_ptr(), len(segments)
        if key not in self._views:
            self._views[key] = [
                (target, view)
                for part, view in views(block, segments)
                for target in ([None] if part.rows else self._targets[part.parameter.name])
            ]
        for target, view in self._views[key]:
            if target is None:
                self.chunks[block.index] = view
            else:
                target.data = view

    def forget(self) -> None:
        """Drop the views that are kept, and so the memory that only they refer to."""
        self._views.clear()

    def release(self, block: Block) -> None:
        """Point a block's parameters back at placeholders."""
        self.chunks.pop(block.index, None)
        for part in block.parts:
            if part.rows is None:
                for target in self._targets[part.parameter.name]:
                    target.data = self._placeholders[part.parameter.name]

    def hold(self, spec: Spec, values: Tensor) -> None:
        """Give a parameter that is in no block its weights; one that is not on meta has them."""
        if self.model.get_parameter(spec.names[0]).device.type == "meta":
            shared = nn.Parameter(values.to(self._device), requires_grad=False)
            self._stand_for(spec, shared)

    def _stand_for(self, spec: Spec, shared: nn.Parameter) -> None:
        """Let one object be a parameter under all of its names."""
        for name in spec.names:
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = shared

    def stored(self, parameter: Placed) -> Tensor:
        """Return the weights that a parameter is bound to."""
        return self._targets[parameter.name][0].data

    @contextmanager
    def replaced(self, parameters: Sequence[Placed], values: Sequence[Tensor]) -> Iterator[None]:
        """Bind parameters to other weights for a time."""
        targets = [target for p in parameters for target in self._targets[p.name]]
        new = [v for p, v in zip(parameters, values, strict=True) for _ in self._targets[p.name]]
        before = [target.data for target in targets]
        try:
            for target, value in zip(targets, new, strict=True):
                target.data = value
            yield
        finally:
            for target, value in zip(targets, before, strict=True):
                target.data = value

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Point parameters, by first name, at these tensors."""
        for name, tensor in tensors:
            for target in self._targets[name]:
                target.data = tensor
