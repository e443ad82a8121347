"""Where every trainable parameter lies: one flat address space, cut into blocks.

Blocks follow one another in the order of the model; inside a block, parameters with two or more dims come first, then
the rest, each group in the model's order and each parameter on the next multiple of ``ALIGNMENT``. The order depends on
the model alone, so an address names the same weight on any machine, mesh or store. Pure arithmetic: no tensor is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

import torch

from zo.perturbation import ALIGNMENT


@dataclass(frozen=True)
class Spec:
    """One trainable parameter before it is placed."""

    names: tuple[str, ...]
    """All its names in the model; more than one where it is tied, the first one counts."""
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Placed:
    """One trainable parameter and its address."""

    spec: Spec
    start: int

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.spec.names[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.spec.shape)

    @property
    def stop(self) -> int:
        """The address after its last element, rounded up to the alignment."""
        return self.start + -(-self.numel // ALIGNMENT) * ALIGNMENT

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: not to biases and norms, which have fewer than two dims (as MeZO)."""
        return len(self.spec.shape) >= 2


@dataclass(frozen=True)
class Segment:
    """A run of a block's parameters with one stored dtype and one rule of decay: one tensor, one kernel call."""

    parameters: tuple[Placed, ...]

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self.parameters[0].start

    @property
    def numel(self) -> int:
        """Elements, the padding between parameters included."""
        return self.parameters[-1].stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype."""
        return self.parameters[0].spec.dtype

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.parameters[0].decays

    @property
    def size_bytes(self) -> int:
        """Stored size in bytes, a multiple of 256."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """The unit of streaming: what one visit brings."""

    index: int
    modules: tuple[str, ...]
    """The modules whose forward enters it; more than one where they share a parameter."""
    parameters: tuple[Placed, ...]

    @property
    def name(self) -> str:
        """The name of its first module."""
        return self.modules[0] or "(root)"

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Its parameters as runs of equal dtype and decay, in address order."""
        runs = groupby(self.parameters, key=lambda p: (p.spec.dtype, p.decays))
        return tuple(Segment(tuple(run)) for _, run in runs)

    @property
    def size_bytes(self) -> int:
        """Stored size in bytes."""
        return sum(s.size_bytes for s in self.segments)


@dataclass(frozen=True)
class Layout:
    """All blocks of a model, in address order."""

    blocks: tuple[Block, ...]

    @property
    def parameters(self) -> Iterable[Placed]:
        """Every trainable parameter, in address order."""
        return (p for b in self.blocks for p in b.parameters)

    @property
    def numel(self) -> int:
        """Number of trainable elements, padding left out."""
        return sum(p.numel for p in self.parameters)

    @property
    def largest_block_bytes(self) -> int:
        """Stored size of the largest block, in bytes."""
        return max(b.size_bytes for b in self.blocks)


def lay_out(blocks: Sequence[tuple[Sequence[str], Sequence[Spec]]]) -> Layout:
    """Give every parameter its address.

    Args:
        blocks: for each block, in the order of the model: the modules that enter it, and its parameters.
    """
    placed_blocks, address = [], 0
    for index, (modules, specs) in enumerate(blocks):
        placed = []
        for spec in sorted(specs, key=lambda s: len(s.shape) < 2):
            placed.append(Placed(spec, address))
            address = placed[-1].stop
        placed_blocks.append(Block(index, tuple(modules), tuple(placed)))
    return Layout(tuple(placed_blocks))
