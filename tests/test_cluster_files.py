"""Cluster files: linted, checked against schemas; the batch script with a stand-in for Slurm."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from zo.config.recipes import load_config
from zo.state.log import read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MANIFEST = ROOT / "launch" / "kubernetes.yaml"
BATCH = ROOT / "launch" / "slurm.sbatch"
NODE = ROOT / "launch" / "node.sh"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"


def ran(*words, **options):
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    "command",
    [
        ("shellcheck", BATCH),
        ("shellcheck", NODE),
        ("shellcheck", ROOT / ".ci" / "release"),
        ("hadolint", DOCKERFILE),
    ],
)
def test_linters_have_nothing_to_say(command):
    done = ran(BIN / command[0], command[1])
    assert (done.returncode, done.stdout) == (0, "")


def manifests():
    return {m["kind"]: m for m in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.mark.parametrize("kind", ["Service", "PersistentVolumeClaim", "Job"])
def test_manifests_are_kubernetes(kind):
    kubernetes_validate.validate(manifests()[kind], "1.31", strict=True)


def test_what_the_manifests_name_is_there():
    found = manifests()
    job, service = found["Job"]["spec"], found["Service"]
    pod, container = job["template"]["spec"], job["template"]["spec"]["containers"][0]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = found["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim
    words = container["command"][-1].split()
    endpoint = words[words.index("--rdzv-endpoint") + 1]
    assert (
        endpoint == f"{found['Job']['metadata']['name']}-0.{pod['subdomain']}:"
        f"{service['spec']['ports'][0]['port']}"
    )
    assert int(words[words.index("--nnodes") + 1]) == job["parallelism"] == job["completions"]
    assert (
        int(words[words.index("--nproc-per-node") + 1])
        == container["resources"]["limits"]["nvidia.com/gpu"]
    )


def test_compose_gives_what_locked_memory_needs():
    service = yaml.safe_load(COMPOSE.read_text())["services"]["train"]
    assert service["ipc"] == "host"
    assert service["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    assert re.fullmatch(r"\d+gb", service["shm_size"])
    assert (
        COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]
    ).resolve() == DOCKERFILE


def test_commands_have_recipes_and_keys_that_zo_knows():
    kubernetes = manifests()["Job"]["spec"]["template"]["spec"]["containers"][0]["command"][
        -1
    ].split()
    compose = yaml.safe_load(COMPOSE.read_text())["services"]["train"]["command"]
    batch = re.search(r"^#\s+sbatch .*", BATCH.read_text(), re.MULTILINE)[0].split()
    for words in (kubernetes, compose, batch):
        keys = [
            word
            for word in words
            if re.match(r"[a-z_.]+=", word) and not word.startswith("is_host")
        ]
        recipe = next(key.removeprefix("recipe=") for key in keys if key.startswith("recipe="))
        config = load_config(recipe, [key for key in keys if not key.startswith("recipe=")])
        assert config.run.dir


def test_the_image_has_what_it_copies():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert any(f"!{part}" in ignored for part in (source, source.split("/")[0])), source


def test_the_health_check_trains(tmp_path):
    done = ran(sys.executable, ROOT / "docker" / "healthcheck.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("healthy: 2 steps")
    broken = ran(sys.executable, ROOT / "docker" / "healthcheck.py", "memory.slots=1", cwd=tmp_path)
    assert broken.returncode == 1
    assert "memory.slots=1 is out of range" in broken.stderr


@pytest.fixture
def slurm(tmp_path):
    """A PATH whose srun runs its command here, and whose scontrol notes what it is asked."""
    commands = {
        "srun": f'shift\necho $$ > {tmp_path}/step\nexec "$@"\n',
        "scancel": f'[[ "$*" == "--signal=TERM 7" ]] && kill -TERM "$(cat {tmp_path}/step)"\n',
        "scontrol": "if [[ $1 == show ]]; then echo localhost; "
        f'else echo "$@" >> {tmp_path}/asked; fi\n',
        "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n',
        "python": f'exec {shlex.quote(sys.executable)} "$@"\n',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
    }
    environment |= {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "PET_LOCAL_ADDR": "localhost",
    }
    return os.environ | environment, tmp_path / "asked"


def wait_for_steps(log, within_s=120):
    until = time.monotonic() + within_s
    while time.monotonic() < until and (not log.exists() or len(read(log)[1]) < 3):
        time.sleep(0.1)


def test_the_batch_script_queues_a_preempted_run_again(overrides, slurm, tmp_path):
    environment, asked = slurm
    settings = [*overrides, f"run.dir={tmp_path}/run", "run.steps=100000", "eval.every=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(["bash", BATCH, *settings], env=environment, cwd=ROOT, **pipes)
    log = tmp_path / "run" / "steps.log"
    wait_for_steps(log)
    job.send_signal(signal.SIGTERM)
    out, said = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert asked.read_text() == "requeue 7\n"
    steps = len(read(log)[1])
    assert f"after step {steps} of 100000; the same command resumes from there" in said, out
    done = ran(
        "bash",
        BATCH,
        *settings[:-2],
        f"run.steps={steps + 2}",
        "eval.every=0",
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == steps + 2
    assert asked.read_text() == "requeue 7\n"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_pods_end_when_one_is_evicted_and_none_is_complete_before_the_run(
    overrides, slurm, tmp_path
):
    """A pod that exits with 0 is not restarted; waiting for a lost torchrun takes 5 minutes."""
    environment, _ = slurm
    settings = [*overrides, f"run.dir={tmp_path}/run", "eval.every=0"]

    def pods(steps):
        words = [
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "zo",
        ]
        words += ["--rdzv-endpoint", f"localhost:{free_port()}", "--max-restarts", "3"]
        hosts = [["--rdzv-conf", f"is_host={is_host}"] for is_host in (1, 0)]
        run = ["launch/train.py", *settings, f"run.steps={steps}"]
        return [
            subprocess.Popen(
                [NODE, *words, *host, *run], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
            )
            for host in hosts
        ]

    log, running = tmp_path / "run" / "steps.log", pods(100000)
    wait_for_steps(log)
    running[1].terminate()
    assert [pod.wait(60) for pod in running] == [75, 75]
    assert [pod.wait(120) for pod in pods(len(read(log)[1]) + 2)] == [0, 0]
