"""A run's folder on a network file system: late visibility of writes, and cached missing names.

System calls act as on a client with close-to-open consistency: bytes written through a descriptor
reach the others when it is synced or closed, and a failed look-up of a name is cached for half a
minute, unless the client itself creates it.
"""

import io
import os
import time
from pathlib import Path

import pytest
from ranks import lives

pytestmark = pytest.mark.slow

REMEMBERED_S = 30


def mount(folder):
    """Let this process access ``folder`` as a client of a network file system does."""
    folder, missing, held = str(folder), {}, {}
    real = {
        name: getattr(os, name)
        for name in ("open", "stat", "mkdir", "rename", "pwrite", "fsync", "close", "ftruncate")
    }
    real_open = io.open

    def inside(path):
        return isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(folder)

    def looked_up(function):
        def call(path, *arguments, **options):
            makes = function is real["open"] and arguments and arguments[0] & os.O_CREAT
            name = str(path)
            if inside(path) and not makes and time.monotonic() < missing.get(name, 0):
                raise FileNotFoundError(2, "No such file or directory", name)
            try:
                result = function(path, *arguments, **options)
            except FileNotFoundError:
                if inside(path):
                    missing[name] = time.monotonic() + REMEMBERED_S
                raise
            missing.pop(name, None)
            return result

        return call

    def open_descriptor(path, *arguments, **options):
        descriptor = looked_up(real["open"])(path, *arguments, **options)
        if inside(path):
            held[descriptor] = []
        return descriptor

    def make(path, *arguments, **options):
        missing.pop(str(path), None)
        return real["mkdir"](path, *arguments, **options)

    def rename(source, target, **options):
        missing.pop(str(target), None)
        return real["rename"](source, target, **options)

    def write(descriptor, data, offset):
        if descriptor not in held:
            return real["pwrite"](descriptor, data, offset)
        held[descriptor].append((bytes(data), offset))
        return len(data)

    def flush(descriptor):
        for data, offset in held.get(descriptor, ()):
            real["pwrite"](descriptor, data, offset)
        if descriptor in held:
            held[descriptor] = []

    def sync(descriptor):
        flush(descriptor)
        return real["fsync"](descriptor)

    def close(descriptor):
        flush(descriptor)
        held.pop(descriptor, None)
        return real["close"](descriptor)

    os.open, os.stat, os.mkdir, os.pwrite, os.fsync, os.close = (
        open_descriptor,
        looked_up(real["stat"]),
        make,
        write,
        sync,
        close,
    )

    def open_file(path, mode="r", *arguments, **options):
        if isinstance(path, str | os.PathLike) and set(mode) & set("wxa"):
            missing.pop(str(path), None)  # A client knows the names that it makes itself.
        return looked_up(real_open)(path, mode, *arguments, **options)

    os.rename, io.open = rename, open_file


def test_nodes_that_share_a_folder_over_a_network_find_that_they_do(overrides, tmp_path):
    """Nodes but rank 0's took the shared folder for their own and were refused by its lock."""
    settings = [*overrides, f"run.dir={tmp_path}/run", "eval.every=0"]
    for steps in (2, 4):  # Begun, and gone on with.
        found = lives(
            [*settings, f"run.steps={steps}"], ranks=2, nodes=2, prelude=(mount, tmp_path / "run")
        )
        assert all(isinstance(result, dict) and result["steps"] == steps for result in found), found
    assert not list((tmp_path / "run").glob("lock*"))


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_of_its_own_is_known_within_seconds(tmp_path, exists):
    from zo.state.lock import Lock, shares

    if exists:
        (tmp_path / "own").mkdir()
    lock = Lock(tmp_path / "shared")
    lock.show()
    begun = time.monotonic()
    assert not shares(tmp_path / "own", lock.token)
    assert time.monotonic() - begun < 3
    assert (tmp_path / "own").exists() == exists
    assert shares(tmp_path / "shared", lock.token)
    lock.release()
    assert not (tmp_path / "shared").exists()
