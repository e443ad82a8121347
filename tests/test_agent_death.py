"""A torchrun agent that is killed takes its ranks with it, so that the same command can go on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from zo.state.log import read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "launch/train.py",
]


def start(settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PET_LOCAL_ADDR": "localhost"}
    return subprocess.Popen(
        [*COMMAND, *settings], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def test_ranks_end_with_a_killed_agent_and_the_same_command_goes_on(overrides, tmp_path):
    settings = [*overrides, f"run.dir={tmp_path}/run", "eval.every=0", "update.schedule=constant"]
    agent, log = start([*settings, "run.steps=100000"]), tmp_path / "run" / "steps.log"
    until = time.monotonic() + 120
    while (
        time.monotonic() < until
        and agent.poll() is None
        and (not log.exists() or len(read(log)[1]) < 3)
    ):
        time.sleep(0.1)
    ranks = psutil.Process(agent.pid).children(recursive=True)
    try:
        assert len(ranks) >= 2
        agent.kill()
        agent.wait(10)  # Its ranks hold its pipe if they live on.
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    steps = len(read(log)[1])
    again = start([*settings, f"run.steps={steps + 1}"])
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert len(read(log)[1]) == steps + 1
