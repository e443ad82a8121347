"""The fingerprint of a model: one hash of all parameters, that many ranks and threads compute together.

Every parameter's bytes are cut into leaves of ``LEAF_BYTES``; each leaf has a BLAKE3 digest, and the fingerprint is the
BLAKE3 hash of all digests in address order, with names, shapes and dtypes. A leaf depends on nothing but the parameter:
store, unit, slices and mesh decide only who hashes it. A rank hashes the leaves that begin in its own bytes, so a
start-up reads every byte once a node, and the ranks exchange 32 bytes a leaf, 1/8192 of the model.

BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020) is as collision-resistant as SHA-256; over leaves of 256 KiB it
hashes 4.3 GB/s a core where SHA-256 with the processor's own instructions does 1.8 (2 cores of an AMD EPYC).
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from blake3 import blake3
from torch import Tensor

from zo.model.layout import WHOLE, Block, Layout, Part, Slice, Spec, spans, views

LEAF_BYTES = 256 * 2**10
"""Bytes of a parameter that share a digest. Smaller ones are more to exchange, and slower to hash: 1.7 GB/s at 4 KiB;
larger ones are more that a rank reads of its neighbour's slice, half of one a block on average."""
DIGEST_BYTES = 32
_ROOT = "zo 2026-11-24 fingerprint of a model"
"""Keeps the root's hash apart from a leaf's (BLAKE3's key derivation)."""

Read = Callable[[Block, Layout, Tensor, int], None]
"""Fills uint8 memory with a block's bytes from a start (see :meth:`zo.model.source.WeightSource.read`)."""


