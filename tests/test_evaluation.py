"""Scores to trust: their errors, the best step, the end that hangs on them, and what is shown."""

import json
import math
import shutil

import pytest
import torch
from plain import assert_refused, run
from ranks import train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo.config.recipes import load_config
from zo.data import tasks
from zo.data.scores import by_class, evaluation
from zo.errors import UserError
from zo.model.info import ModelInfo
from zo.observe.history import Evaluation, History
from zo.observe.report import Report
from zo.run.restore import adapted, load_run, with_prompt

INFO = ModelInfo("causal-lm", 24, frozenset())
CHOICE = tasks.choice(INFO, 0, [1, 2])
COMPLETION = tasks.completion(INFO, 0)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def evaluations(folder):
    return {line["step"]: line["eval"] for line in lines(folder) if "eval" in line}


@pytest.mark.parametrize("kind", ["choice", "completion"])
def test_a_standard_error_is_the_spread_of_the_score_over_data_sets(kind):
    """1,000 data sets of 100 examples: a completion's loss is a ratio, as lengths vary too."""
    random, found, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(1000):
        terms = torch.ones(100)
        labels = None
        if kind == "completion":
            terms = torch.randint(1, 20, (100,), generator=random).double()
        losses = terms * (0.5 + 0.03 * terms) + torch.rand(100, generator=random)
        predicted = (torch.rand(100, generator=random) < 0.3).double()
        labels = [0] * 100 if kind == "choice" else None
        table = torch.stack((losses, terms, predicted), 1).double()
        task = CHOICE if kind == "choice" else COMPLETION
        one = evaluation(task, table, labels)
        found.append([one.scores["loss"], one.scores.get("accuracy", 0.0)])
        error = one.details["standard_error"]
        errors.append([error["loss"], error.get("accuracy", 0.0)])
    spread = torch.tensor(found).std(0)
    assert torch.allclose(torch.tensor(errors).mean(0), spread, rtol=0.08)
    if kind == "choice":
        assert one.details["standard_error"]["accuracy"] == pytest.approx(
            math.sqrt(one.scores["accuracy"] * (1 - one.scores["accuracy"]) / 99)
        )


def test_figures_of_each_class_by_name():
    found = by_class([0, 0, 1, 0, 0], [0, 1, 1, 1, 0], (" bad", " good", " fair"))
    assert found["classes"] == {
        "bad": {"examples": 2, "recall": 1.0, "precision": 0.5, "f1": pytest.approx(2 / 3)},
        "good": {"examples": 3, "recall": pytest.approx(1 / 3), "precision": 1.0, "f1": 0.5},
        "fair": {"examples": 0, "recall": None, "precision": None, "f1": None},
    }
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.5) / 2)


def history(values, metric=None, patience=None, name="loss"):
    made = History(metric, patience)
    for step, value in enumerate(values):
        made.add(step, Evaluation({name: value}, {"macro_f1": 1 - value}))
    return made


@pytest.mark.parametrize(
    ("values", "name", "metric", "best"),
    [
        ([3.0, 1.0, 2.0, 1.0], "loss", None, 1),
        ([3.0, 1.0, 3.0], "accuracy", None, 0),
        ([3.0, 1.0, 3.0], "accuracy", "macro_f1", 1),
        ([math.nan, 2.0, math.nan], "loss", None, 1),
        ([math.nan, math.nan], "accuracy", None, 0),
    ],
)
def test_the_best_is_the_first_of_the_best_and_never_not_a_number(values, name, metric, best):
    assert history(values, metric, name=name).best().step == best


def test_patience_counts_evaluations_after_the_best():
    assert not history([3.0, 1.0, 2.0], patience=2).has_ended
    assert history([3.0, 1.0, 2.0, 1.0], patience=2).has_ended
    assert history([math.nan, math.nan], patience=1).has_ended
    assert not history([3.0, 1.0, 2.0, 1.0]).has_ended
    with pytest.raises(UserError, match=r"eval\.metric=f1 is not a score .* loss or macro_f1"):
        history([1.0], "f1")


RISING = ["update.lr=1e-2", "eval.every=1", "eval.metric=loss", "run.steps=30"]
"""A rate at which the held-out loss falls and rises."""


def test_a_run_that_does_not_improve_ends_alike_on_any_mesh_and_after_a_resume(
    overrides,
    tmp_path,
    command,
):
    """And its resumed end is final: the same command trains no further, more patience does."""
    settings = [*overrides, *RISING, "eval.patience=2"]
    ended = run(settings, tmp_path / "run")
    found, best = evaluations(tmp_path / "run"), ended["best"]
    assert ended["steps"] == best["step"] + 2 < 30
    assert best["value"] == min(scores["loss"] for scores in found.values())
    assert ended["fingerprint"] is not None
    shared = train([*settings, f"run.dir={tmp_path}/shared"], ranks=2)
    cut = [o for o in settings if not o.startswith("run.steps")]
    run([*cut, f"run.steps={ended['steps'] - 1}"], tmp_path / "cut")
    resumed, again = (run(settings, tmp_path / name) for name in ("cut", "run"))
    for other in (shared, resumed, again):
        for key in ("steps", "best", "eval", "fingerprint"):
            assert other[key] == ended[key]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["best"] == best
    finished = [*settings, f"run.dir={tmp_path}/run"]
    assert command("finished", *finished)[0] == 0
    patient = [o.replace("patience=2", "patience=3") for o in settings]
    assert command("finished", *patient, f"run.dir={tmp_path}/run")[0] == 75
    assert run(patient, tmp_path / "run")["steps"] > ended["steps"]


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_the_model_of_the_best_step_is_a_version_of_the_log(overrides, tmp_path, store):
    settings = [*overrides, *RISING, "export.at_end=true", "export.step=best"]
    found = run(settings, tmp_path / "run", f"memory.store={store}", "run.steps=8")
    step = found["best"]["step"]
    assert 0 < step < 8
    if store == "device":
        shorter = run([*overrides, *RISING], tmp_path / "shorter", f"run.steps={step}")
        best = load_run(tmp_path / "run", step="best")
        assert best.replica.fingerprint() == shorter["fingerprint"]
        assert shorter["fingerprint"] in (tmp_path / "run" / "model" / "README.md").read_text()
    expected = load_run(tmp_path / "run", step=step).replica.tensors()
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in expected)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["eval.metric=f1"], r"=f1 is not a score of this data; use accuracy or loss or macro_f1"),
        (["eval.patience=0"], r"eval\.patience=0 is out of range"),
        (["eval.patience=2", "eval.every=0"], r"eval\.patience=2 needs .* set eval\.every"),
        (["export.step=best", "export.at_end=true", "data.dev_examples=0"], "needs held-out"),
        (["export.step=7"], r"export\.step='7' is not known; use one of best, last"),
    ],
)
def test_what_cannot_be_chosen_by_is_one_line(overrides, tmp_path, extra, said):
    assert_refused(said, overrides, tmp_path / "run", *extra)


