"""Ranks on GPUs of their own: NCCL instead of gloo, and a CUDA context in every process."""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import KILLED, kill_at, lives, train

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20
SLICES = ["memory.store=host", "mesh.slice=2", "memory.lag=2", "run.device=cuda"]

pytestmark = [pytest.mark.gpus(2), pytest.mark.slow]


def test_torchrun_with_slices_over_nccl_has_the_bits_of_one_gpu(overrides, tmp_path):
    """NCCL gathers in place from the own slice, on a stream of its own; gloo does neither."""
    alone = train([*overrides, "run.device=cuda", f"run.dir={tmp_path}/alone"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "launch" / "train.py"), *overrides, *SLICES, f"run.dir={tmp_path}/two"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["fingerprint"] == alone["fingerprint"]
    assert summary["eval"] == alone["eval"]


def die_in_a_gather(rank):
    if int(os.environ["RANK"]) == rank:
        kill_at("zo.distributed.slices", "Slices.gather", 12, before=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_peer_in_a_gather_is_named_in_time(overrides, tmp_path, rank):
    """NCCL raises no error in the thread that waits; a run would stand still on paid GPUs."""
    settings = [*overrides, *SLICES, f"mesh.timeout_s={TIMEOUT_S}", f"run.dir={tmp_path}/run"]
    begun = time.monotonic()
    results = lives(settings, ranks=2, prelude=(die_in_a_gather, rank))
    assert results[rank] == KILLED
    assert f"RankError: rank {rank} (host {socket.gethostname()}) died" in results[1 - rank]
    assert time.monotonic() - begun < TIMEOUT_S + 60  # A minute to start in.
    again = train(settings, ranks=2)
    assert again["steps"] == 4


def contexts():
    """Numbers of the GPUs on which this process has a context, by the driver."""
    driver, found = ctypes.CDLL("libcuda.so.1"), []
    for gpu in range(torch.cuda.device_count()):
        device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        assert driver.cuDeviceGet(ctypes.byref(device), gpu) == 0
        state = driver.cuDevicePrimaryCtxGetState
        assert state(device, ctypes.byref(flags), ctypes.byref(active)) == 0
        if active.value:
            found.append(gpu)
    return found


def report_contexts():
    """Add the contexts at a run's end to what it returns."""
    from zo.run.trainer import Run

    finish = Run._finish

    def finish_and_look(self, *arguments):
        return finish(self, *arguments) | {"contexts": contexts()}

    Run._finish = finish_and_look


def test_a_rank_has_a_context_on_its_own_gpu_alone(overrides, tmp_path):
    """A worker thread that names no GPU makes one on GPU 0: 300 MiB or more of it for each rank."""
    settings = [*overrides, *SLICES, f"run.dir={tmp_path}/run"]
    results = lives(settings, ranks=2, prelude=(report_contexts,))
    assert all(isinstance(result, dict) for result in results), results
    assert [result["contexts"] for result in results] == [[0], [1]], results
