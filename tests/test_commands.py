"""What a user types: a mistake ends in one line that says what to do, exit code 2, and nothing
written."""

import json
import os
import subprocess
import sys
from importlib import import_module
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

from zo.errors import UserError
from zo.io.signals import end_with_reader
from zo.run.sweep import command_line, expand

ROOT = Path(__file__).resolve().parent.parent


def rows(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


ROW = {"text": "a good film", "label": "great"}

MISTAKES = {
    "unknown recipe": (["recipe=quikstart"], "recipe=quikstart is not known; use one of"),
    "unknown key": (["model.nam=x"], "unknown key model.nam;"),
    "unknown group": (["modell.name=x"], "unknown key modell;"),
    "wrong type": (["batch.micro=many"], "batch.micro=many"),
    "a rate that is none": (["update.lr=fast"], "update.lr=fast is not a number or auto"),
    "no key=value": (["quickstart"], "quickstart is not understood"),
    "missing model folder": (["model.name=./nowhere"], "model.name=./nowhere is not a folder"),
    "folder without weights": (
        ["model.name={weightless}"],
        "model.name={weightless} cannot be loaded",
    ),
    "folder without configuration": (["model.name={empty}"], "model.name={empty} cannot be loaded"),
    "part of the weights": (["model.name={partial}"], "lacks 1 weights, model.norm.weight"),
    "missing file": (["data.name=missing.jsonl"], "data.name=missing.jsonl does not exist"),
    "unknown kind of file": (
        ["data.name=data.doc"],
        "data.name=data.doc is not a file of a known kind",
    ),
    "empty file": (["data.name={data}"], "is empty", ""),
    "invalid JSON": (
        ["data.name={data}"],
        "line 3 is invalid JSON",
        rows(ROW) + "\n" + '{"text": \n',
    ),
    "a line that is no object": (["data.name={data}"], "line 2 is not a JSON object", rows(ROW, 3)),
    "wrong columns": (
        ["data.name={data}"],
        "has columns body, label, not text",
        rows({"body": "x", "label": 1}) * 30,
    ),
    "columns of nothing": (
        ["data.name={data}"],
        "use text, prompt and completion",
        rows({"body": "x"}) * 30,
    ),
    "label not in the set": (
        ["data.name={data}"],
        "label 'meh' is not in the label set",
        rows({**ROW, "label": "meh"}) * 30,
    ),
    "label number not in the set": (
        ["data.name={data}"],
        "label 2 is not in",
        rows({**ROW, "label": 2}) * 30,
    ),
    "text that is no text": (
        ["data.name={data}"],
        "column text holds int",
        rows({**ROW, "text": 1}) * 30,
    ),
    "label outside the label words": (
        ["data.label_words=[terrible,'very great']"],
        "label 'great' is not in the label set",
    ),
    "a template with a lone brace": (
        ["data.template='{{text}} {{'"],
        "data.template='{{text}} {{' is not understood",
    ),
    "bytes that are no text": (["data.name={data}"], "line 1 is not UTF-8", "\udcff\n"),
    "more threads than any machine": (["run.threads=100000"], "run.threads=100000 is out of range"),
    "more threads than this machine": ([f"run.threads={4 * os.cpu_count() + 1}"], "run.threads="),
    "directions without end": (
        ["estimator.directions=1000000000"],
        "use a number of at most 1048576",
    ),
    "sequences without end": (["batch.sequences=1000000000"], "use a number of at most 1048576"),
    "mesh and ranks": (["mesh.perturb=2"], "mesh.perturb=2 does not fit 1 rank"),
    "mesh and table": (["mesh.perturb=1", "mesh.data=3"], "use mesh.perturb=1 mesh.data=1"),
    "batch not divisible": (
        ["batch.micro=3"],
        "batch.micro=3 does not divide batch.sequences=4; use 1, 2, 4",
    ),
    "directions that do not match the cover": (
        ["estimator.cover=diagonal", "estimator.directions=3"],
        "estimator.directions=3 does not match estimator.cover=diagonal, where 2 micro-batches",
    ),
    "probes of a full table": (
        ["estimator.probes=2"],
        "use estimator.cover=diagonal, or estimator.directions=2",
    ),
    "fold larger than the table": (
        ["batch.fold=64"],
        "batch.fold=64 is larger than the loss table of 4 cells; use 1, 2, 4",
    ),
    "fold that does not divide": (
        ["batch.fold=3"],
        "batch.fold=3 does not cut 2 columns of 2 cells evenly; use 1, 2, 4",
    ),
    "fold without a common product": (
        ["batch.fold=2"],
        "estimator.distribution=rademacher cannot; use batch.fold=1",
    ),
    "part of a negative number": (["estimator.part=top:-1"], "sampled, or top:N"),
    "unknown part": (
        ["estimator.part=foo"],
        "estimator.part='foo' is not known; use all, auto, sampled",
    ),
    "clip below zero": (["update.clip=-1"], "update.clip=-1.0 must be a number above 0"),
    "eps of zero": (["estimator.eps=0"], "estimator.eps=0.0 must be a number above 0"),
    "eps that is no number": (["estimator.eps=nan"], "estimator.eps=nan must be a number above 0"),
    "steps below zero": (["run.steps=-1"], "run.steps=-1 is out of range"),
    "unknown estimator": (
        ["estimator.name=adam"],
        "estimator.name='adam' is not known; use one of one-sided, population, spsa",
    ),
    "no data": (["data.name=''"], "data.name is empty"),
    "no model": (["model.name=''"], "model.name is empty"),
    "unwritable folder": (["run.dir=/proc/zo/run"], "run.dir=/proc/zo/run cannot be written"),
    "folder with other files": (["run.dir={empty}/.."], "is not empty and does not hold a run"),
    "two-word flag": (["--cfg", "hydra"], "--cfg shows one thing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(command, overrides, tiny_model, tmp_path, mistake):
    arguments, said, *content = MISTAKES[mistake]
    names = {name: tmp_path / "in" / name for name in ("empty", "weightless", "partial")}
    for path in names.values():
        path.mkdir(parents=True)
    names["data"] = tmp_path / "in" / "data.jsonl"
    names["data"].write_text(content[0] if content else "", errors="surrogateescape")
    for name in ("weightless", "partial"):
        (names[name] / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(names[name])
    if mistake == "part of the weights":
        model = make_llama()
        state = {k: v for k, v in model.state_dict().items() if k != "model.norm.weight"}
        model.save_pretrained(names["partial"], state_dict=state)
    run_dir = tmp_path / "out"
    given = [a.format(**names) for a in arguments]
    defaults = [*overrides, f"run.dir={run_dir}"]
    mine = {a.partition("=")[0] for a in given}
    code, out, err = command(
        "train", *[o for o in defaults if o.partition("=")[0] not in mine], *given
    )
    assert code == 2
    *before, last = err.splitlines()
    assert not before, err
    assert last.startswith("error: ")
    assert said.format(**names) in last
    assert out == ""
    assert not run_dir.exists()


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


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("evaluate", [], "nothing to score"),
        ("evaluate", ["run=nowhere"], "run=nowhere does not hold a run"),
        ("evaluate", ["run=nowhere", "update.lr=1"], "cannot be changed for a run"),
        ("evaluate", ["run=a", "data.columns={text: a}"], "cannot be changed for a run"),
        ("evaluate", ["run=a", "data=b", "data.name=c"], "cannot be changed for a run"),
        ("evaluate", ["model.name=a", "step=1"], "step=1 is a step of a run"),
        ("export", ["run=README.md", "to=x", "step=-1"], "does not hold a run"),
        ("export", ["run=nowhere", "to=x"], "run=nowhere does not hold a run"),
        ("export", ["run=nowhere"], "usage: zo export run=DIR"),
        ("export", ["run=a", "to=b", "pull=c"], "pull=c is no argument"),
        (
            "export",
            ["run=a", "to=b", "push=c", "public=yes"],
            "public=yes is neither true nor false",
        ),
    ],
)
def test_mistakes_of_the_other_commands(command, name, arguments, said):
    code, out, err = command(name, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


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
