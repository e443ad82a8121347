"""What a user types: a mistake ends in one line that says what to do, exit code 2, and nothing
written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_from_start_to_hub_folder(command, overrides, tmp_path):
    """Everything a run leaves, and what the other commands make of it."""
    run_dir = tmp_path / "run"
    kept = [o for o in overrides if not o.startswith("export")]
    code, out, err = command("train", *kept, f"run.dir={run_dir}", "model.dtype=bfloat16")
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert set(summary) == {
        "run_dir",
        "steps",
        "loss",
        "eval",
        "best",
        "train_s",
        "fingerprint",
    }
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml",
        "steps.log",
        "metrics.jsonl",
        "events.jsonl",
        "status.json",
        "report.html",
        "model",
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "step",
        "loss",
        "scalars",
        "lr",
        "step_s",
        "tokens",
        "tokens_per_s",
        "device_peak_bytes",
        "host_rss_bytes",
    }
    keys |= {"padded_tokens", "pair_spread", "pair_resolution"}
    keys |= {"read_bytes", "written_bytes", "gathered_bytes", "scalar_bytes", "wait_share"}
    assert [line["step"] for line in lines if "eval" not in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4]
    assert all(set(line) in (keys, {"step", "eval"}) for line in lines)
    assert lines[-1]["eval"] == summary["eval"]
    assert "step 4/4" in err
    assert summary["fingerprint"] in (run_dir / "model" / "README.md").read_text()

    code, out, err = command("evaluate", f"run={run_dir}")
    assert code == 0, err
    assert json.loads(out)["eval"] == summary["eval"]
    assert json.loads(out)["fingerprint"] == summary["fingerprint"]

    for step in (0, 2):
        code, out, err = command("evaluate", f"run={run_dir}", f"step={step}")
        assert code == 0, err
        assert json.loads(out)["steps"] == step
        assert {"step": step, "eval": json.loads(out)["eval"]} in lines
    code, out, err = command("export", f"run={run_dir}", f"to={tmp_path}/none", "step=5")
    assert (code, err.count("\n"), (tmp_path / "none").exists()) == (2, 1, False)
    assert "whose last step is 4" in err

    code, out, err = command("export", f"run={run_dir}", f"to={tmp_path}/exported")
    assert code == 0, err
    trained = AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all((trained[name] == exported[name]).all() for name in trained)
    code, out, err = command(
        "evaluate", f"model.name={tmp_path}/exported", *kept[1:], "model.dtype=bfloat16"
    )
    assert code == 0, err
    assert json.loads(out)["fingerprint"] == summary["fingerprint"]
    assert json.loads(out)["eval"] == summary["eval"]


def test_another_configuration_in_the_same_folder_is_refused(command, overrides, tmp_path):
    assert command("train", *overrides, f"run.dir={tmp_path}/run")[0] == 0
    before = (tmp_path / "run" / "steps.log").read_bytes()
    changed = [o for o in overrides if not o.startswith("update.lr")] + [
        "update.lr=5e-4",
        "run.seed=3",
    ]
    code, _, err = command("train", *changed, f"run.dir={tmp_path}/run")
    assert code == 2
    assert "update.lr (0.001 -> 0.0005), run.seed (0 -> 3)" in err
    assert err.count("\n") == 1
    assert (tmp_path / "run" / "steps.log").read_bytes() == before


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"config: 3\n", b"- 1\n", b"[" * 100_000])
def test_a_damaged_config_is_one_line(command, overrides, tmp_path, content):
    assert command("train", *overrides, f"run.dir={tmp_path}/run", "run.steps=0")[0] == 0
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    for name, arguments in (
        ("train", [*overrides, f"run.dir={tmp_path}/run"]),
        ("evaluate", [f"run={tmp_path}/run"]),
    ):
        code, _, err = command(name, *arguments)
        assert (code, err.count("\n")) == (2, 1), err


@pytest.mark.parametrize("key", ["command", "versions"])
@pytest.mark.parametrize("value", [None, 3])
def test_a_config_without_what_a_model_card_needs_is_one_line(
    command, overrides, tmp_path, key, value
):
    assert command("train", *overrides, f"run.dir={tmp_path}/run", "run.steps=0")[0] == 0
    path = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content[key]
    path.write_text(yaml.safe_dump(content if value is None else {**content, key: value}))
    code, _, err = command("export", f"run={tmp_path}/run", f"to={tmp_path}/out")
    assert code == 2, err
    assert f"config.yaml has no usable {key}" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_strangers_run_reads_nothing_of_this_machines_environment(
    command, overrides, tmp_path, monkeypatch
):
    assert command("train", *overrides, f"run.dir={tmp_path}/run", "run.steps=1")[0] == 0
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("recipe: default", "recipe: ${oc.env:PRIVATE}"))
    monkeypatch.setenv("PRIVATE", "a token")
    code, _, err = command("export", f"run={tmp_path}/run", f"to={tmp_path}/to")
    assert (code, err.count("\n")) == (2, 1), err
    assert not (tmp_path / "to").exists()


def test_another_base_model_or_other_data_in_the_same_place_is_refused(
    command, overrides, tiny_model, reviews, tmp_path
):
    """The names are the same; the bits are not."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    make_llama().save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    data.write_bytes(reviews.read_bytes())
    settings = [
        f"model.name={model}",
        f"data.name={data}",
        *overrides[2:],
        f"run.dir={tmp_path}/run",
    ]
    assert command("train", *settings)[0] == 0
    data.write_text(reviews.read_text().replace("good", "bad"))
    code, _, err = command("train", *settings)
    assert (code, err.count("\n")) == (2, 1)
    assert "was started from a different training data" in err
    data.write_bytes(reviews.read_bytes())
    changed = make_llama()
    changed.model.norm.weight.data[0] = 2
    changed.save_pretrained(model)
    for name, arguments in (("train", settings), ("evaluate", [f"run={tmp_path}/run"])):
        code, _, err = command(name, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "base model" in err


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(overrides, tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses in the middle of a
    write."""
    settings = [*overrides, f"run.dir={tmp_path}/run", "run.steps=6", "eval.every=0"]
    train = (
        f"sys.argv[1:] = {settings!r}; import runpy; "
        "runpy.run_path('launch/train.py', run_name='__main__')"
    )
    limited = """
import resource, sys
from zo.state.log import Log
append = Log.append
def fills_the_disk(log, entry):
    if entry.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log._length + 10, log._length + 10))
    append(log, entry)
