"""Engines that move bytes between files and memory.

``mmap`` maps a file and copies, through the page cache; ``deepnvme`` is DeepSpeed's asynchronous
direct I/O, which bypasses the page cache and takes none of the processor.
"""

import fcntl
import mmap
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zo.errors import UserError, one_line
from zo.io import hardware

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096
MADV_POPULATE_READ = 22
"""Of mman.h; Python 3.11 has no name for it."""
BOUNCE_BYTES = 16 * 2**20
"""Size of the buffer for direct reads of unaligned bytes."""

WAIT_SECONDS = 20
"""Time after which it is said that an operator is still being compiled."""


def padded(size_bytes: int) -> int:
    """Return a size rounded up to whole pages."""
    return -(-size_bytes // PAGE) * PAGE


class Engine(Protocol):
    """Moves bytes; calls block, but not other threads."""

    def allocate(self, size_bytes: int) -> "Tensor":
        """Return zeroed uint8 host memory of shape ``[size_bytes]`` that needs no copy in between.

        It begins on a page's boundary.
        """
        ...

    def read(self, path: Path, offset: int, into: "Tensor") -> None:
        """Fill uint8 ``into`` from a file.

        Raises:
            OSError: the file is missing, or shorter than that.
        """
        ...

    def write(self, path: Path, data: "Tensor") -> None:
        """Write uint8 ``data``, whole pages of it, to a file that is new or of this size.

        Raises:
            OSError: the disk refuses.
        """
        ...


def _check_length(path: Path, end: int) -> None:
    found = path.stat().st_size
    if found < end:
        raise OSError(f"{path} is cut short: {found} bytes, {end} are needed")


class Mapped:
    """The page cache of the system."""

    def allocate(self, size_bytes: int) -> "Tensor":
        """Return anonymous pages, huge ones where they fit, committed when touched."""
        import torch  # Not above: the configuration reads ENGINES, without the seconds of torch.

        pages = mmap.mmap(-1, padded(size_bytes))
        with suppress(OSError, AttributeError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8)[:size_bytes]

    def read(self, path: Path, offset: int, into: "Tensor") -> None:
        """Map, copy, unmap: a mapping that stayed would count as this process's memory."""
        import numpy as np

        if not into.numel():
            return
        _check_length(path, offset + into.numel())
        first = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with (
            open(path, "rb") as file,
            mmap.mmap(
                file.fileno(), offset + into.numel() - first, offset=first, access=mmap.ACCESS_READ
            ) as mapped,
        ):
            _populate(mapped)
            source = np.frombuffer(mapped, np.uint8)
            np.copyto(into.numpy(), source[offset - first :])
            del source  # A mapping with a view of it cannot be closed.

    def write(self, path: Path, data: "Tensor") -> None:
        """Write into the page cache; the system writes it out later."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
            _reserve(file.fileno(), data.numel())
            rest = memoryview(data.numpy())  # type: ignore[arg-type]
            while rest:
                rest = rest[file.write(rest) :]


def _populate(mapped: mmap.mmap) -> None:
    """Fault in all pages of a mapping in one call."""
    try:
        mapped.madvise(MADV_POPULATE_READ)
    except OSError:
        mapped.madvise(mmap.MADV_WILLNEED)  # Linux before 5.14; the same bytes, slower.


class DeepNvme:
    """DeepSpeed's engine: O_DIRECT reads and writes by libaio, in a thread of its own."""

    def __init__(self) -> None:
        """Load the engine; it is compiled on the first use.

        Raises:
            UserError: deepspeed, a compiler or libaio is missing.
        """
        make = _deepnvme_handle()
        # Enough in flight to keep a disk busy; deeper queues gave nothing here.
        self._reader, self._writer = (make(2**20, 32, False, True, 1) for _ in range(2))
        self._bounce: Tensor | None = None
        self._locked_bytes = 0

    def allocate(self, size_bytes: int) -> "Tensor":
        """Return locked pages.

        Raises:
            UserError: the process may not lock that much.
        """
        import torch

        # Locked tensors stay locked: the engine lets go of them at its end.
        needed = self._locked_bytes + padded(size_bytes)
        if (allowed := hardware.lockable_bytes()) < needed:
            raise UserError(
                f"memory.disk_engine=deepnvme needs {needed} bytes of host memory that is locked, "
                f"and this process may lock {int(allowed)}; raise it (ulimit -l unlimited; Docker: "
                "--ulimit memlock=-1), or use memory.disk_engine=mmap"
            )
        self._locked_bytes = needed
        made: Tensor = self._reader.new_cpu_locked_tensor(
            padded(size_bytes), torch.empty(0, dtype=torch.uint8)
        )
        return made.zero_()[:size_bytes]

    def read(self, path: Path, offset: int, into: "Tensor") -> None:
        """Read directly into whole pages of locked memory, else through a bounce buffer."""
        _check_length(path, offset + into.numel())
        if self._direct(offset, into):
            self._pread(path, offset, into)
            return
        if self._bounce is None:
            self._bounce = self.allocate(BOUNCE_BYTES)
        # What is left of the last page of a file is read by the system: direct reads have whole
        # sectors alone.
        done, whole_pages = 0, path.stat().st_size // PAGE * PAGE
        while done < into.numel() and offset + done < whole_pages:
            first = (offset + done) // PAGE * PAGE
            stop = min(first + BOUNCE_BYTES, padded(offset + into.numel()), whole_pages)
            self._pread(path, first, self._bounce[: stop - first])
            count = min(stop - offset, into.numel()) - done
            into[done : done + count] = self._bounce[offset + done - first :][:count]
            done += count
        if done < into.numel():
            import torch

            with open(path, "rb") as file:
                file.seek(offset + done)
                into[done:] = torch.frombuffer(
                    bytearray(file.read(into.numel() - done)), dtype=torch.uint8
                )

    def _direct(self, offset: int, into: "Tensor") -> bool:
        aligned = not (offset % PAGE or into.numel() % PAGE or into.data_ptr() % PAGE)
        return aligned and bool(self._reader.is_pinned(into))

    def _pread(self, path: Path, offset: int, into: "Tensor") -> None:
        if self._reader.sync_pread(into, str(path), offset) < 0:
            raise OSError(f"{path} cannot be read by DeepNVMe")

    def write(self, path: Path, data: "Tensor") -> None:
        """Write straight to the disk."""
        # The engine does not look at the results of its writes: room is made sure of here, bytes
        # when they are read.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            _reserve(descriptor, data.numel())
        finally:
            os.close(descriptor)
        if self._writer.sync_pwrite(data, str(path), 0) < 0:
            raise OSError(f"{path} cannot be written by DeepNVMe")


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Reserve the room on the disk before a byte is written."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        # Some file systems have no such call; there a full disk shows in the write.
        if error.errno not in (95, 22):
            raise


def _deepnvme_handle() -> Callable[..., Any]:
    remedy = (
        "install it with: apt install libaio-dev g++ && pip install 'deepspeed>=0.19' ninja, "
        "or use memory.disk_engine=mmap"
    )
    hardware.name_accelerator()
    try:
        import logging

        from deepspeed.ops.op_builder import AsyncIOBuilder
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)  # It warns of a consumer disk's wear at every first write.
        builder = AsyncIOBuilder()
    except ImportError as error:
        raise UserError(
            f"memory.disk_engine=deepnvme needs the extra nvme ({error}); {remedy}"
        ) from error
    try:
        if not builder.is_compatible(verbose=False):
            raise UserError(
                f"memory.disk_engine=deepnvme needs libaio, which is not there; {remedy}"
            )
        return _load_alone(builder).aio_handle  # type: ignore[no-any-return]
    except (RuntimeError, OSError, ImportError) as error:
        said = one_line(error, 300)
        raise UserError(f"memory.disk_engine=deepnvme cannot be built: {said}; {remedy}") from error


def _load_alone(builder: Any) -> Any:
    """Load an operator of DeepSpeed while no other process of zo does.

    PyTorch marks a build by a file that only the process which made it removes, and waits for it
    for ever. A killed process leaves that file, and its name in ours, whose lock ends with it.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(builder.name, verbose=False))
    mark = folder / "lock"
    with (folder / "zo.lock").open("a+") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        ours.seek(0)
        if ours.read():
            mark.unlink(missing_ok=True)
        ours.write("loading")
        ours.flush()
        late = threading.Timer(WAIT_SECONDS, _say_waiting, [mark])
        late.daemon = True
        late.start()
        try:
            return builder.load(verbose=False)
        finally:
            late.cancel()
            ours.truncate(0)


def _say_waiting(mark: Path) -> None:
    print(
        f"DeepNVMe is being compiled, once, for minutes; if nothing compiles, delete {mark}",
        file=sys.stderr,
    )


ENGINES: dict[str, Callable[[], Engine]] = {"mmap": Mapped, "deepnvme": DeepNvme}
"""The engines, by the name that ``memory.disk_engine`` takes."""
