"""What the commands print: our lines, and no library's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
OURS = re.compile(
    r"(data: |reading model |checking that |loading weights: |default in |settings |step \d+/\d+  "
    r"|the best |error: )"
)


def command(name, *arguments):
    """Run a command as a user does: stdout and stderr, by line."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DS_"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_a_user_sees_our_lines_alone(overrides, tmp_path):
    """DeepSpeed, where it is installed, and Hugging Face's loading bars stay silent."""
    settings = [o for o in overrides if not o.startswith("export.")]
    folder = tmp_path / "run"
    out, err = command("train", *settings, f"run.dir={folder}", "memory.store=disk")
    assert [json.loads(line)["steps"] for line in out] == [4]
    assert [line for line in err if not OURS.match(line)] == []
    out, err = command("evaluate", f"run={folder}")
    assert [json.loads(line)["steps"] for line in out] == [4]
    assert [line for line in err if not OURS.match(line)] == []
    out, err = command("export", f"run={folder}", f"to={tmp_path / 'to'}")
    assert out == [str(tmp_path / "to")]
    assert [line for line in err if not OURS.match(line)] == []
    out, err = command("train", "--help")
    assert out[0].startswith("usage: ")
    assert not err
