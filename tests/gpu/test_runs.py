"""Whole runs on a GPU, in processes of their own: bits, memory, waits, commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from plain import plain_config
from ranks import train
from torch import nn

ROOT = Path(__file__).parents[2]
GPU = ["run.device=cuda", "update.weight_decay=0.1"]
PLACES = {
    "device": ["memory.store=device"],
    "host": ["memory.store=host", "memory.slots=2", "memory.lag=1"],
    "host, not locked": ["memory.store=host", "memory.pin=false", "memory.lag=2"],
    "host, by module": ["memory.store=host", "memory.unit=module", "memory.slots=3"],
    "host, activations too": ["memory.store=host", "memory.activations=host"],
    "disk": ["memory.store=disk", "memory.disk_engine=mmap", "memory.slots=2", "memory.lag=2"],
    "disk, by module": ["memory.store=disk", "memory.disk_engine=mmap", "memory.unit=module"],
}

pytestmark = pytest.mark.slow


def launch(command, *arguments, prelude=""):
    """Run a command of ``launch/``; ``prelude`` is Python that runs before it."""
    path = str(ROOT / "launch" / command)
    program = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'launch')!r})\n{prelude}\n"
    program += (
        f"sys.argv = [{path!r}, *sys.argv[1:]]; runpy.run_path({path!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_store_gives_the_same_bits(overrides, tmp_path, dtype):
    """Only a GPU has copies that run late, and products whose bits a library may choose anew."""
    found = {}
    for number, (name, place) in enumerate(PLACES.items()):
        settings = [*overrides, *GPU, *place, f"model.dtype={dtype}"]
        summary = train([*settings, f"run.dir={tmp_path}/{number}"])
        found[name] = summary["fingerprint"], summary["loss"], summary["eval"]
    assert len(set(map(str, found.values()))) == 1, found


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "rank-one"])
def test_a_run_repeated_has_equal_bits(overrides, tmp_path, distribution):
    """An operation that sums by atomics gives other bits each time; a resume would then fork."""
    settings = [*overrides, *GPU, f"estimator.distribution={distribution}", "run.steps=8"]
    first, second = (train([*settings, f"run.dir={tmp_path}/{i}"]) for i in range(2))
    for key in ("fingerprint", "loss", "eval"):
        assert first[key] == second[key]


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folds_and_parts_have_equal_bits_in_every_store(overrides, tmp_path, place, dtype):
    """Corrections are made of weights in slots, and a block's rows meet in one product."""
    probes = ["estimator.distribution=rank-one", "estimator.cover=diagonal", "batch.micro=1"]
    probes += ["estimator.directions=null", "estimator.part=sampled", "estimator.probes=2"]
    settings = [*overrides, *GPU, *probes, f"model.dtype={dtype}", "run.steps=6"]
    first, second = (
        train([*settings, *PLACES[where], f"run.dir={tmp_path}/{where}"])
        for where in ("device", place)
    )
    assert first["fingerprint"] == second["fingerprint"] and first["loss"] == second["loss"]


