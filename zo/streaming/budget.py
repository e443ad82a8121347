"""The memory of a run, in bytes, computed from a model's layout before anything is allocated.

Constructors take their sizes from here, so the sums that a run prints, and a planner, are what is
allocated. Activations are not counted: they depend on the forward, and are freed by PyTorch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from zo.io.engines import PAGE, padded
from zo.model.layout import Block, Layout, Slice

SMALL = 16
"""A block is small if the largest is more than so many times its size."""
PROBES_AT_ONCE = 2
"""Probes whose weights are in scratch memory at once: the two signs of a direction share its z."""
STAGING_BUFFERS = 2
"""Host buffers each way between a disk and a GPU, so that the disk and the link overlap."""
MIB, GIB = 2**20, 2**30


def is_small(size: int, sizes: Sequence[int]) -> bool:
    """Return whether a block of ``size`` bytes has slots among the small ones."""
    return size <= max(sizes) // SMALL


def slot_capacities(sizes: Sequence[int], slots: int) -> list[int]:
    """Return the bytes of each slot: the sizes of the largest blocks, then of small ones."""
    ordered = sorted(sizes, reverse=True)
    large = [size for size in ordered if not is_small(size, sizes)][:slots]
    return large + [size for size in ordered if is_small(size, sizes)][:slots]


def slot_bytes(block_bytes: int, slices: int = 1) -> int:
    """Return the memory of a slot: a page for the header of a file, and slices of whole pages."""
    return PAGE + slices * padded(-(-block_bytes // slices))


def within_slot(slot: Tensor, own: range) -> Tensor:
    """Return some of a block's bytes in a slot's memory."""
    return slot[PAGE + own.start : PAGE + own.stop]


def scratch_bytes(blocks: Sequence[Block]) -> int:
    """Return the memory of written probes: two copies of any block but the largest, or one."""
    sizes = sorted((b.trainable_bytes for b in blocks if b.trainable), reverse=True)
    distinct = sorted(set(sizes), reverse=True)
    return max(sizes[0], PROBES_AT_ONCE * (distinct[1] if len(distinct) > 1 else distinct[0]))


def stored_bytes(layout: Layout, own: Slice) -> int:
    """Return the bytes of all blocks that one rank stores."""
    return sum(len(own.within(block)) for block in layout.blocks)


def file_bytes(kept: range) -> int:
    """Return the size of the file of the bytes that are kept of a block."""
    return PAGE + padded(len(kept))


def disk_bytes(kept: Iterable[range]) -> int:
    """Return the room that a disk store needs.

    A block is written beside its old file, which is kept to write the next one of its size over.

    Args:
        kept: for each block the bytes that are written.
    """
    sizes = [file_bytes(of) for of in kept if of]
    return sum(sizes) + sum(set(sizes))


def activation_bytes(layout: Layout, rows: int, rows_of_fold: int) -> int:
    """Return an estimate of the activations of folds, from above but for attention scores.

    Each fold keeps its hidden states between layers; the fold that computes keeps the outputs of
    all linear layers of a layer.

    Args:
        layout: of the model.
        rows: tokens of all folds of a rank.
        rows_of_fold: tokens of one fold.
    """
    matrices = [
        [part.parameter.spec for part in group.parts if len(part.parameter.spec.shape) == 2]
        for group in layout.groups
    ]
    if not any(matrices):
        return 0
    width = next(specs[0].shape[1] for specs in matrices if specs)
    # A head, a single matrix, computes the few positions that a loss needs.
    layers = [specs for specs in matrices if len(specs) > 1] or matrices
    inner = max(sum(s.shape[0] for s in specs) for specs in layers)
    itemsize = max(spec.dtype.itemsize for specs in matrices for spec in specs)
    return (rows * width + rows_of_fold * inner) * itemsize


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank, by what they are for."""

    device: Mapping[str, int]
    host: Mapping[str, int]
    disk: Mapping[str, int]

    def __str__(self) -> str:
        """``device 6.1 GiB = slots 3.4 + scratch 2.7; host ...``, without what is empty."""
        places = (("device", self.device), ("host", self.host), ("disk", self.disk))
        return "; ".join(_sum(place, parts) for place, parts in places if any(parts.values()))


def _sum(place: str, parts: Mapping[str, int]) -> str:
    total = sum(parts.values())
    unit, bytes_a_unit = ("GiB", GIB) if total >= GIB else ("MiB", MIB)
    terms = " + ".join(f"{name} {size / bytes_a_unit:.1f}" for name, size in parts.items() if size)
    return f"{place} {total / bytes_a_unit:.1f} {unit} = {terms}"


def budget(
    layout: Layout,
    store: str,
    slots: int,
    own: Slice,
    on_host: bool,
    resident_bytes: int,
    rows: tuple[int, int] | None = None,
    cached: int = 0,
) -> Budget:
    """Return what one rank allocates.

    Args:
        layout: of the model.
        store: ``device``, ``host`` or ``disk``.
        slots: ``memory.slots``.
        own: the slice that the rank keeps.
        on_host: whether the device that computes is the host.
        resident_bytes: buffers, and frozen parameters outside the layers.
        rows: where probes are corrections, tokens of all its folds and of one, at most; ``None``
            where probes are written.
        cached: bytes of a key-value cache.
    """
    sizes = [block.size_bytes for block in layout.blocks]
    device = {"scratch": 0 if rows else scratch_bytes(layout.blocks), "buffers": resident_bytes}
    if rows:
        device["activations"] = activation_bytes(layout, *rows)
    device["key-value cache"] = cached
    host: dict[str, int] = {}
    disk: dict[str, int] = {}
    if store == "device":
        device = {"weights": sum(sizes), **device}
    else:
        device = {
            "slots": sum(slot_bytes(c, own.of) for c in slot_capacities(sizes, slots)),
            **device,
        }
    if store == "host":
        host["weights"] = stored_bytes(layout, own)
    if store == "disk":
        # Blocks that are slow to make are kept whole, which only their source knows.
        disk["blocks"] = disk_bytes(own.changing(block) for block in layout.blocks)
        if not on_host:
            host["staging"] = 2 * STAGING_BUFFERS * slot_bytes(max(sizes), own.of)
    return Budget({}, {**device, **host}, disk) if on_host else Budget(device, host, disk)