class Fingerprint:
    """The digests of a model's leaves, in address order; equal hashes of all of them mean equal bits.

    Trainable parameters come in the order of their addresses, then the frozen ones by name. Bytes of one leaf must be
    added in their order; leaves may be in any.
    """

    def __init__(self, layout: Layout, resident: Sequence[Spec] = (), share: Slice = WHOLE) -> None:
        """Make room for every leaf's digest.

        Args:
            layout: of the model.
            resident: the frozen parameters that are in no block.
            share: which leaves to hash of those that are added, every ``of``-th one; the others are passed over.
        """
        self._layout, self._share = layout, share
        frozen = [
            p.parameter.spec for g in layout.groups for p in g.parts if p.parameter.spec.frozen
        ]
        trainable = [p.spec for p in layout.parameters]
        self._specs = trainable + sorted([*frozen, *resident], key=lambda spec: spec.names[0])
        self._first: dict[str, int] = {}
        """For each parameter the row of its first leaf."""
        rows = 0
        for spec in self._specs:
            self._first[spec.names[0]] = rows
            rows += -(-spec.size_bytes // LEAF_BYTES)
        self.digests = torch.zeros(rows, DIGEST_BYTES, dtype=torch.uint8)
        """One row a leaf, zeros where it is not known; uint8 of shape ``[leaves, 32]``."""
        self._begun: dict[int, tuple[blake3, Spec, int]] = {}
        """By row: a leaf that waits for its next bytes, the parameter, and where in it these begin."""

    def add(self, block: Block, image: Tensor, start: int = 0) -> None:
        """Take in a block's bytes from ``start``, uint8 on CPU; a leaf that began elsewhere is passed over."""
        for part, first, flat in spans(block, image, start):
            self._take(part.parameter.spec, _offset(part) + first * flat.dtype.itemsize, flat)

    def add_segments(self, block: Block, segments: Sequence[Tensor]) -> None:
        """Take in a whole block, one flat tensor a segment, on any device."""
        for part, view in views(block, segments):
            self._take(
                part.parameter.spec, _offset(part), view.detach().cpu().contiguous().view(-1)
            )

    def add_parameter(self, spec: Spec, values: Tensor) -> None:
        """Take in a whole parameter."""
        self._take(spec, 0, values.detach().cpu().contiguous().view(-1))

    def complete(self, read: Read) -> None:
        """Read what is missing of leaves that were begun: bytes that other ranks, or later blocks, hold."""
        for spec, at, stop in [
            (spec, at, _leaf_end(spec, at)) for _, spec, at in self._begun.values()
        ]:
            for block, part, begin in self._where[spec.names[0]]:
                offset = _offset(part)
                first, last = max(at, offset), min(stop, offset + part.numel * spec.dtype.itemsize)
                if first < last:
                    missing = torch.empty(last - first, dtype=torch.uint8)
                    read(block, self._layout, missing, begin + first - offset)
                    self._take(spec, first, missing)
        assert not self._begun

    def take_over(self, other: "Fingerprint", frozen: bool = False) -> None:
        """Take over the digests that another one of the same model has; of ``frozen`` parameters alone, if so."""
        for spec in self._specs:
            if (spec.frozen or not frozen) and spec.names[0] in other._first:
                rows = -(-spec.size_bytes // LEAF_BYTES)
                theirs = other.digests[other._first[spec.names[0]] :][:rows]
                self.digests[self._first[spec.names[0]] :][:rows].copy_(theirs)

    def hexdigest(self) -> str:
        """Return the hash of all leaves, 64 hexadecimal digits; every leaf must be known."""
        assert not self._begun and bool(self.digests.any(1).all())
        root = blake3(derive_key_context=_ROOT)
        for spec in self._specs:
            root.update(json.dumps([spec.names[0], spec.shape, str(spec.dtype)]).encode() + b"\n")
        return root.update(memoryview(self.digests.numpy())).hexdigest()  # type: ignore[arg-type]

    def _take(self, spec: Spec, offset: int, values: Tensor) -> None:
        """Hash a parameter's bytes from ``offset``."""
        data = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        whole: list[tuple[int, memoryview]] = []
        at, end = offset, offset + len(data)
        while at < end:
            row, stop = self._first[spec.names[0]] + at // LEAF_BYTES, _leaf_end(spec, at)
            piece, begins = data[at - offset : min(stop, end) - offset], at % LEAF_BYTES == 0
            if begins and stop <= end:
                whole.append((row, piece))
            elif begins or (row in self._begun and self._begun[row][2] == at):
                self._go_on(row, spec, at, piece, stop)
            at = min(stop, end)
        mine = [(row, piece) for row, piece in whole if row % self._share.of == self._share.index]
        for (row, _), digest in zip(mine, _digests([piece for _, piece in mine]), strict=True):
            self._note(row, digest)

    def _go_on(self, row: int, spec: Spec, at: int, piece: memoryview, stop: int) -> None:
        if row % self._share.of != self._share.index:
            return
        hasher = self._begun.pop(row)[0] if row in self._begun else blake3()
        hasher.update(piece)
        if at + len(piece) == stop:
            self._note(row, hasher.digest())
        else:
            self._begun[row] = hasher, spec, at + len(piece)

    def _note(self, row: int, digest: bytes) -> None:
        self.digests[row] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)

    @cached_property
    def _where(self) -> dict[str, list[tuple[Block, Part, int]]]:
        """For each parameter its parts, their blocks, and where in these they begin."""
        found: dict[str, list[tuple[Block, Part, int]]] = {}
        for block in self._layout.blocks:
            begin = 0
            for segment in block.segments:
                for part in segment.parts:
                    here = begin + (part.start - segment.start) * segment.dtype.itemsize
                    found.setdefault(part.parameter.name, []).append((block, part, here))
                begin += segment.size_bytes
        return found


def _digests(pieces: Sequence[memoryview]) -> list[bytes]:
    """Digests of whole leaves, on as many threads as torch computes with."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        return [_digest(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as pool:  # BLAKE3 lets go of Python's lock.
        return list(pool.map(_digest, pieces))


def _digest(piece: memoryview) -> bytes:
    return blake3(piece).digest()


def _leaf_end(spec: Spec, at: int) -> int:
    return min((at // LEAF_BYTES + 1) * LEAF_BYTES, spec.size_bytes)


def _offset(part: Part) -> int:
    """Where a part begins in the bytes of its parameter."""
    return (part.start - part.parameter.start) * part.parameter.spec.dtype.itemsize
