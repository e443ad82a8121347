"""Snapshots: trainable weights as a safetensors file, written and read by block.

The header is known from the layout before any weight is, so that every block is written to its
place as it passes by and no second copy of the model is ever in memory. The header's last field,
the fingerprint, comes with the last block.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from zo.model.fingerprint import DIGEST_BYTES
from zo.model.layout import Block, Layout, Placed, views

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the safetensors format for the dtypes that are trained."""
_LENGTH = struct.Struct("<Q")


class Writer:
    """Snapshot being written; it is complete once :meth:`finish` has returned."""

    def __init__(self, path: Path, layout: Layout, facts: Mapping[str, str]) -> None:
        """Begin the file.

        Args:
            path: of the file, which is new.
            layout: of the weights.
            facts: more metadata of it.

        Raises:
            OSError: the disk refuses.
        """
        self._facts, self._entries, end = dict(facts), dict[str, object](), 0
        self._starts: dict[str, int] = {}
        # The widest first, so that every tensor is on its alignment: the format has no room between
        # tensors.
        for placed in sorted(layout.parameters, key=lambda p: -p.spec.dtype.itemsize):
            begin, end = end, end + placed.spec.size_bytes
            shape, dtype = list(placed.spec.shape), DTYPES[placed.spec.dtype]
            self._entries[placed.name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [begin, end],
            }
            self._starts[placed.name] = begin
        header = self._header("0" * (2 * DIGEST_BYTES))
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._write(0, header)
        self._data_start = len(header)

    def _header(self, fingerprint: str) -> bytes:
        text = json.dumps(
            {"__metadata__": {**self._facts, "fingerprint": fingerprint}, **self._entries}
        ).encode()
        text += b" " * (-len(text) % 8)
        return _LENGTH.pack(len(text)) + text

    def _write(self, at: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._file.fileno(), rest, at)
            at, rest = at + count, rest[count:]

    def write(self, block: Block, stored: Sequence[Tensor]) -> None:
        """Write the trainable weights of a block, one flat tensor a segment on any device.

        Raises:
            OSError: the disk refuses.
        """
        for part, view in views(block, stored):
            placed = part.parameter
            if not placed.spec.frozen:
                offset = (part.start - placed.start) * placed.spec.dtype.itemsize
                values = view.detach().cpu().contiguous().view(-1).view(torch.uint8)
                place = self._data_start + self._starts[placed.name] + offset
                self._write(place, memoryview(values.numpy()))  # type: ignore[arg-type]

    def finish(self, fingerprint: str) -> None:
        """Complete the header."""
        self._write(0, self._header(fingerprint))

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


class Snapshot:
    """Snapshot on disk."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            OSError: the file cannot be read.
            SafetensorError: it is damaged, or cut short.
            KeyError, ValueError: it is no snapshot.
        """
        with safe_open(path, framework="pt") as file:  # It sees that header and length agree.
            facts = file.metadata() or {}
        self.path, self.version = path, int(facts["version"])
        if self.version < 0:
            raise ValueError(f"{path} is of version {self.version}")
        self.base, self.log = facts["base"], facts["log"]
        """Fingerprint of the base model, and digest of the log up to this version."""
        self.fingerprint = facts["fingerprint"]
        """Of the weights."""
        with open(path, "rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(length))
        self._starts = {
            name: _LENGTH.size + length + entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def read(self, parameter: Placed, first: int, into: Tensor) -> None:
        """Fill a flat tensor on CPU with a parameter's elements from number ``first``.

        Raises:
            OSError: the file cannot be read.
        """
        if parameter.name not in self._starts:
            raise OSError(f"it lacks {parameter.name}")
        at = self._starts[parameter.name] + first * into.dtype.itemsize
        rest = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(at)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise OSError(f"{self.path} is cut short")
                rest = rest[count:]
