"""A run that a stranger made is refused or read without harm, and no secret of ours is stored."""

import re
import shutil
import struct
import time

import pytest
import yaml
from plain import plain_config, run
from test_secure import refused

from zo.config.recipes import load_config
from zo.errors import UserError
from zo.observe.metrics import last_scores
from zo.observe.report import Report
from zo.run.restore import load_run
from zo.run.sweep import command_line, expand
from zo.state.log import Log, read
from zo.state.run_folder import RunFolder


@pytest.mark.parametrize(
    "name", ["steps.log", "metrics.jsonl", "events.jsonl", "timeline.json", "tensorboard"]
)
def test_a_run_does_not_write_through_a_link(overrides, tmp_path, name):
    config = plain_config([*overrides, f"run.dir={tmp_path}/run"])
    run = RunFolder(tmp_path / "run")
    run.create(config, {}, {"directions": 1}).close()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "mine")
    refused(f"{name} is a symbolic link", run.check, config)


def test_a_lock_and_a_status_are_not_written_through_a_link(tmp_path):
    from zo.io.atomic import write_for_readers
    from zo.state.lock import Lock

    mine = tmp_path / "mine"
    mine.write_text("a month of work")
    (tmp_path / "lock").symlink_to(mine)
    (tmp_path / "status.json.new").symlink_to(mine)
    refused("cannot be written", Lock, tmp_path)
    write_for_readers(tmp_path / "status.json", b"{}")
    assert mine.read_text() == "a month of work"


@pytest.fixture(scope="module")
def run_of(tiny_model, tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("stranger") / "run"
    settings = ["model.name=" + str(tiny_model), "data.name=synthetic", "batch.max_tokens=8"]
    run(
        [*settings, "batch.sequences=8", "run.steps=1", "eval.every=0", "export.at_end=false"],
        folder,
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "x"}, "rule='x'"),
        ({"distribution": "x"}, "distribution='x'"),
        ({"rule": None}, "lacks rule"),
        ({"weight_decay": 10**400}, "weight_decay="),
        ({"seed": -1}, "seed=-1"),
        ({"order": [1]}, "order"),
        ({"order": ["../../x"]}, "order of modules lacks"),
    ],
)
def test_a_log_with_true_checksums_that_no_run_wrote_is_refused(run_of, tmp_path, changes, said):
    """A checksum finds what broke by accident; whoever makes a log makes its checksums too."""
    shutil.copytree(run_of, tmp_path / "run")
    path = tmp_path / "run" / "steps.log"
    header, entries = read(path)
    changed = {k: v for k, v in {**header, **changes}.items() if v is not None}
    path.unlink()
    log = Log.create(path, changed)
    log.extend(entries)
    log.close()
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del content["log_header"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
    refused(said, load_run, tmp_path / "run")


def test_a_log_that_would_be_searched_for_hours_is_refused(tmp_path):
    """Every eighth byte of it may be the start of a step of 256 KiB."""
    header = {"directions": 2**16, "seed": 0, "distribution": "rademacher", "rule": "sgd"}
    Log.create(tmp_path / "steps.log", header).close()
    with open(tmp_path / "steps.log", "ab") as file:
        file.write(struct.pack("<Q", 1) * 2**18)
    begun = time.process_time()
    refused("no torn tail", read, tmp_path / "steps.log")
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1, "eval": {"accuracy": 1' + b"0" * 400 + b"}}",
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
        b'{"step": 1, "scalars": 5}',
        b'{"step": null}',
    ],
)
def test_a_strangers_metrics_are_shown_or_left_out(tmp_path, line):
    (tmp_path / "config.yaml").write_text("config: {}")
    for name in ("metrics.jsonl", "status.json"):
        (tmp_path / name).write_bytes(line + b"\n")
    assert last_scores(tmp_path / "metrics.jsonl", 10) == {}
    assert "</html>" in Report(tmp_path, pytest.fail).page()


def test_a_refusal_is_one_line_whatever_a_file_says():
    said = str(UserError("name=a\nb\x1b[2J\x07\u2028 " + "c" * 10**6))
    assert said.startswith("name=a\\nb\\x1b[2J\\x07\\u2028 ccc")
    assert len(said) < 2100


@pytest.mark.parametrize(
    "override",
    [
        "data.name=${a}",
        "run.dir=${run.dir}",
        "update.lr=" + "9" * 5000,
        "run.steps=" + "9" * 5000,
        "profile.steps=1.." + "9" * 5000,
        "data.name=" + "[" * 200 + "]" * 200,
        "+model._target_=os.mkdir",
    ],
)
def test_an_override_that_no_key_takes_is_refused(override):
    refused(".", load_config, "default", [override])


TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7xY9zA2c"


def test_a_sweep_names_no_secret(tmp_path):
    overrides = [f"data.name=https://me:{TOKEN}@host/a.jsonl,b.jsonl", "run.steps=1"]
    points = expand("default", overrides, tmp_path)
    assert len(points) == 2
    for point in points:
        assert TOKEN not in str(point.folder)
        assert TOKEN not in command_line("default", point, 1)


def test_no_setting_for_secrets_exists():
    """It would be stored with a run; the libraries read theirs from the environment."""
    from zo.config.recipes import keys

    assert not [k for k, _, _ in keys() if re.search(r"(?i)(token|password|secret|api_?key)$", k)]
