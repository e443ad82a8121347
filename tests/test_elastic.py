"""Ranks that die, diverge, disagree or are stopped: no step is lost, and a line names the cause."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import KILLED, kill_at, lives, train

from zo.state.log import read

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SLICED = ["memory.store=host", "mesh.slice=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and summary of an uninterrupted process, once for all."""
    return tmp_path_factory.mktemp("alone") / "run", {}


@pytest.fixture
def expected(overrides, alone):
    folder, summary = alone
    if not summary:
        summary |= train([*overrides, "run.steps=6", f"run.dir={folder}"])
    return summary


def on_rank(rank, function, *arguments):
    """A prelude of one rank alone."""
    if int(os.environ["RANK"]) == rank:
        function(*arguments)


MOMENTS = {
    "in a gather of slices": ("zo.distributed.slices", "Slices.gather", 40, True),
    "between ranks' visits": ("zo.distributed.slices", "Slices.earliest", 30, False),
    "in the scalars": ("zo.distributed.process_group", "Mesh.gather", 3, True),
    "in a write-back": ("zo.streaming.stores", "HostStore.keep", 7, True),
}


@pytest.mark.parametrize(("moment", "rank"), zip(MOMENTS, (0, 1, 0, 1), strict=True))
def test_a_rank_killed_is_named_and_no_step_is_lost(overrides, expected, tmp_path, moment, rank):
    settings = [*overrides, *SLICED, "run.steps=6", "memory.lag=1", f"run.dir={tmp_path}/run"]
    results = lives(settings, ranks=2, prelude=(on_rank, rank, kill_at, *MOMENTS[moment]))
    assert results[rank] == KILLED
    assert f"RankError: rank {rank} (host {socket.gethostname()}) died" in results[1 - rank]
    # More ranks, or fewer: the mesh is not part of the result.
    assert (
        train([*settings, f"mesh.slice={rank + 1}"], ranks=rank + 1)["fingerprint"]
        == expected["fingerprint"]
    )


def sleep_at_step(step):
    from zo.run import trainer

    original = trainer.Run.step

    def sleepy(run, *asked):
        if run.log.version + 1 == step:
            time.sleep(8)
        return original(run, *asked)

    trainer.Run.step = sleepy


def test_a_rank_that_hangs_is_named_when_time_is_up(overrides, tmp_path):
    settings = [*overrides, "batch.micro=1", f"run.dir={tmp_path}/run", "mesh.timeout_s=3"]
    results = lives(settings, ranks=3, prelude=(on_rank, 2, sleep_at_step, 2))
    for result in results[:2]:
        assert (
            f"rank 2 (host {socket.gethostname()}) died, or did not respond within mesh.timeout_s=3"
            in result
        )
    assert len(read(tmp_path / "run" / "steps.log")[1]) == 1


def gather_late():
    """Each block's slice is brought up to date and gathered 20 ms after its transfer began."""
    from zo.streaming.cache import SlotCache

    original = SlotCache._exchange

    def exchange_late(cache, *arguments):
        time.sleep(0.02)
        return original(cache, *arguments)

    SlotCache._exchange = exchange_late


@pytest.mark.parametrize("late", [0, 1])
def test_blocks_loaded_ahead_of_a_step_are_of_one_version_on_every_rank(
    overrides, expected, tmp_path, late
):
    """A slice that is read before the step's entry and gathered after it is not replayed twice."""
    settings = [*overrides, *SLICED, "run.steps=6", "memory.lag=2", f"run.dir={tmp_path}/run"]
    found = train(settings, ranks=2, prelude=(on_rank, late, gather_late))
    assert found["fingerprint"] == expected["fingerprint"]


def flip_bits(step):
    """After a step, one bit of every block that this rank stores is another."""
    from zo.run import trainer

    original = trainer.Run.step

    def step_and_flip(run, *asked):
        result = original(run, *asked)
        if run.log.version == step:
            run.replica.drain()
            for image in getattr(run.replica.store, "_images", ()):
                image[:1] ^= 1
            for segments in getattr(run.replica.store, "segments", ()):
                segments[0][:1] += 1
        return result

    trainer.Run.step = step_and_flip


