"""The fingerprint of a model: one hash of all parameters, computed by many ranks and threads.

Each parameter's bytes are cut into leaves of ``LEAF_BYTES``, each with a BLAKE3 digest. The
fingerprint is the BLAKE3 hash of all digests in address order, with names, shapes and dtypes. A
leaf depends on its parameter alone; store, unit, slices and mesh only decide which rank hashes it.
A rank hashes the leaves that begin in its own bytes, so start-up reads every byte once per node,
and ranks exchange 32 bytes per leaf, 1/8192 of the model.

BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020) is as collision-resistant as SHA-256; on
leaves of 256 KiB it hashes 4.3 GB/s per core, SHA-256 with hardware instructions 1.8 GB/s (2 cores
of an AMD EPYC).
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
"""Bytes of a parameter that share a digest.

Smaller leaves mean more digests to exchange and slower hashing (1.7 GB/s at 4 KiB); larger ones,
more bytes read from the next rank's slice (half a leaf per block on average)."""
DIGEST_BYTES = 32
_ROOT = "zo 2026-11-24 fingerprint of a model"
"""Context of the root's hash, so that it differs from a leaf's (BLAKE3 key derivation)."""

Read = Callable[[Block, Layout, Tensor, int], None]
"""Function that reads a block's bytes (see :meth:`zo.model.source.WeightSource.read`)."""


class Fingerprint:
    """The digests of a model's leaves; equal hashes of all of them mean equal bits.

    Trainable parameters come in address order, then frozen ones by name. Leaves may be added in any
    order, the bytes of one leaf only from first to last.
    """

    def __init__(self, layout: Layout, resident: Sequence[Spec] = (), share: Slice = WHOLE) -> None:
        """Allocate the digest of every leaf.

        Args:
            layout: the model's layout.
            resident: frozen parameters that are not in a block.
            share: hash only leaf numbers ``index`` modulo ``of``; skip the others when added.
        """
        self._layout, self._share = layout, share
        frozen = [
            p.parameter.spec for g in layout.groups for p in g.parts if p.parameter.spec.frozen
        ]
        trainable = [p.spec for p in layout.parameters]
        self._specs = trainable + sorted([*frozen, *resident], key=lambda spec: spec.names[0])
        self._first: dict[str, int] = {}
        """The row of each parameter's first leaf."""
        rows = 0
        for spec in self._specs:
            self._first[spec.names[0]] = rows
            rows += -(-spec.size_bytes // LEAF_BYTES)
        self.digests = torch.zeros(rows, DIGEST_BYTES, dtype=torch.uint8)
        """One row per leaf, zeros if unknown; uint8 of shape ``[leaves, 32]``."""
        self._unfinished: dict[int, tuple[blake3, Spec, int]] = {}
        """Unfinished leaves by row: the hasher, the parameter, and the offset of the next byte."""

    def add(self, block: Block, image: Tensor, start: int = 0) -> None:
        """Add a block's bytes from ``start``, uint8 on CPU; skip a leaf that began elsewhere."""
        for part, first, flat in spans(block, image, start):
            self._take(part.parameter.spec, _offset(part) + first * flat.dtype.itemsize, flat)

    def add_segments(self, block: Block, segments: Sequence[Tensor]) -> None:
        """Add a whole block, one flat tensor per segment, on any device."""
        for part, view in views(block, segments):
            self._take(
                part.parameter.spec, _offset(part), view.detach().cpu().contiguous().view(-1)
            )

    def add_parameter(self, spec: Spec, values: Tensor) -> None:
        """Add a whole parameter."""
        self._take(spec, 0, values.detach().cpu().contiguous().view(-1))

    def complete(self, read: Read) -> None:
        """Finish the leaves that were begun with bytes of other ranks or later blocks."""
        for spec, at, stop in [
            (spec, at, _leaf_end(spec, at)) for _, spec, at in self._unfinished.values()
        ]:
            for block, part, begin in self._parts[spec.names[0]]:
                offset = _offset(part)
                first, last = max(at, offset), min(stop, offset + part.numel * spec.dtype.itemsize)
                if first < last:
                    missing = torch.empty(last - first, dtype=torch.uint8)
                    read(block, self._layout, missing, begin + first - offset)
                    self._take(spec, first, missing)
        assert not self._unfinished

    def take_over(self, other: "Fingerprint", frozen: bool = False) -> None:
        """Copy the digests of another fingerprint of this model, or only the frozen parameters'."""
        for spec in self._specs:
            if (spec.frozen or not frozen) and spec.names[0] in other._first:
                rows = -(-spec.size_bytes // LEAF_BYTES)
                theirs = other.digests[other._first[spec.names[0]] :][:rows]
                self.digests[self._first[spec.names[0]] :][:rows].copy_(theirs)

    def hexdigest(self) -> str:
        """Return the hash of all leaves, 64 hexadecimal digits; all leaves must be known."""
        assert not self._unfinished and bool(self.digests.any(1).all())
        root = blake3(derive_key_context=_ROOT)
        for spec in self._specs:
            root.update(json.dumps([spec.names[0], spec.shape, str(spec.dtype)]).encode() + b"\n")
        return root.update(memoryview(self.digests.numpy())).hexdigest()  # type: ignore[arg-type]

    def _take(self, spec: Spec, offset: int, values: Tensor) -> None:
        """Hash a parameter's bytes, flat, from ``offset``."""
        data = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        complete: list[tuple[int, memoryview]] = []
        at, end = offset, offset + len(data)
        while at < end:
            row, stop = self._first[spec.names[0]] + at // LEAF_BYTES, _leaf_end(spec, at)
            piece, begins = data[at - offset : min(stop, end) - offset], at % LEAF_BYTES == 0
            if begins and stop <= end:
                complete.append((row, piece))
            elif begins or (row in self._unfinished and self._unfinished[row][2] == at):
                self._extend(row, spec, at, piece, stop)
            at = min(stop, end)
        mine = [
            (row, piece) for row, piece in complete if row % self._share.of == self._share.index
        ]
        for (row, _), digest in zip(mine, _digests([piece for _, piece in mine]), strict=True):
            self._set(row, digest)

    def _extend(self, row: int, spec: Spec, at: int, piece: memoryview, stop: int) -> None:
        if row % self._share.of != self._share.index:
            return
        hasher = self._unfinished.pop(row)[0] if row in self._unfinished else blake3()
        hasher.update(piece)
        if at + len(piece) == stop:
            self._set(row, hasher.digest())
        else:
            self._unfinished[row] = hasher, spec, at + len(piece)

    def _set(self, row: int, digest: bytes) -> None:
        self.digests[row] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)

    @cached_property
    def _parts(self) -> dict[str, list[tuple[Block, Part, int]]]:
        """The parts of each parameter: block, part, and the byte of the block where it begins."""
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
    """Return the digests of complete leaves, hashed on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        return [_digest(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as pool:  # BLAKE3 releases the GIL.
        return list(pool.map(_digest, pieces))


def _digest(piece: memoryview) -> bytes:
    return blake3(piece).digest()


def _leaf_end(spec: Spec, at: int) -> int:
    return min((at // LEAF_BYTES + 1) * LEAF_BYTES, spec.size_bytes)


def _offset(part: Part) -> int:
    """Return the first byte of a part within its parameter."""
    return (part.start - part.parameter.start) * part.parameter.spec.dtype.itemsize
