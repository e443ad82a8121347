"""SIGINT and SIGTERM: last line, exit code and files of commands that real signals end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from zo.state.log import read

pytestmark = pytest.mark.slow  # Whole runs in processes of their own.

ROOT = Path(__file__).resolve().parent.parent
PREPARED = "import sys; sys.path.insert(0, {root!r}); sys.argv = {argv!r}; {before}; "
SLOW_STEPS = (
    "import time; from zo.state.log import Log; a = Log.append; "
    "Log.append = lambda s, e: (time.sleep(0.5), a(s, e))"
)


def start(script, arguments, cwd, before="pass", prefix=()):
    """Start a command as a shell does, after some code in the same process."""
    path = str(ROOT / "launch" / f"{script}.py")
    run = f"import runpy; runpy.run_path({path!r}, run_name='__main__')"
    argv = [path, *map(str, arguments)]
    code = PREPARED.format(root=str(ROOT), argv=argv, before="pass") + before + "\n" + run
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        # A test started in a shell's background has SIGINT ignored, and children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def lines_until(process, pattern):
    """Read stderr up to a line; return all lines so far."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"{pattern!r} was not said: {''.join(lines)}")


def ended(process, code, said):
    """Wait for a process and check its exit code and last line; there is no traceback."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert said in err.splitlines()[-1]
    return out, err


@pytest.fixture
def long_run(overrides, tmp_path):
    return [*overrides, "run.steps=1000", "eval.every=0", f"run.dir={tmp_path}/run"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_during_imports(tmp_path, sent, code):
    process = start("train", ["run.steps=1"], tmp_path, "import os")
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        # hydra is what the command imports first.
        if any("site-packages" in m.path for m in psutil.Process(process.pid).memory_maps()):
            break
        time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(sent)
    ended(process, code, f"ended by {sent.name}; start the same command again")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("phase", ["reading", "checking", "loading"])
def test_before_the_first_step(long_run, tmp_path, phase):
    """Each phase is told before it begins; held up there, the process answers Ctrl-C."""
    called = {
        "reading": "trainer.build_problem",
        "checking": "assemble.self_check",
        "loading": "assemble.Replica",
    }
    module, _, name = called[phase].partition(".")
    held = f"import time, zo.run.{module} as m; m.{name} = lambda *a, **k: time.sleep(600)"
    process = start("train", long_run, tmp_path, held)
    lines_until(process, f"^{phase} ")
    process.send_signal(signal.SIGINT)
    ended(process, 130, f"the same command with run.dir={tmp_path}/run resumes the run")


def test_ctrl_c_in_a_step_loses_no_step(long_run, tmp_path):
    process = start("train", long_run, tmp_path)
    lines_until(process, "step 1/1000")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    ended(
        process,
        130,
        f"ended by SIGINT; no completed step is lost: the same command with run.dir={tmp_path}/run",
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["phase"] == "stopped"
    assert 'class="pill stopped"' in (tmp_path / "run" / "report.html").read_text()
    steps = len(read(tmp_path / "run" / "steps.log")[1])
    assert steps >= 1
    again = start("train", [*long_run, f"run.steps={steps + 1}"], tmp_path)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert json.loads(out)["steps"] == steps + 1


def test_sigterm_answers_at_once_and_ends_after_the_step(long_run, tmp_path):
    process = start("train", long_run, tmp_path, SLOW_STEPS.replace("0.5", "4"))
    lines_until(process, "table 2 x 2")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    lines_until(process, "SIGTERM: the run ends after this step; send it again to end now")
    assert time.monotonic() - sent < 2
    ended(process, 0, "resumes from there")
    assert len(read(tmp_path / "run" / "steps.log")[1]) == 1


def test_a_second_sigterm_ends_within_the_step(long_run, tmp_path):
    """Also while the main thread waits in C and runs no handler, as in a collective."""
    stuck = "import ctypes; from zo.state.log import Log; Log.append = lambda s, e: [" + (
        "ctypes.CDLL(None).sleep(600) for _ in range(600)]"
    )
    process = start("train", long_run, tmp_path, stuck)
    lines_until(process, "table 2 x 2")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    lines_until(process, "send it again")
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended(process, 143, "ended by SIGTERM; no completed step is lost")
    assert time.monotonic() - sent < 10


def test_in_an_export_nothing_is_left(overrides, tmp_path):
    run = [*overrides, "run.steps=1", "eval.every=0", f"run.dir={tmp_path}/run"]
    assert start("train", run, tmp_path).wait(120) == 0
    held = (
        "import time, pathlib, zo.run.export as x; w = x._write_weights; "
        "x._write_weights = lambda m, c, s, folder: (w(m, c, s, folder), "
        "print('written', file=sys.stderr), time.sleep(600))"
    )
    process = start("export", [f"run={tmp_path}/run", f"to={tmp_path}/out/model"], tmp_path, held)
    lines_until(process, "^written")
    assert list((tmp_path / "out").iterdir())
    process.send_signal(signal.SIGTERM)
    ended(process, 143, "start the same command again")
    assert not list((tmp_path / "out").iterdir())


def test_under_torchrun_one_rank_speaks(long_run, tmp_path):
    """One line from rank 0, no traceback of a rank (torchrun prints its own), no lock left."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        ROOT / "launch" / "train.py",
    ]
    process = subprocess.Popen(
        [*torchrun, *long_run],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines_until(process, "step 1/1000")
    ranks = [p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("ended by SIGINT; no completed step is lost") == 1
    assert "zo/run/trainer.py" not in err
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    steps = len(read(tmp_path / "run" / "steps.log")[1])
    assert steps >= 1
    again = subprocess.run(
        [*torchrun, *long_run, f"run.steps={steps + 1}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["steps"] == steps + 1
    assert not (tmp_path / "run" / "lock").exists()