def test_a_log_of_a_gpu_is_replayed_on_a_cpu_with_equal_bits(overrides, tmp_path):
    """A published log is only worth something if any machine rebuilds the weights from it."""
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        summary = train([*overrides, *GPU, f"model.dtype={dtype}", f"run.dir={folder}"])
        done = launch("evaluate.py", f"run={folder}", "run.device=cpu")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["fingerprint"] == summary["fingerprint"]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_evaluation_and_export_compute_on_the_gpu(overrides, tmp_path, place):
    """Commands that read a run open its stores on the GPU too; their scores are the run's own."""
    settings = [*overrides, *GPU, *PLACES[place], "export.at_end=true"]
    summary = train([*settings, f"run.dir={tmp_path}/run"])
    done = launch("evaluate.py", f"run={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["fingerprint"] == summary["fingerprint"]
    assert said["eval"].items() <= summary["eval"].items()
    done = launch("export.py", f"run={tmp_path}/run", f"to={tmp_path}/to")
    assert done.returncode == 0, done.stderr
    files = [f / "model.safetensors" for f in (tmp_path / "run" / "model", tmp_path / "to")]
    assert files[0].read_bytes() == files[1].read_bytes()


LITTLE = """
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(64 * 2**20 / total)
"""


def test_too_little_gpu_memory_is_one_line_and_exit_code_2(overrides, tokenizer, tmp_path):
    """For real: the allocator of CUDA refuses what is over its limit."""
    model = make_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [f"model.name={tmp_path}/model", f"run.dir={tmp_path}/run", *PLACES["device"]]
    done = launch("train.py", *overrides[1:], *GPU, *settings, prelude=LITTLE)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the GPU's memory is too small (")


def two_runs(settings, folder):
    from zo import Trainer

    runs = [plain_config([*settings, f"run.dir={folder}/{i}"]) for i in range(2)]
    return [Trainer(config).train()["fingerprint"] for config in runs]


@pytest.mark.parametrize("pin", ["true", "false"])
def test_two_runs_in_one_process(overrides, tmp_path, apart, pin):
    """The second run is given the first one's memory: pages still locked cannot be locked again."""
    settings = [*overrides, *GPU, "memory.store=host", f"memory.pin={pin}"]
    first, second = apart(two_runs, settings, tmp_path)
    assert first == second


def without_waits(settings, model, chunk_bytes):
    """Train with CUDA's check of synchronising calls on in the forwards of later steps."""
    import zo.model.blocks
    from zo import Trainer
    from zo.streaming.replica import Replica

    zo.model.blocks.CHUNK_BYTES = chunk_bytes
    table, checked = Replica.table, []

    def check_and_fill(self, *arguments):
        # The first step compiles kernels, and the libraries make their handles.
        if self.log.version == 0:
            return table(self, *arguments)
        checked.append(len(arguments[2]))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return table(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    Replica.table = check_and_fill
    Trainer(plain_config([*settings, f"model.name={model}"])).train()
    return checked


@pytest.mark.parametrize("place", ["device", "host", "host, by module"])
def test_the_host_does_not_wait_within_a_steps_forwards(
    overrides, tokenizer, tmp_path, apart, place
):
    """A wait at each block would leave the GPU idle between kernels; it costs no bits, only time.

    The vocabulary is cut into chunks. Eager attention, because transformers asks the mask for its
    values before it calls another kind.
    """
    make_llama(vocab_size=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [*overrides, *GPU, *PLACES[place], "model.attention=eager", "eval.every=0"]
    settings += [f"run.dir={tmp_path}/run"]
    checked = apart(without_waits, settings, tmp_path / "model", 20_000)
    assert checked == [4, 4, 4]  # Two rows and two columns in each step but the first.


def own_model(folder, place):
    """Train a model of one's own and return where its weights lie then, and their sum."""
    from zo import Trainer

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    before = [p.detach().clone() for p in net.parameters()]
    settings = ["run.steps=3", "batch.sequences=4", "batch.micro=2", "update.lr=1e-2"]
    settings += ["eval.every=0", "export.at_end=false", *GPU, *place, f"run.dir={folder}"]

    def objective(net, batch):
        loss = (net(batch["x"]) - 1).square().sum()
        return torch.stack((loss, torch.full_like(loss, 2.0)))

    trainer = Trainer(
        plain_config(settings),
        model=net,
        objective=objective,
        batches=lambda step, column: {"x": torch.full((2, 64), step + column / 2)},
    )
    trainer.train()
    after = [p.detach().cpu() for p in net.parameters()]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    return {p.device.type for p in net.parameters()}, changed, [p.numpy() for p in after]


def test_a_model_of_ones_own_is_given_back(tmp_path, apart):
    """Its weights may be more than the GPU holds: a streamed model comes back in host memory."""
    found = {n: apart(own_model, tmp_path / n, PLACES[n]) for n in ("device", "host", "disk")}
    assert found["device"][0] == {"cuda"}
    assert found["host"][0] == found["disk"][0] == {"cpu"}
    for _, changed, weights in found.values():
        assert all(changed)
        pairs = zip(weights, found["device"][2], strict=True)
        assert all((mine == theirs).all() for mine, theirs in pairs)
