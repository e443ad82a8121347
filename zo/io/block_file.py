"""The file of one block: a page of header, and the block's bytes.

    "ZOBLK1" newline | u32 n | n bytes of JSON | u32 CRC-32 of the bytes before | zeros to 4096 |
    bytes, zeros to a page

It appears whole, under its name, or not at all. It is not synced: the log is, and a file that a
power cut tore fails its checksum and is rebuilt from base and log.
"""

import json
import re
import struct
import zlib
from dataclasses import asdict, dataclass, fields

import xxhash
from torch import Tensor

from zo.io.engines import PAGE

MAGIC = b"ZOBLK1\n"


_U32 = struct.Struct("<I")


BLOCK_FILE = re.compile(r"\d{6,}\.(block|new|old)")
"""Names of a store's files: a block, one that is being written, and one that is kept to be written
over."""


@dataclass(frozen=True)
class Header:
    """Header of a block's file."""

    block: str
    """Name of the block: a power cut may leave a whole file under another block's name."""
    layout: str
    """Digest of the layout that the bytes are cut by."""
    run: str
    """Identity of the log whose entries were applied; empty at version 0."""
    version: int
    """The last entry applied."""
    size_bytes: int
    checksum: str
    """XXH3-64 of the bytes, hexadecimal."""

    def page(self) -> bytes:
        """Return the header's page."""
        text = json.dumps(asdict(self)).encode()
        body = MAGIC + _U32.pack(len(text)) + text
        page = body + _U32.pack(zlib.crc32(body))
        assert len(page) <= PAGE
        return page.ljust(PAGE, b"\0")

    @classmethod
    def parse(cls, page: bytes) -> "Header | None":
        """Read a page; ``None`` if it is none of ours, or damaged."""
        start = len(MAGIC) + _U32.size
        if len(page) < PAGE or not page.startswith(MAGIC):
            return None
        end = start + _U32.unpack_from(page, len(MAGIC))[0]
        if end + _U32.size > PAGE or _U32.unpack_from(page, end)[0] != zlib.crc32(page[:end]):
            return None
        try:
            header = cls(**json.loads(page[start:end]))
        except (ValueError, TypeError, RecursionError):
            return None
        typed = all(type(getattr(header, field.name)) is field.type for field in fields(cls))
        return header if typed and header.version >= 0 else None


def checksum(image: Tensor) -> str:
    """XXH3-64 of a block's bytes; a tenth of the time it takes to read them."""
    return xxhash.xxh3_64_hexdigest(memoryview(image.numpy()))  # type: ignore[arg-type]
