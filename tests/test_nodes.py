"""Two nodes on one machine: network namespaces, each with its own folder and two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from logs import same_log
from ranks import train

from zo.state.log import read

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("10.77.31.1", "10.77.31.2")
STEPS = 40


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture
def nodes():
    """Names of two namespaces with a veth pair between them."""
    names = [f"zo{os.getpid()}n{i}" for i in range(2)]
    try:
        made = [ip("netns", "add", name, check=False) for name in names]
    except FileNotFoundError:
        pytest.skip("no ip command (Debian's iproute2)")
    if any(m.returncode for m in made):
        pytest.skip(f"network namespaces are not allowed here: {made[0].stderr.strip()}")
    ends = [f"v{os.getpid()}a", f"v{os.getpid()}b"]
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for name, end, address in zip(names, ends, ADDRESSES, strict=True):
        ip("link", "set", end, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield list(zip(names, ends, strict=True))
    for name in names:
        ip("netns", "del", name, check=False)


def start(node, index, overrides, folder, said):
    name, end = node
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
    ]
    torchrun += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{ADDRESSES[0]}:29871",
        "--rdzv-id",
        "zo",
    ]
    torchrun += [
        "--rdzv-conf",
        f"is_host={1 - index}",
        "--local-addr",
        ADDRESSES[index],
        "--max-restarts",
        "3",
    ]
    torchrun += ["--monitor-interval", "0.2", str(ROOT / "launch" / "train.py"), *overrides]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *torchrun],
        cwd=folder,
        env=environment,
        stdout=open(folder / "out", "w"),
        stderr=open(said, "a"),
    )


def kill_all(process):
    """A node that loses its power."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        os.kill(one.pid, signal.SIGKILL)
    process.wait()


def test_a_node_dies_and_comes_back(overrides, nodes, tmp_path):
    settings = [
        *overrides,
        "run.dir=run",
        f"run.steps={STEPS}",
        "eval.every=0",
        "memory.store=host",
        "mesh.slice=2",
    ]
    settings += ["estimator.directions=2", "model.dtype=bfloat16"]
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
    said = [tmp_path / "said0", tmp_path / "said1"]
    running = [start(node, i, settings, folders[i], said[i]) for i, node in enumerate(nodes)]
    try:
        wait_for_step(folders[0] / "run" / "steps.log", 5, running)
        kill_all(running[1])
        running[1] = start(nodes[1], 1, settings, folders[1], said[1])
        for i, process in enumerate(running):
            assert process.wait(240) == 0, said[i].read_text()[-3000:]
    finally:
        for process in running:
            if process.poll() is None:
                kill_all(process)
    alone = train([*settings, f"run.dir={tmp_path}/alone", "mesh.slice=1"])
    summaries = [text for folder in folders if (text := (folder / "out").read_text().strip())]
    assert [json.loads(text.splitlines()[-1])["fingerprint"] for text in summaries] == [
        alone["fingerprint"]
    ]
    logs = [(folder / "run" / "steps.log").read_bytes() for folder in folders]
    assert logs[0] == logs[1]
    assert same_log(folders[0] / "run" / "steps.log", tmp_path / "alone" / "steps.log")


def wait_for_step(log, step, running):
    until = time.monotonic() + 150
    while time.monotonic() < until and all(process.poll() is None for process in running):
        if log.exists() and len(read(log)[1]) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{log} has not come to step {step}")