@pytest.mark.parametrize("store", [["memory.store=device"], SLICED], ids=["device", "slices"])
def test_a_rank_that_diverges_is_caught_and_named(overrides, tmp_path, store):
    settings = [*overrides, *store, f"run.dir={tmp_path}/run", "mesh.check_every=1", "run.steps=4"]
    results = lives(settings, ranks=2, prelude=(on_rank, 1, flip_bits, 2))
    assert all(
        "RankError: after step 2 the weights of rank 1 (block " in result for result in results
    ), results
    assert not any("of rank 0" in result for result in results)
    whole = train([*settings, "run.steps=4"], ranks=2)
    assert (
        whole["fingerprint"]
        == train([*overrides, "run.steps=4", f"run.dir={tmp_path}/alone"])["fingerprint"]
    )


@pytest.mark.parametrize("store", ["device", "disk"])
def test_ranks_that_agree_pass_every_check(overrides, expected, tmp_path, store):
    settings = [
        *overrides,
        f"memory.store={store}",
        "mesh.check_every=1",
        "run.steps=6",
        "memory.unit=module",
    ]
    settings += ["mesh.slice=2"] if store == "disk" else []
    assert (
        train([*settings, f"run.dir={tmp_path}/run"], ranks=2)["fingerprint"]
        == expected["fingerprint"]
    )


def two_disks(tmp_path):
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_loses_its_disk_loses_nothing(overrides, expected, tmp_path, lost):
    folders = two_disks(tmp_path)
    settings = [*overrides, "run.dir=run"]
    before = lives([*settings, "run.steps=4"], ranks=2, nodes=2, folders=folders)
    assert all(isinstance(result, dict) for result in before), before
    logs = [folder / "run" / "steps.log" for folder in folders]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    shutil.rmtree(folders[lost] / "run")
    after = lives([*settings, "run.steps=6"], ranks=2, nodes=2, folders=folders)
    assert [result["fingerprint"] for result in after] == [expected["fingerprint"]] * 2
    assert logs[0].read_bytes() == logs[1].read_bytes()
    assert len(read(logs[lost])[1]) == 6


def test_the_longest_log_wins(overrides, expected, tmp_path):
    """Rank 0 died before it wrote an entry that the other node has."""
    folders = two_disks(tmp_path)
    settings = [*overrides, "run.dir=run"]
    lives([*settings, "run.steps=4"], ranks=2, nodes=2, folders=folders)
    log = folders[0] / "run" / "steps.log"
    os.truncate(log, log.stat().st_size - 40)
    assert len(read(log)[1]) < 4
    after = lives([*settings, "run.steps=6"], ranks=2, nodes=2, folders=folders)
    assert [result["fingerprint"] for result in after] == [expected["fingerprint"]] * 2


def test_logs_of_two_runs_are_never_mixed(overrides, tmp_path):
    folders = two_disks(tmp_path)
    for folder, lr in zip(folders, ("1e-3", "2e-3"), strict=True):
        lives([*overrides, "run.dir=run", f"update.lr={lr}"], folders=[folder])
    results = lives([*overrides, "run.dir=run"], ranks=2, nodes=2, folders=folders)
    assert all("holds another run: update.lr" in result for result in results)
    (folders[1] / "run" / "config.yaml").write_bytes(
        (folders[0] / "run" / "config.yaml").read_bytes()
    )
    results = lives([*overrides, "run.dir=run"], ranks=2, nodes=2, folders=folders)
    assert all("config.yaml belong to two runs: run is " in result for result in results), results


def test_two_runs_with_the_same_settings_are_never_mixed(overrides, tmp_path):
    """Begun apart on two disks: only the identifiers in the headers of their logs differ."""
    folders, settings = two_disks(tmp_path), [*overrides, "run.dir=run", "run.steps=2"]
    for folder in folders:
        lives(settings, folders=[folder])
    logs = [(folder / "run" / "steps.log").read_bytes() for folder in folders]
    results = lives([*settings, "run.steps=4"], ranks=2, nodes=2, folders=folders)
    assert all(
        "the logs of ranks 0 and 1 belong to two runs: run is " in result for result in results
    ), results
    assert logs == [(folder / "run" / "steps.log").read_bytes() for folder in folders]


def test_copies_of_a_log_that_parted_are_never_mixed(overrides, tmp_path):
    """The same run, continued on each of two disks by itself: one header, two histories."""
    folders = two_disks(tmp_path)
    lives([*overrides, "run.dir=run", "run.steps=2"], folders=[folders[0]])
    shutil.copytree(folders[0] / "run", folders[1] / "run")
    settings = [*overrides, "run.dir=run", "run.steps=4"]
    lives(settings, folders=[folders[0]])
    lives([*settings, "update.lr=2e-3"], folders=[folders[1]], prelude=(accept_any_config,))
    logs = [(folder / "run" / "steps.log").read_bytes() for folder in folders]
    assert logs[0] != logs[1]
    shutil.copy(folders[0] / "run" / "config.yaml", folders[1] / "run" / "config.yaml")
    results = lives(settings, ranks=2, nodes=2, folders=folders)
    assert all("differ: they belong to two runs" in result for result in results), results
    assert logs == [(folder / "run" / "steps.log").read_bytes() for folder in folders]


