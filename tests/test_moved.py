"""A run whose folder is taken away ends in one line; the folder does not come back half empty."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("store", ["device", "disk"])
@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_without_its_folder_ends_in_one_line(overrides, tmp_path, store, how):
    folder = tmp_path / "runs" / "run"
    settings = [f"run.dir={folder}", f"memory.store={store}", "memory.lag=1", "run.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", *overrides, *settings, "eval.every=0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        log = folder / "steps.log"
        while not log.exists() or log.stat().st_size < 600:
            assert time.monotonic() < until
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.rename(folder, tmp_path / "elsewhere")
        if how == "deleted":
            shutil.rmtree(tmp_path / "elsewhere")
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert said.splitlines()[-1] == errors[0]
    assert re.search("deleted|moved", errors[0])
    assert "Traceback" not in said
    assert not folder.exists()
