"""What the commands say of themselves: help, configuration, lines to type; and who reads it."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from zo.errors import UserError
from zo.io.signals import end_with_reader
from zo.run.sweep import command_line, expand

ROOT = Path(__file__).resolve().parent.parent


def test_help_names_every_recipe_and_key(command):
    code, out, _ = command("train", "--help")
    assert code == 0
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"\n  {recipe.stem} " in out
    assert "\n  update.lr (0.002): Learning rate, or auto" in out
    assert "\nkeys (value with recipe=quickstart):\n" in out


def test_the_quickstarts_numbers_are_not_used_for_other_data(command):
    for own in ("data.name=mine.jsonl", "model.name=./mine"):
        code, out, _ = command("train", own, "--help")
        assert code == 0
        assert "\nkeys (value with recipe=default and these arguments):\n" in out
        assert "\n  update.lr (auto): " in out
        code, out, _ = command("train", own, "recipe=quickstart", "--cfg", "job")
        assert code == 0
        assert "lr: 0.002" in out


def test_cfg_job_is_the_resolved_configuration(command):
    code, out, _ = command("train", "recipe=opt-13b", "update.lr=2e-7", "--cfg", "job")
    assert code == 0
    assert "lr: 2.0e-07" in out
    assert "name: facebook/opt-13b" in out


def test_a_grid_is_another_command(command):
    code, _, err = command("train", "-m", "update.lr=1e-4,1e-5")
    assert (code, err.count("\n")) == (2, 1)
    assert "zo sweep recipe=NAME" in err


def test_a_sweep_under_torchrun_is_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command("sweep", "update.lr=1e-4,1e-5")
    assert (code, err.count("\n")) == (2, 1)
    assert "start it with zo sweep" in err


@pytest.mark.parametrize(
    ("program", "export", "train", "ranks"),
    [
        ("/venv/bin/zo", "zo export", "zo train", "torchrun --nproc-per-node 2 -m zo.train"),
        (
            ROOT / "launch" / "export.py",
            "python launch/export.py",
            "python launch/train.py",
            "torchrun --nproc-per-node 2 launch/train.py",
        ),
        ("/mine/launch/own.py", "zo export", "zo train", "torchrun --nproc-per-node 2 -m zo.train"),
    ],
)
def test_commands_are_shown_as_this_one_was_started(
    program, export, train, ranks, monkeypatch, tmp_path
):
    """A user of the wheel has no launch/."""
    monkeypatch.setattr(sys, "argv", [str(program)])
    with pytest.raises(UserError, match=f"^usage: {export} run=DIR"):
        import_module("zo.commands.export").main([])
    (point,) = expand("quickstart", ["run.steps=2"], tmp_path)
    assert command_line("quickstart", point, 1) == f"{train} recipe=quickstart run.steps=2"
    assert command_line("quickstart", point, 2) == f"{ranks} recipe=quickstart run.steps=2"


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["recipes", "--help"])
def test_a_reader_that_is_gone_ends_a_command_without_a_traceback(argument):
    """As in ``zo recipes | head -1``."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    start = "import sys; from zo.commands import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", start, argument], stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_connection_that_is_closed_stays_an_error():
    with pytest.raises(BrokenPipeError), end_with_reader():
        raise BrokenPipeError