Log.append = fills_the_disk
"""
    run = lambda code: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_NUM_THREADS": "2"},
    )
    full = run(limited + train)
    assert full.returncode == 2, full.stderr
    assert [line for line in full.stderr.splitlines() if line.startswith("error: ")] == [
        full.stderr.splitlines()[-1]
    ]
    assert "make room and start the same command again" in full.stderr
    resumed = run("import sys; " + train)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stderr
    alone = run("import sys; " + train.replace(f"{tmp_path}/run", f"{tmp_path}/alone"))
    assert json.loads(resumed.stdout)["fingerprint"] == json.loads(alone.stdout)["fingerprint"]


@pytest.mark.slow
def test_torchrun_makes_one_folder_and_speaks_once(overrides, tmp_path):
    """The default folder's name holds the time: ranks that each made one would train apart."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        ROOT / "launch" / "train.py",
    ]
    run = subprocess.run(
        [*torchrun, *overrides], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (line,) = run.stdout.splitlines()
    assert json.loads(line)["run_dir"] == f"runs/{folder.name}"
    assert run.stderr.count("step 4/4  loss") == 1
    mistaken = subprocess.run(
        [*torchrun, *overrides, "mesh.perturb=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert mistaken.returncode == 1
    *_, before_last, rule = mistaken.stderr.splitlines()
    assert "traceback : error: mesh.perturb=3 does not fit 2 ranks" in before_last
    assert set(rule) == {"="}  # The line that matters stands below torchrun's own traceback, too.
    assert mistaken.stderr.count("error: mesh.perturb=3 does not fit 2 ranks") == 2
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_random_weights_and_synthetic_data_need_a_configuration_only(command, tiny_model, tmp_path):
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    settings = [
        f"model.name={folder}",
        "model.weights=random",
        "data.name=synthetic",
        "batch.max_tokens=16",
    ]
    settings += ["batch.sequences=2", "batch.micro=2", "run.steps=2", "model.dtype=float16"]
    code, out, err = command("train", "recipe=opt-175b", *settings, f"run.dir={tmp_path}/run")
    assert code == 0, err
    first = json.loads(out)["fingerprint"]
    code, out, _ = command("train", "recipe=opt-175b", *settings, f"run.dir={tmp_path}/again")
    assert json.loads(out)["fingerprint"] == first
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["tokens"] == 32


def test_a_sequence_classifier_from_rows_to_folder(command, reviews, tmp_path, tokenizer):
    """A base model without a head gets one of the rows' classes; the trained head is in the
    exported folder."""
    sizes = {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    BertModel(BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = [
        f"model.name={tmp_path}/base",
        "model.task=sequence-classification",
        f"data.name={reviews}",
    ]
    settings += [
        "batch.sequences=4",
        "batch.micro=2",
        "run.steps=3",
        "eval.every=3",
        "update.lr=1e-3",
    ]
    settings += ["batch.max_tokens=64", "estimator.part=top:2"]
    code, out, err = command("train", *settings, f"run.dir={tmp_path}/run")
    assert code == 0, err
    assert set(json.loads(out)["eval"]) == {"accuracy", "loss", "details"}
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.id2label == {0: "great", 1: "terrible"}
    code, out, err = command(
        "evaluate",
        f"model.name={tmp_path}/run/model",
        f"data={reviews}",
        "batch.micro=2",
        "batch.max_tokens=64",
    )
    assert code == 0, err


def test_other_data_with_other_columns_is_scored(overrides, reviews, tmp_path, command):
    settings = ["run.steps=1", "eval.every=0", f"run.dir={tmp_path}/run"]
    code, _, err = command("train", *overrides, *settings)
    assert code == 0, err
    scores = []
    other = tmp_path / "other.jsonl"
    other.write_text(reviews.read_text().replace('"text"', '"review"'))
    code, _, err = command("evaluate", f"run={tmp_path}/run", f"data={other}")
    assert (code, err.count("\n")) == (2, 1) and "name them with data.columns" in err
    for data in ([f"data={reviews}"], [f"data={other}", "data.columns={text: review}"]):
        code, out, err = command("evaluate", f"run={tmp_path}/run", *data)
        assert code == 0, err
        scores.append(json.loads(out)["eval"])
    assert scores[0] == scores[1]
