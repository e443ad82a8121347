"""Files and folders that appear whole or not at all: written beside, synced, renamed.

A disk store's ``keep`` is the one exception: it writes over retired files and syncs no data (see
:mod:`zo.io.block_file`).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable.

    POSIX keeps a new or renamed file's name only after its folder was synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yield a path for a new file or folder, which replaces ``path`` when the block ends.

    What an interrupted process left there is removed first. After an exception ``path`` is as it
    was and nothing is left beside it. A folder that is replaced is moved away just before.

    Args:
        path: of the file or folder, in a folder that exists.
        beside: on the same disk; ``path`` with ``.new`` behind its name by default.

    Raises:
        OSError: the disk refuses.
    """
    beside = beside or path.with_name(f"{path.name}.new")
    _remove(beside)
    try:
        yield beside
        for written in (*beside.rglob("*"), beside):
            sync(written)
        with _moved_away(path):
            os.rename(beside, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            _remove(beside)
        raise


@contextmanager
def _moved_away(path: Path) -> Iterator[None]:
    """Move a folder away, which a rename cannot replace; bring it back if the block fails."""
    if not path.is_dir():
        yield
        return
    old = path.with_name(f".{path.name}.replaced")
    _remove(old)
    os.rename(path, old)
    try:
        yield
    except OSError:
        os.rename(old, path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and is durable on return.

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    with replacing(path) as beside:
        beside.write_bytes(data)


def write_for_readers(path: Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all; a power cut may lose it.

    It syncs nothing, for files that are made again every few seconds.

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    beside = path.with_name(f"{path.name}.new")
    try:
        if beside.is_symlink():  # It would be written through, wherever it points to.
            beside.unlink()
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
