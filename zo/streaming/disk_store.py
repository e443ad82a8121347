"""Store ``disk``: a read-only base, and over it a file for each block written back.

A file holds what training changes; the frozen rest of a block is always read from the base. Blocks
that are slow to make from the base are kept whole.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from zo.errors import UserError
from zo.io import hardware
from zo.io.atomic import sync
from zo.io.block_file import BLOCK_FILE, Header, checksum
from zo.io.engines import PAGE, Engine
from zo.io.host_memory import return_memory_at_once
from zo.model.fingerprint import Fingerprint
from zo.model.layout import WHOLE, Block, Layout, Slice
from zo.model.source import WeightSource
from zo.streaming.budget import disk_bytes, file_bytes, slot_bytes, within_slot


class DiskStore:
    """Read-only base, and a file for each block or slice that was written back."""

    is_durable = True

    def __init__(
        self,
        layout: Layout,
        base: WeightSource,
        engine: Engine,
        folder: Path,
        writable: bool = True,
        slice: Slice = WHOLE,
    ) -> None:
        """Read the base once, for its fingerprint and a checksum of each block.

        Raises:
            UserError: the disk has too little room, or refuses.
        """
        return_memory_at_once()
        self.layout, self.writable, self.slice = layout, writable, slice
        self.versions = [0] * len(layout.blocks)
        self._digest = f"{layout.digest} slice {slice.index} of {slice.of}"
        self.buffers: Sequence[Tensor] = ()
        self.corrupt: list[str] = []
        """Names of blocks whose file was found corrupt, and that are rebuilt from base and log."""
        self._run: str | None = None
        """Identity of the run, once its log is known."""
        self._base, self._engine, self._folder = base, engine, folder
        self._kept = {
            block.index: slice.within(block) if base.is_expensive(block) else slice.changing(block)
            for block in layout.blocks
        }
        self._headers: dict[int, Header] = {}
        self._spare: dict[int, Path] = {}
        """Files that a newer one took the place of, one of each size."""
        self._on_disk = {b.index for b in layout.blocks if self._header(b) is not None}
        if writable:
            self._check_room()
        self._frozen: dict[int, str] = {}
        """Checksums of what files do not hold of a block."""
        self._checksums = self._read_base()

    def _check_room(self) -> None:
        needed = disk_bytes(self._kept.values())
        held = sum(file_bytes(self._kept[index]) for index in self._on_disk)
        free = hardware.free_disk_bytes(self._folder)
        if needed - held > free:
            raise UserError(
                f"memory.store=disk needs {needed - held} bytes ({(needed - held) / 2**30:.2f} "
                f"GiB) in {self._folder} and its disk has {free} free ({free / 2**30:.2f} GiB); "
                "make room, or choose a run.dir on another disk"
            )

    def _read_base(self) -> list[str]:
        """Read the base once, and keep blocks that are slow to make on disk at version 0."""
        checksums: list[str] = []
        self.base, self.found = "", Fingerprint(self.layout)
        slot = self._engine.allocate(
            slot_bytes(max(b.size_bytes for b in self.layout.blocks), self.slice.of)
        )
        for block in self.layout.blocks:
            own = self.slice.within(block)
            image = within_slot(slot, own)
            self._base.read(block, self.layout, image, own.start)
            checksums.append(checksum(image))
            self._frozen[block.index] = checksum(image[len(self._kept[block.index]) :])
            self.found.add(block, image, own.start)
            self.found.complete(self._base.read)
            if (
                self.writable
                and self._base.is_expensive(block)
                and block.index not in self._on_disk
            ):
                self.keep(block, slot, 0)
        self._base.clear_cache()
        return checksums

    def open(self, newest: int, run: str) -> None:
        """Open the blocks that an earlier process of the same run wrote.

        Args:
            newest: entries of the log; a block of a later version is not used.
            run: identity of the log (:attr:`zo.state.log.Log.identity`); a block of another run is
                not used.
        """
        self._run = run
        for block in self.layout.blocks:
            header = self._header(block)
            if header is None or header.version > newest:
                continue
            # Before the first step there is no log: such a block is held against the base itself.
            if (
                header.run == run
                if header.version
                else header.checksum == self._checksums[block.index]
            ):
                self._headers[block.index], self.versions[block.index] = header, header.version
        if self.writable and self._folder.is_dir():
            known = {self._path(self.layout.blocks[index]) for index in self._headers}
            for path in self._folder.iterdir():
                if path not in known and BLOCK_FILE.fullmatch(path.name):
                    path.unlink()

    def _path(self, block: Block) -> Path:
        return self._folder / f"{block.index:06d}.block"

    def _header(self, block: Block) -> Header | None:
        """Return the header of a block's file, if there is one of this layout."""
        try:
            with open(self._path(block), "rb") as file:
                header = Header.parse(file.read(PAGE))
        except OSError:
            return None
        expected = block.name, self._digest, len(self._kept[block.index])
        ours = header is not None and (header.block, header.layout, header.size_bytes) == expected
        return header if ours else None

    def _framed(self, block: Block, slot: Tensor) -> Tensor:
        """Return what is kept of a block in a slot with the page before it, as in its file."""
        start = self.slice.index * self.slice.stride(block)
        return slot[start : start + file_bytes(self._kept[block.index])]

    def allocate(self, size_bytes: int) -> Tensor:
        """See :class:`Store`."""
        return self._engine.allocate(size_bytes)

    def memory(self, block: Block) -> Tensor | None:
        """See :class:`Store`."""
        return None

    def fetch(self, block: Block, slot: Tensor) -> int:
        """Fill a slot (see :class:`Store`); a corrupt file is replaced by base and replay."""
        own, kept = self.slice.within(block), self._kept[block.index]
        image, header = within_slot(slot, own), self._headers.get(block.index)
        if header is not None:
            framed = self._framed(block, slot)
            try:
                self._engine.read(self._path(block), 0, framed)
                # The whole header, as it is now: another block's file may have come to stand under
                # this name.
                if (
                    Header.parse(framed[:PAGE].numpy().tobytes()) == header
                    and checksum(within_slot(slot, kept)) == header.checksum
                ):
                    if len(kept) < len(own):
                        frozen = range(kept.stop, own.stop)
                        expected = self._frozen[block.index]
                        self._read_anew(block, within_slot(slot, frozen), frozen.start, expected)
                    return header.version
            except OSError:
                pass  # As good as corrupt.
            self._give_up(block)
        self._read_anew(block, image, own.start, self._checksums[block.index])
        return 0

    def _give_up(self, block: Block) -> None:
        """Count a block's file as corrupt; the block stands at version 0 from now on."""
        self.corrupt.append(block.name)
        del self._headers[block.index]
        self.versions[block.index] = 0

    def _read_anew(self, block: Block, image: Tensor, start: int, expected: str) -> None:
        """Read some bytes of a block from the base and compare their checksum."""
        try:
            self._base.read(block, self.layout, image, start)
            # A block that is made, or converted, brings what it was made of.
            self._base.clear_cache()
        except OSError as error:
            raise UserError(f"the base model cannot be read: {error}; restore it") from error
        if checksum(image) != expected:
            raise UserError(
                f"the base model changed during the run: block {block.name} differs; "
                "restore it and start the same command again"
            )

    def kept(self, block: Block) -> range:
        """See :class:`Store`."""
        return self._kept[block.index]

    def keep(self, block: Block, slot: Tensor, version: int) -> None:
        """Write a block back (see :class:`Store`): beside, then renamed; over a retired file."""
        path, kept, framed = self._path(block), self.kept(block), self._framed(block, slot)
        if not kept:
            self.versions[block.index] = version
            return
        image = within_slot(slot, kept)
        run = self._run if version else ""
        assert run is not None  # Versions begin with a log.
        header = Header(block.name, self._digest, run, version, len(kept), checksum(image))
        under = framed[:PAGE].clone()  # The end of the slice before, or nothing.
        framed[:PAGE] = torch.frombuffer(bytearray(header.page()), dtype=torch.uint8)
        beside = self._file_to_write(block)
        try:
            # Not the run's folder: one that was deleted or moved must not come back, half empty.
            self._folder.parent.mkdir(exist_ok=True)
            self._folder.mkdir(exist_ok=True)
            self._engine.write(beside, framed)
            framed[:PAGE] = under
            if block.index in self._headers:
                retired = path.with_suffix(".old")
                with suppress(
                    OSError
                ):  # Some file systems have no hard links, and so no spare files.
                    os.link(path, retired)
                    self._spare[file_bytes(kept)] = retired
            beside.rename(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                raise UserError(
                    f"block {block.name} cannot be written: {self._folder} was deleted or moved; "
                    "put the run's folder back and start the same command again"
                ) from error
            raise UserError(
                f"block {block.name} cannot be written to {self._folder}: "
                f"{error.strerror or error}; the log is safe: make room and start the same command "
                "again"
            ) from error
        self._headers[block.index], self.versions[block.index] = header, version

    def _file_to_write(self, block: Block) -> Path:
        """Return the file to write before its rename: a retired one of its size, or a new one."""
        spare = self._spare.pop(file_bytes(self._kept[block.index]), None)
        if spare is not None:
            try:
                # Until the folder is synced, a power cut may bring the old name back, to what is
                # written now.
                sync(self._folder)
                return spare
            except OSError:  # Some file systems cannot sync a folder.
                spare.unlink(missing_ok=True)
        return self._path(block).with_suffix(".new")

    def peek(self, block: Block, start: int, image: Tensor) -> int:
        """See :class:`DeviceStore`."""
        header = self._headers.get(block.index)
        if header is not None and self._header(block) != header:
            self._give_up(block)
            header = None
        if header is None:
            self._base.read(block, self.layout, image, start)
            return 0
        kept = self._kept[block.index]
        count = min(image.numel(), max(0, kept.stop - start))
        if count:
            self._engine.read(self._path(block), PAGE + start - kept.start, image[:count])
        if count < image.numel():
            self._base.read(block, self.layout, image[count:], start + count)
        return header.version
