"""Memory in control groups, devices that are not there, and too little memory: each told before or
as it happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from plain import PLAIN, run

from zo.config import cli as launcher
from zo.errors import UserError
from zo.io import hardware
from zo.method.kernels import replay_and_perturb
from zo.method.passes import Pass, Probe

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def group(folder, limit, used, inactive, v1=False):
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if v1
        else ("memory.max", "memory.current")
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = f"anon 1\ninactive_file {inactive if not v1 else 3}\n"
    (folder / "memory.stat").write_text(stat + (f"total_inactive_file {inactive}\n" if v1 else ""))


def belongs_to(root, line):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"12:cpu,cpuacct:/elsewhere\n{line}\n")


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """Have the control groups decide."""
    from types import SimpleNamespace

    monkeypatch.setattr(
        hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * GIB)
    )


def test_page_cache_counts_as_free(tmp_path):
    """A checkpoint that was just read fills the cache; host stores would be refused in any
    container."""
    belongs_to(tmp_path, "0::/")
    group(tmp_path / "sys/fs/cgroup", 64 * GIB, 63 * GIB, 60 * GIB)
    assert hardware.available_host_bytes(tmp_path) == 61 * GIB


def test_page_cache_counts_as_free_in_version_1(tmp_path):
    """Docker without a namespace names the host's path, and mounts the container's own group at the
    root."""
    belongs_to(tmp_path, "5:memory:/docker/0123")
    group(tmp_path / "sys/fs/cgroup/memory", 64 * GIB, 63 * GIB, 60 * GIB, v1=True)
    assert hardware.available_host_bytes(tmp_path) == 61 * GIB


def test_the_smallest_group_up_the_path_decides(tmp_path):
    belongs_to(tmp_path, "0::/slurm/job_7/step_0")
    base = tmp_path / "sys/fs/cgroup"
    group(base / "slurm", "max", 500 * GIB, 0)
    group(base / "slurm/job_7", 32 * GIB, 20 * GIB, 4 * GIB)
    group(base / "slurm/job_7/step_0", 40 * GIB, 10 * GIB, 0)
    assert hardware.available_host_bytes(tmp_path) == 16 * GIB
    group(base / "slurm/job_7/step_0", 12 * GIB, 10 * GIB, 0)
    assert hardware.available_host_bytes(tmp_path) == 2 * GIB


def test_a_group_outside_of_the_container_is_not_looked_for(tmp_path):
    belongs_to(tmp_path, "0::/../other")
    group(tmp_path / "sys/fs/cgroup", 8 * GIB, 9 * GIB, 0)
    assert hardware.available_host_bytes(tmp_path) == 0


def test_no_limit(tmp_path):
    belongs_to(tmp_path, "0::/user.slice")
    assert hardware.available_host_bytes(tmp_path) == 1000 * GIB
    group(tmp_path / "sys/fs/cgroup/user.slice", "max", GIB, 0)
    assert hardware.available_host_bytes(tmp_path) == 1000 * GIB


def test_cuda_without_a_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        UserError, match=r"run\.device=cuda needs a GPU, and PyTorch .* use run\.device=cpu"
    ):
        hardware.choose_device("cuda")
    assert hardware.choose_device("auto") == torch.device("cpu")


def test_more_ranks_than_gpus_is_one_line(monkeypatch):
    """What torch says of the machine is the one thing that stands in: two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for asked in ("cuda", "auto"):
        with pytest.raises(UserError, match=r"4 ranks on this node and 2 GPUs.*--nproc-per-node 2"):
            hardware.choose_device(asked)
    assert hardware.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert hardware.choose_device("cuda") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    "kind", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), MemoryError()]
)
def test_out_of_memory_says_what_to_change(kind):
    said = launcher.out_of_memory(kind)
    assert "memory is too small" in said
    assert "batch.micro" in said
    assert launcher.out_of_memory(RuntimeError("size mismatch")) is None


LIMITED = """
import resource, runpy, sys
sys.path.insert(0, {root!r})
import zo.method.kernels.cpu, zo.run.trainer
from zo.state.log import Log
size = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + {room}, size + {room}))
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", ["device", "host"])
def test_too_little_host_memory_is_one_line_and_exit_code_2(reviews, tokenizer, tmp_path, store):
    """For real: the kernel refuses the pages."""
    # Compiled here and cached: a compiler in so little memory would end in other ways.
    pair = Pass(0, "rademacher", (), (Probe(0, 1.0), Probe(0, -1.0)))
    replay_and_perturb(torch.zeros(128), 0, pair, torch.empty(2, 128))
    model = make_llama(hidden_size=1024, intermediate_size=8192, num_hidden_layers=6)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    train = str(ROOT / "launch" / "train.py")
    argv = [
        train,
        *PLAIN,
        f"model.name={tmp_path}/model",
        f"data.name={reviews}",
        "data.template='{text} it was'",
    ]
    argv += [
        "data.label_words=[terrible,great]",
        "batch.sequences=2",
        "batch.micro=2",
        "run.steps=1",
        "run.threads=1",
    ]
    argv.append("batch.max_tokens=64")
    argv += [f"run.dir={tmp_path}/run", f"memory.store={store}"]
    code = LIMITED.format(root=str(ROOT), room=700 * 2**20, argv=argv)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_NUM_THREADS": "2"},
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: the host's memory is too small")
    assert "memory.store=disk" in run.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_run_is_scored_on_its_own_device_and_torchrun_speaks_once(command, overrides, tmp_path):
    """Scores, fingerprint and the one JSON line are the same with two ranks; only one may
    export."""
    summary = run([*overrides, "run.device=cpu"], tmp_path / "run")
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun = lambda name, *words: subprocess.run(  # noqa: E731
        [sys.executable, *ranks, ROOT / "launch" / f"{name}.py", f"run={tmp_path}/run", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    (line,) = torchrun("evaluate").stdout.splitlines()
    assert json.loads(line)["eval"] == summary["eval"]
    assert json.loads(line)["fingerprint"] == summary["fingerprint"]
    refused = torchrun("export", f"to={tmp_path}/out")
    assert (
        refused.stderr.count(
            "error: a model is exported by one process; start it with python launch/export.py"
        )
        == 2  # The second one ends torchrun's report.
    )
    assert not (tmp_path / "out").exists()
    if not torch.cuda.is_available():
        for name in ("evaluate", "export"):
            words = [f"to={tmp_path}/out"] * (name == "export")
            code, _, err = command(name, f"run={tmp_path}/run", "run.device=cuda", *words)
            assert code == 2
            assert err.startswith("error: run.device=cuda needs a GPU")