def accept_any_config():
    """Let this process continue a run with other settings, as an older zo may have."""
    from zo.state.run_folder import RunFolder

    RunFolder.check = lambda *_: None


def test_nodes_of_other_versions_or_weights_are_named(overrides, tiny_model, tmp_path):
    results = lives(
        [*overrides, f"run.dir={tmp_path}/a"], ranks=2, prelude=(on_rank, 1, pretend_older)
    )
    assert all("rank 1 (host" in r and "has torch 2.0.0, not 2." in r for r in results), results
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (other / "model.safetensors").write_bytes(data)
    each = [
        [*overrides, f"run.dir={tmp_path}/b"],
        [*overrides, f"run.dir={tmp_path}/b", f"model.name={other}"],
    ]
    results = lives(each, ranks=2)
    assert all("has other base weights than rank 0" in result for result in results), results
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_clocks_that_are_apart_are_named(overrides, tmp_path):
    """torchrun's rendezvous would take one of the nodes for dead."""
    results = lives(
        [*overrides, f"run.dir={tmp_path}/run"], ranks=2, prelude=(on_rank, 1, be_ahead, 60)
    )
    assert all(
        "the clocks of rank 1 (host" in r and "are 60 s apart; set them (NTP)" in r for r in results
    ), results


def be_ahead(seconds):
    from types import SimpleNamespace

    from zo.run import startup

    startup.time = SimpleNamespace(time=lambda: time.time() + seconds)


def pretend_older():
    from zo.run import startup

    true = startup.versions
    startup.versions = lambda device: true(device) | {"torch": "2.0.0"}


def command(overrides, *launcher):
    return [*launcher, str(ROOT / "launch" / "train.py"), *map(str, overrides)]


def start(arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, **pipes, **options)


def wait_for_steps(folder, steps, within_s=120):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        with_log = (folder / "steps.log").exists()
        if with_log and len(read(folder / "steps.log")[1]) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} has not come to step {steps}")


def test_a_second_run_in_the_same_folder_is_refused_by_name(overrides, tmp_path):
    settings = [*overrides, f"run.dir={tmp_path}/run", "run.steps=100000"]
    first = start(command(settings, sys.executable))
    try:
        wait_for_steps(tmp_path / "run", 1)
        second = start(command(settings, sys.executable))
        _, said = second.communicate(timeout=120)
        assert second.returncode == 2
        line = said.strip().splitlines()[-1]
        assert (
            f"is locked by a running process (host {socket.gethostname()}, process {first.pid})"
            in line
        )
    finally:
        first.kill()
        first.communicate()


def test_sigterm_finishes_the_step_and_says_how_to_go_on(overrides, tmp_path):
    settings = [*overrides, f"run.dir={tmp_path}/run", "update.schedule=constant"]
    process = start(command([*settings, "run.steps=100000"], sys.executable))
    wait_for_steps(tmp_path / "run", 3)
    process.terminate()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0
    steps = len(read(tmp_path / "run" / "steps.log")[1])
    assert f"after step {steps} of 100000; the same command resumes from there" in said
    assert not out
    assert not (tmp_path / "run" / "lock").exists()
    expected = train([*settings, f"run.dir={tmp_path}/alone", f"run.steps={steps + 2}"])
    assert train([*settings, f"run.steps={steps + 2}"])["fingerprint"] == expected["fingerprint"]


def test_a_run_that_may_restart_needs_a_folder(overrides):
    launcher = [
        *TORCHRUN,
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "1",
        "--master-port",
        str(free_port()),
    ]
    process = start(command(overrides, *launcher))
    _, said = process.communicate(timeout=120)
    assert process.returncode
    assert "error: run.dir is empty, and a restart would begin another run" in said


def test_ranks_that_cannot_meet_say_so(overrides, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {
            "MASTER_PORT": str(taken.getsockname()[1]),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "2",
        }
        done = subprocess.run(
            command([*overrides, f"run.dir={tmp_path}/run", "mesh.timeout_s=3"], sys.executable),
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: rank 0 cannot connect to the other 1 at 127.0.0.1:"), done.stderr
    assert not (tmp_path / "run").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
