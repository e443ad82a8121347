"""One run under torchrun with one kill -9; a seed draws the rank and the moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from zo.state.log import read

HERE = Path(__file__).resolve().parent
MOMENTS = {
    "any": None,
    "log's append": ("zo.state.log", "Log._write", False),
    "in the append": ("os", "pwrite", False),
    "write-back": ("zo.streaming.{module}", "{store}.keep", True),
    "gather": ("zo.distributed.slices", "Slices.gather", True),
    "scalars": ("zo.distributed.process_group", "Mesh.gather", False),
}
SETTINGS = (
    ("host", 2, 2),
    ("disk", 2, 2),
    ("disk", 2, 1),
    ("host", 3, 3),
    ("device", 2, 1),
)
"""Store, ranks, slices."""
STEPS = 30


def fate(seed):
    """Return the rank and moment of a seed."""
    chance = random.Random(seed)
    names = list(MOMENTS)
    # Every second run dies at any time, the others in turn at a moment of interest.
    name = "any" if seed % 2 else names[1 + seed // 2 % (len(names) - 1)]
    store, ranks, slices = chance.choice(SETTINGS)
    if (name == "write-back" and store == "device") or (name == "gather" and slices == 1):
        store, ranks, slices = SETTINGS[0]
    # Rank 0 alone writes the log.
    rank = 0 if "append" in name else chance.randrange(ranks)
    step = chance.randrange(2, STEPS - 2)
    return {
        "moment": name,
        "store": store,
        "ranks": ranks,
        "slices": slices,
        "rank": rank,
        "step": step,
    }


def command(overrides, ranks):
    """Return the command line of a torchrun that restarts its ranks."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        ranks,
        "--max-restarts",
        2,
    ]
    torchrun += [
        "--monitor-interval",
        0.2,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return [str(word) for word in (*torchrun, HERE / "chaos_rank.py", *overrides)]


def run(overrides, folder, seed):
    """Run once; return the fate, the summary, and true if the ranks were restarted."""
    drawn = fate(seed)
    settings = [
        *overrides,
        f"memory.store={drawn['store']}",
        "memory.lag=2",
        f"mesh.slice={drawn['slices']}",
    ]
    settings += [f"run.steps={STEPS}", f"run.dir={folder}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "PET_LOCAL_ADDR": "localhost",
    }
    at = MOMENTS[drawn["moment"]]
    if at is not None:
        module, function, before = at
        in_disk_store = ("disk_store", "DiskStore")
        place, store = in_disk_store if drawn["store"] == "disk" else ("stores", "HostStore")
        # Functions that are called at every block are called some ten times a step.
        calls = drawn["step"] * (5 if drawn["moment"] == "gather" else 1)
        environment["CHAOS"] = json.dumps(
            {
                "rank": drawn["rank"],
                "at": [
                    module.format(module=place),
                    function.format(store=store),
                    calls,
                    before,
                ],
            }
        )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(settings, drawn["ranks"]), env=environment, **pipes)
    if at is None:
        kill_at_step(process, Path(folder) / "steps.log", drawn, random.Random(seed).random() * 0.3)
    out, said = process.communicate(timeout=300)
    if process.returncode:
        raise AssertionError(f"{drawn}: {said}")
    summary = json.loads(out.strip().splitlines()[-1])
    # The agent reports a worker that failed; a run that had no step yet is not resumed.
    restarted = "resuming" in said or "failed (exitcode" in said
    return drawn, summary, restarted


def kill_at_step(process, log, drawn, jitter_s):
    """Kill a rank when the log has a step, and a moment more."""
    while process.poll() is None and (not log.exists() or steps(log) < drawn["step"]):
        time.sleep(0.01)
    time.sleep(jitter_s)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(drawn["rank"]):
            os.kill(child.pid, signal.SIGKILL)
            return


def steps(log):
    try:
        return len(read(log)[1])
    except ValueError:
        return 0
