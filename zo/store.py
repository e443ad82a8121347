"""Where the parameters live between visits. Store ``device``: every block in the memory of the compute device.

A store owns the master weights, block by block, one flat tensor a segment, and knows each block's version: the last
log entry applied to it. The model's parameters are views of them. Only ``replay`` writes here once a run has begun.
"""

import ctypes
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from zo.layout import Block, Layout, Placed


def view_of(placed: Placed, segment: Tensor, segment_start: int) -> Tensor:
    """The parameter as a view, in its shape, of the flat tensor of its segment."""
    offset = placed.start - segment_start
    return segment[offset : offset + placed.numel].view(placed.spec.shape)


def allocate(size_bytes: int, device: torch.device) -> Tensor:
    """Zeroed memory for weights: uint8 of shape ``[size_bytes]``."""
    if device.type == "cpu":
        # numpy asks the kernel for huge pages and torch does not: a tenth of a visit's time, and of a forward's.
        return torch.from_numpy(np.zeros(size_bytes, np.uint8))
    return torch.zeros(size_bytes, dtype=torch.uint8, device=device)


def return_freed_memory() -> None:
    """Give what was freed back to the system: glibc keeps freed tensors below 32 MiB, once a model's own."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class DeviceStore:
    """All blocks on one device, as views of which the model computes."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        """Move a model's trainable parameters into flat storage, a block at a time; their values stay."""
        self.layout = layout
        self.versions = [0] * len(layout.blocks)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.targets = {p.name: [named[name] for name in p.spec.names] for p in layout.parameters}
        """For each parameter, the objects in the model that hold it: more than one where it is tied."""
        self.segments: list[list[Tensor]] = []
        for block in layout.blocks:
            # Padding is zeroed: it is stored, replayed and never read by the model.
            flat = [allocate(s.size_bytes, device).view(s.dtype) for s in block.segments]
            self.segments.append(flat)
            for placed, view in self.views(block, flat):
                view.copy_(self.targets[placed.name][0].data)
            self.bind(block, flat)
        return_freed_memory()

    @staticmethod
    def views(block: Block, segments: list[Tensor]) -> Iterator[tuple[Placed, Tensor]]:
        """Every parameter of a block as a view of these flat tensors, one a segment."""
        for segment, flat in zip(block.segments, segments, strict=True):
            for placed in segment.parameters:
                yield placed, view_of(placed, flat, segment.start)

    def bind(self, block: Block, segments: list[Tensor]) -> None:
        """Let the model compute with these flat tensors as the block's weights."""
        for placed, view in self.views(block, segments):
            for target in self.targets[placed.name]:
                target.data = view

    def tensors(self) -> Iterator[tuple[Placed, Tensor]]:
        """Every parameter with its master weights, in address order."""
        for block, flat in zip(self.layout.blocks, self.segments, strict=True):
            yield from self.views(block, flat)

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Take over weights, by name, that stand at one version: a snapshot's."""
        for placed, master in self.tensors():
            master.copy_(tensors[placed.name])
        self.versions = [version] * len(self.versions)

    def fingerprint(self) -> str:
        """SHA-256 of all parameters in address order, as little-endian bytes; equal means equal bits."""
        digest = hashlib.sha256()
        for _, master in self.tensors():
            # Not Tensor.numpy on the values: numpy has no bfloat16.
            digest.update(master.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
