"""Where every trainable parameter lies: one flat address space, cut into blocks.

Groups (layers, and the modules around them) follow one another in the order of the model; inside a group, parameters
with two or more dims come first, then the rest, each in the model's order and each on the next multiple of
``ALIGNMENT``. That depends on the model alone, so an address names the same weight on any machine, mesh or store.
How groups are cut into blocks, the units of a visit, changes no address. Pure arithmetic: no tensor is read.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from zo.method.perturbation import ALIGNMENT

LINE = 512
"""Bytes; a block's segments begin on multiples of it, so that a cut there is on the alignment of every dtype."""
GRAIN = 4096
"""Bytes; slices of a block are cut on multiples of it: pages, which direct I/O and page locking want."""


@dataclass(frozen=True)
class Spec:
    """One parameter before it is placed."""

    names: tuple[str, ...]
    """All its names in the model; more than one where it is tied, the first one counts."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    frozen: bool = False
    """Read at a visit, never perturbed, never written; it has no address in the space of z."""

    @property
    def size_bytes(self) -> int:
        """Stored size in bytes, without padding."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Placed:
    """One parameter and its address; a frozen one's address only orders it among the frozen."""

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
class Part:
    """Rows of a parameter that one block holds: all of them, but for a vocabulary that is cut into chunks."""

    parameter: Placed
    rows: tuple[int, int] | None = None
    """First row and the one after the last, of a matrix; ``None`` for the whole parameter."""

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self.parameter.start + (self.rows[0] * self._width if self.rows else 0)

    @property
    def stop(self) -> int:
        """The address after its last element, padding included."""
        last = self.rows is None or self.rows[1] == self.parameter.spec.shape[0]
        return self.parameter.stop if last else self.parameter.start + self.rows[1] * self._width  # type: ignore[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of these rows."""
        whole = self.parameter.spec.shape
        return whole if self.rows is None else (self.rows[1] - self.rows[0], *whole[1:])

    @property
    def numel(self) -> int:
        """Number of elements, padding left out."""
        return prod(self.shape)

    @property
    def _width(self) -> int:
        return prod(self.parameter.spec.shape[1:])


@dataclass(frozen=True)
class Segment:
    """A run of a block's parts with adjoining addresses, one dtype, one rule of decay: one tensor, one kernel call."""

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
        """Whether weight decay applies."""
        return self.parts[0].parameter.decays

    @property
    def frozen(self) -> bool:
        """Whether its parameters are never changed."""
        return self.parts[0].parameter.spec.frozen

    @property
    def size_bytes(self) -> int:
        """Stored size in bytes, whole lines."""
        return -(-self.numel * self.dtype.itemsize // LINE) * LINE


@dataclass(frozen=True)
class Block:
    """The unit of streaming: what one visit brings. In memory and on disk its segments lie one after another."""

    index: int
    modules: tuple[str, ...]
    """The modules whose forward enters it; more than one where they share a parameter, none for a chunk."""
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The name of its first module, or of the rows that it holds."""
        if self.modules:
            return self.modules[0] or "(root)"
        rows = self.parts[0].rows
        return self.parts[0].parameter.name + (f"[{rows[0]}:{rows[1]}]" if rows else "")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Its parts as runs of equal kind, in address order, the frozen ones last."""
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
        """The segments that are perturbed and changed: the first ones."""
        return tuple(s for s in self.segments if not s.frozen)

    @cached_property
    def size_bytes(self) -> int:
        """Stored size in bytes, frozen parameters included."""
        return sum(s.size_bytes for s in self.segments)

    @cached_property
    def trainable_bytes(self) -> int:
        """Stored size in bytes of what is perturbed."""
        return sum(s.size_bytes for s in self.trainable)

    def carve(self, image: Tensor) -> list[Tensor]:
        """A block's bytes, uint8 of shape ``[size_bytes]``, as one flat tensor of its dtype for each segment."""
        carved, start = [], 0
        for segment in self.segments:
            carved.append(
                image[start : start + segment.numel * segment.dtype.itemsize].view(segment.dtype)
            )
            start += segment.size_bytes
        return carved


@dataclass(frozen=True)
class Slice:
    """The part of every block that one rank keeps: number ``index`` of ``of``, of equal size but at a block's end."""

    index: int = 0
    of: int = 1

    def stride(self, block: Block) -> int:
        """Bytes from one slice's start to the next one's, whole grains."""
        return -(-block.size_bytes // (self.of * GRAIN)) * GRAIN

    def within(self, block: Block) -> range:
        """The bytes of a block that are this slice; none where a block has fewer grains than slices."""
        start = min(self.index * self.stride(block), block.size_bytes)
        return range(start, min(start + self.stride(block), block.size_bytes))


WHOLE = Slice()


def runs(block: Block, image: Tensor, start: int = 0) -> Iterator[tuple[Segment, int, Tensor]]:
    """What bytes of a block hold: segment, number of its first element there, and a flat view of those that are.

    Args:
        block: which one.
        image: uint8, the block's bytes from ``start``.
        start: a multiple of ``GRAIN``.
    """
    begin = 0
    for segment in block.segments:
        if (found := _overlap(image, start, begin, segment.numel, segment.dtype)) is not None:
            yield segment, *found
        begin += segment.size_bytes


def spans(block: Block, image: Tensor, start: int = 0) -> Iterator[tuple[Part, int, Tensor]]:
    """As :func:`runs`, part by part, which leaves padding out."""
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
    """Every part of a block, in its shape, as a view of these flat tensors, one a segment."""
    for segment, flat in zip(block.segments, segments, strict=False):
        for part in segment.parts:
            offset = part.start - segment.start
            yield part, flat[offset : offset + part.numel].view(part.shape)


@dataclass(frozen=True)
class Layout:
    """All blocks of a model, and the groups that gave them their addresses."""

    groups: tuple[Block, ...]
    """Layers, and modules around them, as blocks of whole parameters."""
    blocks: tuple[Block, ...] = field(default=())
    """The units of a visit: the groups themselves, or what they are cut into."""

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
        """The group that each block, by index, is a piece of."""
        owner = {part.parameter.name: group for group in self.groups for part in group.parts}
        return {block.index: owner[block.parts[0].parameter.name] for block in self.blocks}

    @cached_property
    def digest(self) -> str:
        """What tells layouts apart: a block's bytes mean nothing under another."""
        said = [[(p.parameter.spec, p.start, p.rows) for p in block.parts] for block in self.blocks]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def lay_out(groups: Sequence[tuple[Sequence[str], Sequence[Spec]]]) -> Layout:
    """Give every parameter its address; blocks are the groups.

    Args:
        groups: in the order of the model: the modules that enter one, and its parameters.
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
    """The same addresses in other blocks: for each, the modules that enter it and what it holds."""
    blocks = tuple(
        Block(i, tuple(modules), tuple(parts)) for i, (modules, parts) in enumerate(pieces)
    )
    elements = [
        sum(s.numel for block in cut for s in block.segments) for cut in (blocks, layout.groups)
    ]
    assert elements[0] == elements[1]
    return Layout(layout.groups, blocks)
