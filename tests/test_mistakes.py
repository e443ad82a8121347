"""A mistake ends in one line that says what to do, exit code 2, and nothing written."""

import json
import os

import pytest
from conftest import make_llama
from transformers import AutoTokenizer


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