def test_scores_of_a_step_of_a_run_and_of_a_plain_model(
    overrides,
    tiny_model,
    tmp_path,
    command,
):
    summary = run([*overrides, *RISING], tmp_path / "run", "run.steps=6")
    code, out, err = command("evaluate", f"run={tmp_path}/run", "step=best")
    assert code == 0, err
    best = summary["best"]["step"]
    assert json.loads(out)["steps"] == best
    assert json.loads(out)["eval"] == evaluations(tmp_path / "run")[best]
    code, out, err = command("evaluate", *overrides)
    assert code == 0, err
    assert json.loads(out)["eval"] == evaluations(tmp_path / "run")[0]
    code, out, err = command("evaluate", f"run={tmp_path}/run", "step=last")
    assert (code, err.count("\n")) == (2, 1)


def answers(folder):
    found = {}
    for event in lines(folder, "events.jsonl"):
        if event["kind"] == "sample":
            found.setdefault(event["step"], []).append(event)
    return found


def test_samples_of_label_words_before_and_after(overrides, tmp_path):
    run([*overrides, *RISING], tmp_path / "run", "run.steps=6")
    found = answers(tmp_path / "run")
    assert {step: len(said) for step, said in found.items()} == {0: 4, 6: 4}
    assert {said["answer"] for each in found.values() for said in each} <= {"terrible", "great"}
    assert all(said["prompt"].endswith("it was") for said in found[0])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "after step 6" in page
    assert "macro F1" in page
    assert found[0][0]["prompt"] in page
    Report(tmp_path / "run", pytest.fail).write()  # It is made of the files alone.
    assert "after step 6" in (tmp_path / "run" / "report.html").read_text()


def test_samples_of_completions_are_the_models_greedy_ones(overrides, tiny_model, tmp_path):
    rows = [{"prompt": "the film was " * (1 + i % 3), "completion": "good"} for i in range(30)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [o for o in overrides if not o.startswith(("data.template", "data.label", "data.name"))]
    settings = [*kept, f"data.name={path}", "data.template=null", "data.label_words=null"]
    summary = run(settings, tmp_path / "run", "run.steps=2", "eval.every=2")
    assert set(summary["eval"]["details"]) == {"examples", "standard_error"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for said in answers(tmp_path / "run")[0]:
        assert said["wanted"] == "good"
        ids = tokenizer(said["prompt"], return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=24, do_sample=False)[0]
        expected = tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said["answer"] == expected.strip()[: len(said["answer"])]
        assert said["answer"]


TASK = """
task: films
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} it was"
doc_to_choice: [terrible, great]
doc_to_target: "{{{{['terrible', 'great'].index(label)}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval_scores_the_run_and_its_folder_alike(
    overrides,
    reviews,
    tmp_path,
    command,
    monkeypatch,
):
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run([*overrides, "export.at_end=true"], tmp_path / "run")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "films.yaml").write_text(TASK.format(rows=reviews))
    own = f"lm_eval_tasks={tmp_path}/tasks"
    code, out, err = command("evaluate", f"run={tmp_path}/run", "lm_eval=films", own)
    assert code == 0, err
    found = json.loads(out)["lm_eval"]["films"]
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"))
    folder = shutil.copytree(tmp_path / "run" / "model", tmp_path / "elsewhere")
    results = lm_eval.simple_evaluate(
        "hf", f"pretrained={folder},device=cpu", ["films"], task_manager=manager
    )["results"]["films"]
    assert found["acc"] == results["acc,none"]
    code, out, err = command("evaluate", f"run={tmp_path}/run", f"data={reviews}")
    assert json.loads(out)["eval"]["accuracy"] == found["acc"]
    code, out, err = command("evaluate", f"run={tmp_path}/run", "lm_eval=no_such_task")
    assert (code, err.count("\n")) == (2, 1)


def test_lm_eval_is_asked_for_in_one_line_where_it_is_missing(
    overrides,
    tmp_path,
    command,
    monkeypatch,
):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    run(overrides, tmp_path / "run")
    code, _, err = command("evaluate", f"run={tmp_path}/run", "lm_eval=films")
    assert (code, err.count("\n")) == (2, 1)
    assert "needs the extra eval" in err


def test_other_data_is_scored_with_the_prompt_of_the_runs_task():
    config = with_prompt(load_config("quickstart"))
    data = adapted(config, "mine.jsonl", None, trust_remote_code=False).data
    assert (data.name, data.label_words) == ("mine.jsonl", [" negative", " positive"])
    assert data.template == "Review: {text}\nSentiment:"
