"""The address of every trainable parameter in one flat space, and its cut into blocks.

Groups (layers, and the modules outside them) are in the model's order; inside a group, parameters
with two or more dims come first, then the rest, each in the model's order and on the next multiple
of ``ALIGNMENT``. Addresses depend on the model alone, so they are the same on any machine, mesh or
store. Cutting groups into blocks, the units of a visit, changes no address. Pure arithmetic: no
tensor is read.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from zo.method.passes import Matrices
from zo.method.perturbation import ALIGNMENT

LINE = 512
"""Bytes; a block's segments begin on multiples of it, which every dtype is aligned to."""
GRAIN = 4096
"""Bytes; a block is sliced on multiples of it: the page that direct I/O and page locking need."""


@dataclass(frozen=True)
class Spec:
    """One parameter without an address."""

    names: tuple[str, ...]
    """All its names in the model, more than one if it is tied; the first identifies it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    frozen: bool = False
    """True if it is read at a visit but never perturbed or written; it has no address in z."""

    @property
    def size_bytes(self) -> int:
        """Stored size in bytes, without padding."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Placed:
    """One parameter and its address; frozen parameters are numbered apart, only for their order."""

    spec: Spec
    start: int

    @property
    def name(self) -> str:
        """First of its names."""
        return self.spec.names[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.spec.shape)

    @property
    def stop(self) -> int:
        """Address after its last element, rounded up to the alignment."""
        return self.start + -(-self.numel // ALIGNMENT) * ALIGNMENT

    @property
    def decays(self) -> bool:
        """True if weight decay applies: not to biases and norms, below two dims (as MeZO)."""
        return len(self.spec.shape) >= 2


@dataclass(frozen=True)
class Part:
    """Rows of a parameter in one block: all of them, unless a vocabulary is cut into chunks."""

    parameter: Placed
    rows: tuple[int, int] | None = None
    """First row and the row after the last; ``None`` for the whole parameter."""

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self.parameter.start + (self.rows[0] * self._width if self.rows else 0)

    @property
    def stop(self) -> int:
        """Address after its last element, padding included."""
        last = self.rows is None or self.rows[1] == self.parameter.spec.shape[0]
        return self.parameter.stop if last else self.parameter.start + self.rows[1] * self._width  # type: ignore[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of these rows."""
        shape = self.parameter.spec.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    @property
    def numel(self) -> int:
        """Number of elements, padding left out."""
        return prod(self.shape)

    @property
    def _width(self) -> int:
        return prod(self.parameter.spec.shape[1:])


@dataclass(frozen=True)
class Segment:
    """Adjacent parts of a block with one dtype and one decay rule: one tensor, one kernel call."""

    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self.parts[0].start

    @property
    def numel(self) -> int:
        """Elements, the padding between parameters included."""
        return self.parts[-1].stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype."""
        return self.parts[0].parameter.spec.dtype

    @property
    def decays(self) -> bool:
        """True if weight decay applies."""
        return self.parts[0].parameter.decays

    @cached_property
    def matrices(self) -> tuple[Matrices, ...]:
        """Its parameters with two or more dims, each whole even if a part has only rows of it."""
        parameters = dict.fromkeys(part.parameter for part in self.parts)
        return tuple(
            Matrices(p.start, p.numel, *p.spec.shape[-2:])
            for p in parameters
            if len(p.spec.shape) >= 2 and p.numel > 0
        )

    @property
    def frozen(self) -> bool:
        """True if its parameters are never changed."""
        return self.parts[0].parameter.spec.frozen

    @property
    def size_bytes(self) -> int:
        """Stored size in bytes, a multiple of ``LINE``."""
        return -(-self.numel * self.dtype.itemsize // LINE) * LINE


@dataclass(frozen=True)
class Block:
    """The unit of streaming; one visit serves one block. Its segments are stored in order."""

    index: int
    modules: tuple[str, ...]
    """Modules whose forward enters it: several if they share a parameter, none for a chunk."""
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """Name of its first module, or of its rows."""
        if self.modules:
            return self.modules[0] or "(root)"
        rows = self.parts[0].rows
        return self.parts[0].parameter.name + (f"[{rows[0]}:{rows[1]}]" if rows else "")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Its parts as runs of one kind, in address order, frozen ones last."""
        runs: list[list[Part]] = []
        for part in sorted(self.parts, key=lambda p: (p.parameter.spec.frozen, p.start)):
            before = runs[-1][-1] if runs else None
            if before is not None and before.stop == part.start and _kind(before) == _kind(part):
                runs[-1].append(part)
            else:
                runs.append([part])
        return tuple(Segment(tuple(run)) for run in runs)

    @cached_property
    def trainable(self) -> tuple[Segment, ...]:
        """The segments that are perturbed and updated; they come first."""
        return tuple(s for s in self.segments if not s.frozen)

    @cached_property
    def size_bytes(self) -> int:
        """Stored size in bytes, frozen parameters included."""
        return sum(s.size_bytes for s in self.segments)

    @cached_property
    def trainable_bytes(self) -> int:
        """Stored size in bytes of its trainable segments."""
        return sum(s.size_bytes for s in self.trainable)

    def carve(self, image: Tensor) -> list[Tensor]:
        """View a block's bytes, uint8 of shape ``[size_bytes]``, as a flat tensor per segment."""
        carved, start = [], 0
        for segment in self.segments:
            carved.append(
                image[start : start + segment.numel * segment.dtype.itemsize].view(segment.dtype)
            )
            start += segment.size_bytes
        return carved


@dataclass(frozen=True)
class Slice:
    """Slice ``index`` of ``of`` equal slices of every block (the last is shorter); one rank's."""

    index: int = 0
    of: int = 1

    def stride(self, block: Block) -> int:
        """Return the bytes between the starts of two slices, a multiple of ``GRAIN``."""
        return -(-block.size_bytes // (self.of * GRAIN)) * GRAIN

    def within(self, block: Block) -> range:
        """Return this slice's bytes of a block; empty if there are fewer grains than slices."""
        start = min(self.index * self.stride(block), block.size_bytes)
        return range(start, min(start + self.stride(block), block.size_bytes))

    def changing(self, block: Block) -> range:
        """Return the first bytes of the slice, whole grains, beyond which nothing is trained."""
        own, trained = self.within(block), -(-block.trainable_bytes // GRAIN) * GRAIN
        return range(own.start, max(own.start, min(own.stop, trained)))


WHOLE = Slice()


def runs(block: Block, image: Tensor, start: int = 0) -> Iterator[tuple[Segment, int, Tensor]]:
    """Yield the segments in a range of a block's bytes.

    Each as (segment, index of its first element in the range, flat view of its elements there).

    Args:
        block: the block.
        image: uint8, the block's bytes from ``start``.
        start: a multiple of ``GRAIN``.
    """
    begin = 0
    for segment in block.segments:
        if (found := _overlap(image, start, begin, segment.numel, segment.dtype)) is not None:
            yield segment, *found
        begin += segment.size_bytes


def spans(block: Block, image: Tensor, start: int = 0) -> Iterator[tuple[Part, int, Tensor]]:
    """Yield the parts in a range of a block's bytes, without padding; like :func:`runs`."""
    begin = 0
    for segment in block.segments:
        for part in segment.parts:
            offset = (part.start - segment.start) * segment.dtype.itemsize
            if (
                found := _overlap(image, start, begin + offset, part.numel, segment.dtype)
            ) is not None:
                yield part, *found
        begin += segment.size_bytes


def _overlap(
    image: Tensor, start: int, begin: int, numel: int, dtype: torch.dtype
) -> tuple[int, Tensor] | None:
    first, stop = max(start, begin), min(start + image.numel(), begin + numel * dtype.itemsize)
    if first >= stop:
        return None
    return (first - begin) // dtype.itemsize, image[first - start : stop - start].view(dtype)


def _kind(part: Part) -> tuple[torch.dtype, bool, bool]:
    return part.parameter.spec.dtype, part.parameter.decays, part.parameter.spec.frozen


def views(block: Block, segments: Sequence[Tensor]) -> Iterable[tuple[Part, Tensor]]:
    """Yield every part of a block as a view, in its shape, of flat tensors, one per segment."""
    for segment, flat in zip(block.segments, segments, strict=False):
        for part in segment.parts:
            offset = part.start - segment.start
            yield part, flat[offset : offset + part.numel].view(part.shape)


@dataclass(frozen=True)
class Layout:
    """The blocks of a model, and the groups that define addresses."""

    groups: tuple[Block, ...]
    """Layers, and modules outside them, as blocks of whole parameters."""
    blocks: tuple[Block, ...] = field(default=())
    """The units of a visit: the groups themselves, or their pieces."""

    @property
    def parameters(self) -> Iterable[Placed]:
        """Every trainable parameter, in address order."""
        return (
            part.parameter
            for g in self.groups
            for part in g.parts
            if not part.parameter.spec.frozen
        )

    @property
    def numel(self) -> int:
        """Number of trainable elements, padding left out."""
        return sum(p.numel for p in self.parameters)

    @cached_property
    def group_of(self) -> Mapping[int, Block]:
        """The group that contains each block, by the block's index."""
        owner = {part.parameter.name: group for group in self.groups for part in group.parts}
        return {block.index: owner[block.parts[0].parameter.name] for block in self.blocks}

    @cached_property
    def digest(self) -> str:
        """Hash of the cut into blocks; blocks stored under another digest cannot be read."""
        described = [
            [(p.parameter.spec, p.start, p.rows) for p in block.parts] for block in self.blocks
        ]
        return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def lay_out(groups: Sequence[tuple[Sequence[str], Sequence[Spec]]]) -> Layout:
    """Assign an address to every parameter; the groups are the blocks.

    Args:
        groups: entry modules and parameters of each, in the model's order.
    """
    placed, address, frozen_address = [], 0, 0
    for index, (modules, specs) in enumerate(groups):
        parts = []
        for spec in sorted(specs, key=lambda s: (s.frozen, len(s.shape) < 2)):
            parameter = Placed(spec, frozen_address if spec.frozen else address)
            parts.append(Part(parameter))
            if spec.frozen:
                frozen_address = parameter.stop
            else:
                address = parameter.stop
        placed.append(Block(index, tuple(modules), tuple(parts)))
    return Layout(tuple(placed), tuple(placed))


def cut(layout: Layout, pieces: Sequence[tuple[Sequence[str], Sequence[Part]]]) -> Layout:
    """Return the layout with other blocks, each from its entry modules and parts.

    Addresses do not change.
    """
    blocks = tuple(
        Block(i, tuple(modules), tuple(parts)) for i, (modules, parts) in enumerate(pieces)
    )
    elements = [
        sum(s.numel for block in cut for s in block.segments) for cut in (blocks, layout.groups)
    ]
    assert elements[0] == elements[1]
    return Layout(layout.groups, blocks)
