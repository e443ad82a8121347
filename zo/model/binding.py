"""Points a model's parameters at memory: slots, scratch or masters; no weight is copied.

Between visits a parameter whose weights lie elsewhere is one not-a-number seen in the parameter's shape: it takes no
memory, tells dtype and device, and shows in every loss if a weight is read outside its visit.
"""

from collections.abc import Iterable, Sequence
from math import nan

import torch
from torch import Tensor, nn

from zo.model.layout import Block, Layout, Placed, views


class Binding:
    """The parameters of one model, by the blocks of a layout."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        """Take the weights out of a model; parameters on meta become ones on the device."""
        self.model, self.layout, self._device = model, layout, device
        self._targets: dict[str, list[nn.Parameter]] = {}
        self.chunks: dict[int, Tensor] = {}
        """For each block that holds rows of a parameter, those rows as they are bound."""
        for group in layout.groups:
            for part in group.parts:
                self._targets[part.parameter.name] = self._take_out(part.parameter)

    def _take_out(self, placed: Placed) -> list[nn.Parameter]:
        """One object for all names of a parameter on meta; the objects that there are for others."""
        named = {name: self.model.get_parameter(name) for name in placed.spec.names}
        empty = self._placeholder(placed)
        if any(p.device.type == "meta" for p in named.values()):
            shared = nn.Parameter(empty, requires_grad=not placed.spec.frozen)
            for name in named:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._parameters[leaf] = shared
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
        """Let the model compute with these flat tensors, one a segment of the block, or its first ones only."""
        for part, view in views(block, segments):
            if part.rows is not None:
                self.chunks[block.index] = view
                continue
            for target in self._targets[part.parameter.name]:
                target.data = view

    def release(self, block: Block) -> None:
        """Forget where a block's weights are."""
        self.chunks.pop(block.index, None)
        for part in block.parts:
            if part.rows is None:
                empty = self._placeholder(part.parameter)
                for target in self._targets[part.parameter.name]:
                    target.data = empty

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Let parameters have these weights, by their first names."""
        for name, tensor in tensors:
            for target in self._targets[name]:
                target.data = tensor
