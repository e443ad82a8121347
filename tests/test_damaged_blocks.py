"""What a disk may do to a run: a kill at any write, damaged or exchanged blocks, no room left."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import make_llama, make_tokenizer
from plain import fingerprint, run
from ranks import KILLED, kill_at, train
from test_stores import BITS, DISK
from torch.utils.cpp_extension import _get_build_directory

from zo.errors import UserError
from zo.run import trainer
from zo.state.log import read

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.


@pytest.fixture
def expected(overrides):
    return fingerprint(*overrides, *BITS)


MOMENTS = {
    "in a write-back": ("zo.io.engines", "Mapped.write", 5, False),
    "before a rename": ("pathlib", "Path.rename", 9, True),
    "after a rename": ("pathlib", "Path.rename", 17, False),
    "while a file is begun": ("zo.io.engines", "_reserve", 11, True),
    "while loading": ("zo.model.checkpoint", "CheckpointSource.read", 7, False),
    "in a read": ("zo.streaming.disk_store", "DiskStore.fetch", 60, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(overrides, expected, tmp_path, moment):
    settings = [*overrides, *BITS, *DISK, f"run.dir={tmp_path}/run"]
    assert train(settings, prelude=(kill_at, *MOMENTS[moment])) == KILLED
    assert train(settings)["fingerprint"] == expected
    assert not list((tmp_path / "run" / "blocks").rglob("*.new"))


def block_files(folder):
    return sorted((folder / "blocks" / "rank-00000").iterdir())


@pytest.mark.parametrize("where", [100, 5000], ids=["header", "bytes"])
def test_a_flipped_byte_in_a_block_is_found_and_the_block_made_anew(
    overrides, expected, tmp_path, capsys, where
):
    settings = [*overrides, *BITS, *DISK]
    run(settings, tmp_path / "run", "run.steps=4")
    for path in block_files(tmp_path / "run")[:3]:
        data = bytearray(path.read_bytes())
        data[min(where, len(data) - 1)] ^= 4
        path.write_bytes(data)
    found = run(settings, tmp_path / "run")
    assert found["fingerprint"] == expected
    assert (where == 100) or "was corrupt on disk and was rebuilt" in capsys.readouterr().err


def test_a_block_cut_short_is_made_anew(overrides, expected, tmp_path):
    settings = [*overrides, *BITS, *DISK]
    run(settings, tmp_path / "run", "run.steps=4")
    for path in block_files(tmp_path / "run"):
        os.truncate(path, path.stat().st_size - 4096)
    assert run(settings, tmp_path / "run")["fingerprint"] == expected


def test_two_block_files_exchanged_are_made_anew(overrides, expected, tmp_path):
    settings = [*overrides, *BITS, *DISK]
    run(settings, tmp_path / "run", "run.steps=4")
    sizes = {}
    for path in block_files(tmp_path / "run"):
        sizes.setdefault(path.stat().st_size, []).append(path)
    one, other = next(paths for paths in sizes.values() if len(paths) > 1)[:2]
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    assert run(settings, tmp_path / "run")["fingerprint"] == expected


def test_blocks_and_log_of_another_run_are_not_taken(overrides, expected, tmp_path):
    settings = [*overrides, *BITS, *DISK]
    run(settings, tmp_path / "run", "run.steps=4")
    run([*settings, "update.lr=2e-3"], tmp_path / "other", "run.steps=4")
    log = (tmp_path / "run" / "steps.log").read_bytes()
    for path in block_files(tmp_path / "other"):
        (tmp_path / "run" / "blocks" / "rank-00000" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run" / "steps.log").write_bytes((tmp_path / "other" / "steps.log").read_bytes())
    with pytest.raises(UserError, match="belong to two runs"):
        run(settings, tmp_path / "run")
    (tmp_path / "run" / "steps.log").unlink()
    with pytest.raises(UserError, match=r"steps\.log is missing"):
        run(settings, tmp_path / "run")
    (tmp_path / "run" / "steps.log").write_bytes(log)
    assert run(settings, tmp_path / "run")["fingerprint"] == expected


def changed_base(tmp_path, tiny_model, change):
    folder = tmp_path / "base"
    subprocess.run(["cp", "-r", tiny_model, folder], check=True)
    return folder, lambda: change(folder / "model.safetensors")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


BROKEN = {
    "a flipped byte": (flip, "was started from a different base model"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 10), "is truncated"),
    "missing": (os.unlink, r"weights of model\.name=.* cannot be loaded"),
    "another file": (lambda path: path.write_bytes(b"no weights at all"), "not a safetensors file"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("store", ["device", "disk"])
def test_a_base_that_changed_is_found_at_the_start(overrides, tiny_model, tmp_path, store, broken):
    folder, change = changed_base(tmp_path, tiny_model, BROKEN[broken][0])
    settings = [*overrides, f"model.name={folder}", f"memory.store={store}"]
    run(settings, tmp_path / "run", "run.steps=2")
    before = (tmp_path / "run" / "steps.log").read_bytes()
    change()
    with pytest.raises(UserError, match=BROKEN[broken][1]) as caught:
        run(settings, tmp_path / "run", "run.steps=4")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "steps.log").read_bytes() == before


def test_a_missing_shard_is_named(overrides, tiny_model, tmp_path):
    folder = tmp_path / "sharded"
    make_llama().save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    run([*overrides, f"model.name={folder}", *DISK], tmp_path / "whole", "run.steps=1")
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        run([*overrides, f"model.name={folder}", *DISK], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many bytes."""
    mounted = []

    def mount(size_bytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = f"size={size_bytes}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_folder_without_room_is_refused_with_the_bytes_needed(overrides, small_disk, tmp_path):
    folder = small_disk(200_000)
    with pytest.raises(
        UserError, match=r"memory\.store=disk needs \d+ bytes .* make room"
    ) as caught:
        run([*overrides, *DISK], folder / "run")
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_a_disk_that_fills_up_in_the_middle_of_a_step(overrides, expected, small_disk, monkeypatch):
    """The room that was there at the start is gone when blocks are to be written for the first
    time."""
    folder, filled = small_disk(1_000_000), []
    settings = [*overrides, *BITS, *DISK, "memory.lag=1"]
    original = trainer.build_problem

    def build_problem(config):
        problem = original(config)

        def batches(step, column):
            if step == 1 and not filled:
                filled.append(fill(folder / "filler"))
            return problem.batches(step, column)

        return replace(problem, batches=batches)

    monkeypatch.setattr(trainer, "build_problem", build_problem)
    with pytest.raises(UserError, match=r"make room and start the same command again") as caught:
        run(settings, folder / "run")
    assert "\n" not in str(caught.value)
    assert len(read(folder / "run" / "steps.log")[1]) >= 1
    (folder / "filler").unlink()
    assert run(settings, folder / "run")["fingerprint"] == expected


def fill(path):
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        all(file.write(b"x" * 4096) for _ in iter(int, 1))
    return path


def test_a_process_killed_while_it_loads_deepnvme_holds_up_no_later_one(why_no_deepnvme, tmp_path):
    """PyTorch waits for ever for the file that marks a build, which a killed process leaves."""
    if why_no_deepnvme:
        pytest.skip(why_no_deepnvme)
    for name in ("async_io", "pin_memory"):  # What a build is made of, so that neither is anew.
        shutil.copytree(_get_build_directory(name, verbose=False), tmp_path / name)
    mark = tmp_path / "async_io/lock"
    mark.unlink(missing_ok=True)
    load = [sys.executable, "-c", "from zo.io.engines import ENGINES; ENGINES['deepnvme']()"]
    here = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    left = False
    for _ in range(5):
        process = subprocess.Popen(load, env=here)
        while process.poll() is None and not mark.exists():
            time.sleep(0.001)
        process.kill()
        process.wait()
        if left := mark.exists():
            break
    assert left
    subprocess.run(load, env=here, check=True, timeout=500)
    assert not mark.exists()
