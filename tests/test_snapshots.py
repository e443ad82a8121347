"""Snapshots pass by a block at a time, and a disk that fills leaves what was there before."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from logs import HEADER
from ranks import server, train
from safetensors.torch import load_file

from zo.config.schema import MemoryConfig
from zo.errors import UserError
from zo.method.entry import Entry
from zo.model.blocks import find_layout
from zo.model.source import ModelSource
from zo.run.restore import restore_snapshot
from zo.state.log import Log, read
from zo.state.run_folder import RunFolder
from zo.streaming.replica import Replica

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def held_bytes(name="RssAnon"):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def peak_of_a_snapshot(folder, found):
    """Anonymous memory is sampled by a thread: the peak that the system keeps counts the page
    cache's mappings too."""
    import threading

    from transformers import OPTConfig, OPTForCausalLM

    from zo.io.host_memory import return_freed_memory, return_memory_at_once
    from zo.model.source import RandomSource

    return_memory_at_once()
    torch.set_num_threads(1)
    sizes = {
        "hidden_size": 512,
        "ffn_dim": 2048,
        "word_embed_proj_dim": 512,
        "num_attention_heads": 8,
    }
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=24, vocab_size=8192))
    layout = find_layout(model, "layer")
    memory = MemoryConfig(store="host", slots=2)
    replica = Replica(
        model, layout, lambda e: RandomSource(model, 0), memory, torch.device("cpu"), Path()
    )
    replica.open(Log(HEADER))
    run = RunFolder(folder)
    replica.pass_over()  # Slots are in memory once they are touched.
    return_freed_memory()
    before, peak, ends = held_bytes(), [0], threading.Event()

    def watch():
        while not ends.wait(0.001):
            peak[0] = max(peak[0], held_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run.save_snapshot(0, replica, replica.store.base, replica.log)
    ends.set()
    watcher.join()
    largest, total = (
        max(b.size_bytes for b in layout.blocks),
        sum(b.size_bytes for b in layout.blocks),
    )
    written = (folder / "snapshots" / "step-000000000.safetensors").stat().st_size
    replica.close()
    found.put((peak[0] - before, largest, total, written))


def test_a_snapshot_takes_no_more_memory_than_two_blocks(tmp_path):
    context = server()
    found = context.Queue()
    process = context.Process(target=peak_of_a_snapshot, args=(tmp_path, found))
    process.start()
    taken, largest, total, written = found.get(timeout=120)
    process.join()
    assert total > 300e6
    assert written > 0.95 * total
    assert taken < 2 * largest + 30e6


@pytest.mark.parametrize("unit", ["layer", "module"])
@torch.no_grad()
def test_a_snapshot_is_the_weights_and_any_store_takes_them_over(tmp_path, monkeypatch, unit):
    from zo.model import blocks

    monkeypatch.setattr(blocks, "CHUNK_BYTES", 16_384)

    def model():
        made = make_llama(vocab_size=900, tie_word_embeddings=False).to(torch.bfloat16)
        made.model.norm.float()
        return made

    def replica_of(made, store):
        memory = MemoryConfig(store=store)
        layout, cpu = find_layout(made, unit), torch.device("cpu")
        replica = Replica(made, layout, lambda e: ModelSource(made), memory, cpu, Path())
        replica.open(Log(HEADER))
        return replica

    expected = {name: parameter.data.clone() for name, parameter in model().named_parameters()}
    replica = replica_of(model(), "host")
    run = RunFolder(tmp_path)
    run.save_snapshot(0, replica, replica.store.base, replica.log)
    saved = load_file(tmp_path / "snapshots" / "step-000000000.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    replica.close()
    for store in ("host", "device"):
        replica = replica_of(model(), store)
        for image in getattr(replica.store, "_images", ()):
            image.zero_()
        for segments in getattr(replica.store, "segments", ()):
            for flat in segments:
                flat.zero_()
        restore_snapshot(run, replica, replica.log, lambda line: None)
        assert replica.fingerprint() == replica.store.base
        replica.close(give_back=True)
        assert all(torch.equal(p, expected[n]) for n, p in replica.model.named_parameters())
        assert all(p.device.type == "cpu" for p in replica.model.parameters())


@pytest.mark.parametrize("slices", [1, 2])
def test_a_run_goes_on_from_a_snapshot_alone(overrides, tmp_path, slices):
    """Slices are read from the one file; were a snapshot's bytes in the wrong place, the
    fingerprint would tell."""
    settings = [*overrides, "run.snapshot_every=2", "memory.store=host", "model.dtype=bfloat16"]
    expected = train([*settings, f"run.dir={tmp_path}/long", "run.steps=6"])
    mesh = [*settings, f"run.dir={tmp_path}/run", f"mesh.slice={slices}"]
    train([*mesh, "run.steps=4"], ranks=slices)
    assert train([*mesh, "run.steps=6"], ranks=slices)["fingerprint"] == expected["fingerprint"]


@torch.no_grad()
def test_a_disk_that_fills_in_a_snapshot_leaves_the_older_ones(tmp_path):
    made = make_llama()
    memory = MemoryConfig(store="host")
    replica = Replica(
        made, find_layout(made), lambda e: ModelSource(made), memory, torch.device("cpu"), Path()
    )
    replica.open(Log(HEADER))
    run = RunFolder(tmp_path)
    run.save_snapshot(0, replica, replica.store.base, replica.log)
    older = tmp_path / "snapshots" / "step-000000000.safetensors"
    before, limits = older.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"snapshot of step 1 cannot be written: .*the log is safe: make room"
        ):
            run.save_snapshot(1, replica, replica.store.base, replica.log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "snapshots") == [older.name]
    assert older.read_bytes() == before
    run.save_snapshot(2, replica, replica.store.base, replica.log)
    replica.close()


@torch.no_grad()
def test_only_snapshots_of_this_log_are_taken(tmp_path):
    """One of another run of the same base, or of entries that a repair cut and that were replaced,
    holds other weights."""
    log, other = Log({**HEADER, "run": "a"}), Log({**HEADER, "run": "b"})
    first, second = Entry(1, 1, 0.5, (1.0,)), Entry(2, 2, 0.5, (1.0,))
    for each in (log, other):
        each.extend([first, second])
    replica = Replica(
        made := make_llama(),
        find_layout(made),
        lambda e: ModelSource(made),
        MemoryConfig(store="host"),
        torch.device("cpu"),
        Path(),
    )
    replica.open(log)
    base, run = replica.store.base, RunFolder(tmp_path)
    run.save_snapshot(1, replica, base, log)
    run.save_snapshot(2, replica, base, log)
    replica.close()
    found, ignored = run.snapshot(base, log)
    assert (found.version, ignored) == (2, [])
    found, ignored = run.snapshot(base, other)
    assert found is None
    assert [line.partition(" is ignored: ")[2] for line in ignored] == ["it is of another run"] * 2
    cut = Log(log.header)
    cut.append(first)
    found, ignored = run.snapshot(base, cut)
    assert found.version == 1
    assert ignored == [
        f"{run.snapshots}/step-000000002.safetensors is ignored: the log ends at step 1"
    ]
    cut.append(Entry(2, 2, 0.5, (2.0,)))
    found, ignored = run.snapshot(base, cut)
    assert found.version == 1
    assert ignored == [
        f"{run.snapshots}/step-000000002.safetensors is ignored: it is of another run"
    ]


def test_a_run_says_which_snapshot_it_ignores(overrides, tmp_path):
    """As after --repair: the log is shorter than the newest snapshot."""
    # In float32 a product of few rows depends on the number of threads.
    settings = [*overrides, "run.snapshot_every=2", "eval.every=0", "run.threads=1"]
    settings.append(f"run.dir={tmp_path}/run")
    expected = train([*settings, "run.steps=4"])
    log = tmp_path / "run" / "steps.log"
    header, entries = read(log)
    log.unlink()
    shorter = Log.create(log, header)
    shorter.extend(entries[:3])
    shorter.close()
    command = [sys.executable, "launch/train.py", *settings, "run.steps=4"]
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(resumed.stdout)["fingerprint"] == expected["fingerprint"]
    assert "step-000000004.safetensors is ignored: the log ends at step 3" in resumed.stderr
