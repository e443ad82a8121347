"""Files in a run's folder that zo did not write stay as they are."""

import os

import pytest
from plain import plain_config
from ranks import train

from zo.errors import UserError
from zo.state.run_folder import RunFolder

DISK = ["memory.store=disk", "memory.lag=1", "eval.every=0", "run.steps=2"]


def test_other_files_beside_a_stores_blocks_and_snapshots_stay(overrides, tmp_path):
    mine = [
        tmp_path / "run" / "blocks" / "rank-00000" / "notes.txt",
        tmp_path / "run" / "blocks" / "readme",
    ]
    mine += [
        tmp_path / "run" / "snapshots" / name
        for name in ("step-by-step.safetensors", "draft.new", "a.txt")
    ]
    train([*overrides, *DISK, f"run.dir={tmp_path}/run"])
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a month of work")
    stale = tmp_path / "run" / "blocks" / "rank-00000" / "000001.new"
    stale.write_text("of a run that was killed")
    train([*overrides, *DISK, f"run.dir={tmp_path}/run", "run.steps=3"])
    assert not stale.exists()
    more = ["eval.every=0", "run.snapshot_every=1", "run.steps=6"]
    train([*overrides, *more, f"run.dir={tmp_path}/run"])
    assert [path.read_text() for path in mine] == ["a month of work"] * len(mine)
    kept = [path.name for path in (tmp_path / "run" / "snapshots").glob("step-0*")]
    assert sorted(kept) == ["step-000000005.safetensors", "step-000000006.safetensors"]


@pytest.mark.parametrize(
    "place", ["blocks", "blocks/rank-00000", "blocks/rank-00000/000000.block", "snapshots", "model"]
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_link_in_place_of_a_folder_is_refused(overrides, tmp_path, place, begun):
    """A run deletes in these folders; what a link points to is somebody else's."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    config = plain_config([*overrides, *DISK, f"run.dir={run}"])
    (run / place).parent.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "000001.block").write_text("a month of work")
    os.symlink(elsewhere, run / place)
    if begun:
        RunFolder(run).create(config, {}, {"directions": 1}).close()
    with pytest.raises(
        UserError, match=r"is a symbolic link|is not empty and does not hold a run"
    ) as error:
        RunFolder(run).check(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "place", ["notes.txt", "blocks/notes.txt", "blocks/rank-00000/notes.txt", "steps.log"]
)
def test_a_folder_of_other_files_is_no_cut_start(overrides, tmp_path, place):
    config = plain_config([*overrides, f"run.dir={tmp_path}/run"])
    (tmp_path / "run" / place).parent.mkdir(parents=True)
    (tmp_path / "run" / place).write_text("mine")
    with pytest.raises(UserError, match=rf"is not empty and does not hold a run \({place}\)"):
        RunFolder(tmp_path / "run").check(config)
