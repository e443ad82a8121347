"""Rewards of generated completions: the same bits everywhere, and a user's mistakes in one line."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from logs import same_log
from plain import assert_refused, run
from ranks import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo import Trainer, load_config
from zo.data.files import Origin
from zo.data.rewards import Reward
from zo.errors import UserError
from zo.method.kernels.written import written_probes
from zo.method.passes import Probe
from zo.model.generate import Decoding, generate, trim
from zo.run import trainer
from zo.state.log import read

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
WORDS = {}


def reward(prompt, completion, row):
    words = completion.split()
    return sum((i + 1) * WORDS.index(word) for i, word in enumerate(words) if word in WORDS) / 100
""".replace("{}", repr(WORDS))
RANK_ONE = ["estimator.distribution=rank-one", "estimator.cover=diagonal", "estimator.probes=2"]
RANK_ONE += ["estimator.directions=null", "estimator.shape_per=prompt"]


@pytest.fixture
def settings(tiny_model, tmp_path, monkeypatch):
    """Overrides of a run of a second; its reward and prompts are in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    prompts = [" ".join(WORDS[i % 5 : i % 5 + 2 + i % 3]) for i in range(20)]
    lines = [json.dumps({"prompt": text, "number": i}) for i, text in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return [
        f"model.name={tiny_model}",
        f"data.name={tmp_path}/prompts.jsonl",
        "data.template=null",
        "data.label_words=null",
        "data.dev_examples=4",
        f"objective.name={tmp_path}/mine.py:reward",
        "generation.max_new_tokens=4",
        "generation.temperature=1",
        "batch.sequences=4",
        "batch.micro=2",
        "batch.max_tokens=16",
        "estimator.directions=2",
        "estimator.eps=0.1",
        "estimator.shape=z",
        "update.lr=1e-2",
        "update.schedule=constant",
        "run.steps=4",
        "eval.every=2",
        "export.at_end=false",
    ]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("extra", [RANK_ONE, ["estimator.shape=rank"]], ids=["rank-one", "dense"])
def test_a_resumed_run_samples_the_same_completions(settings, tmp_path, extra):
    expected = run(settings, tmp_path / "whole", *extra)
    run(settings, tmp_path / "parts", *extra, "run.steps=2")
    found = run(settings, tmp_path / "parts", *extra)
    assert found["fingerprint"] == expected["fingerprint"]
    assert any(any(entry.scalars) for entry in read(tmp_path / "whole" / "steps.log")[1])
    steps = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["reward"] == -line["loss"] and 0 < line["pairs_disagree"] <= 1
        assert 0 <= line["same_outputs"] < 1
    assert expected["eval"].keys() == {"reward"}


@pytest.mark.slow
def test_ranks_have_the_bits_of_one(settings, tmp_path):
    """Two ranks sample and stop within an epoch and a bucket, and one rank goes on."""
    settings = [*settings, *RANK_ONE, "estimator.part=top:2", "batch.bucket=3"]
    expected = run(settings, tmp_path / "alone")
    train([*settings, "run.steps=2", "mesh.data=2", f"run.dir={tmp_path}/two"], ranks=2)
    found = run(settings, tmp_path / "two")
    assert found["fingerprint"] == expected["fingerprint"] and found["eval"] == expected["eval"]
    assert same_log(tmp_path / "two" / "steps.log", tmp_path / "alone" / "steps.log")


@pytest.mark.parametrize("distribution", ["rank-one", "gaussian"])
def test_completions_are_those_of_a_model_that_holds_the_probe(
    settings, tmp_path, tiny_model, monkeypatch, distribution
):
    """Corrected and stacked, or written: transformers' own model, perturbed by hand, agrees."""
    seen = {}
    measure = trainer.rewarded.measure_cells

    def kept(replica, rewards, table, numbers, batches, step):
        values = measure(replica, rewards, table, numbers, batches, step)
        seen.update(table=table, values=values, batches=batches, layout=replica.layout)
        return values

    monkeypatch.setattr(trainer.rewarded, "measure_cells", kept)
    extra = [f"estimator.distribution={distribution}", "generation.temperature=0"]
    run(settings, tmp_path / "run", *extra, "run.steps=1", "eval.every=0", "model.train=*proj*")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    namespace = {}
    exec(REWARD, namespace)
    for (row, column), values in zip(seen["table"].cells, seen["values"], strict=True):
        model = held(tiny_model, seen["layout"], seen["table"].probes[row], distribution)
        written = generate(model, seen["batches"][column], Decoding(4, (2,), 0)).tolist()
        kept = [trim(tokens, (2,)) for tokens in written]
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in kept]
        assert (-values[4:6]).tolist() == [namespace["reward"]("", text, {}) for text in texts]
    assert len({tuple(values[6:].tolist()) for values in seen["values"]}) > 2


def held(folder, layout, probe: Probe, distribution):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for group in layout.groups:
        for segment in group.trainable:
            for part in segment.parts:
                weight = model.get_parameter(part.parameter.name)
                flat = torch.zeros(segment.numel)
                at = part.start - segment.start
                flat[at : at + weight.numel()] = weight.data.flatten()
                whole = written_probes(
                    flat, segment.start, 0, distribution, [probe], segment.matrices
                )[0]
                weight.data = whole[at : at + weight.numel()].view(weight.shape)
    return model


def test_a_reward_on_tiny_completions_rises(settings, tmp_path):
    extra = [*RANK_ONE, "estimator.probes=8", "run.steps=30", "eval.every=30", "update.lr=0.05"]
    run(settings, tmp_path / "run", *extra, "generation.temperature=0")
    before, after = (line["eval"]["reward"] for line in metrics(tmp_path / "run") if "eval" in line)
    assert after > before + 0.2, (before, after)


def test_a_signal_that_is_gone_is_warned_of_once(settings, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def reward(prompt, completion, row):\n    return 0.5\n")
    summary = run(settings, tmp_path / "run")
    said = capsys.readouterr().err
    assert summary["steps"] == 4 and said.count("the signal is gone") == 1
    assert not any(any(entry.scalars) for entry in read(tmp_path / "run" / "steps.log")[1])


SIGNATURE = "def reward(prompt, completion, row):"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "return float('nan')",
            r"returned nan on .*prompts.jsonl row \d+; it must",
        ),
        ("return 'good'", "returned str on .*row"),
        ("return None", "returned NoneType on"),
        (
            "return 1 / 0",
            r"raised ZeroDivisionError: .* at mine.py line 3, on .* row",
        ),
        ("exit()", "raised SystemExit"),
        (
            "while True:\n            try: row\n            except: pass",
            r"takes more than 0.2 s on .* at mine.py line \d; .*objective.timeout_s",
        ),
        ("import time; time.sleep(60)", "takes more than 0.2 s"),
    ],
)
def test_a_reward_that_fails_ends_the_run_in_one_line(settings, tmp_path, code, said):
    (tmp_path / "mine.py").write_text(f"{SIGNATURE}\n    if row['number'] != 30:\n        {code}\n")
    with pytest.raises(UserError, match=said) as error:
        run(settings, tmp_path / "run", "objective.timeout_s=0.2", "eval.every=0")
    assert "\n" not in str(error.value)
    assert not read(tmp_path / "run" / "steps.log")[1]


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (["objective.name=none.py:reward"], "", "there is no file none.py"),
        (["objective.name=no_such.module:reward"], "", "there is no module no_such.module"),
        (["objective.name=mine.py:other"], REWARD, "has no function other; it has reward"),
        (["objective.name=reward"], "", "is not known; use one of"),
        ([], "def reward(:", "cannot be imported: SyntaxError.* in line 1"),
        ([], "\nimport no_such", "No module named 'no_such' at mine.py line 2"),
        ([], "def reward(completion):\n    return 1.0", "must be reward.prompt, completion, row."),
        (["memory.store=host"], REWARD, "memory.store=device in place of host"),
        (["model.task=sequence-classification"], REWARD, "of sequence-classification, does not"),
        (["update.lr=auto"], REWARD, "update.lr=auto tries rates by a loss of given texts"),
        (
            ["generation.max_new_tokens=60"],
            REWARD,
            "max_new_tokens=76 is more than the 64",
        ),
        (["data.template='{missing}'"], REWARD, "not missing, of which the prompts"),
        (["estimator.name=population", "estimator.directions=1"], "", "no other direction"),
    ],
)
def test_what_cannot_be_rewarded_is_refused_before_a_log(settings, tmp_path, extra, code, said):
    (tmp_path / "mine.py").write_text(code)
    assert_refused(said, settings, tmp_path / "run", *extra)


def test_a_mended_reward_goes_on_where_it_failed(settings, tmp_path):
    whole = run(settings, tmp_path / "whole", "eval.every=0")
    good = (tmp_path / "mine.py").read_text()
    bad = good.replace("words = ", "CALLS.append(1); assert len(CALLS) < 30; words = ")
    (tmp_path / "mine.py").write_text(f"CALLS = []\n{bad}")
    with pytest.raises(UserError, match=r"AssertionError at mine\.py line"):
        run(settings, tmp_path / "run", "eval.every=0")
    assert len(read(tmp_path / "run" / "steps.log")[1]) == 1
    (tmp_path / "mine.py").write_text(good)
    assert run(settings, tmp_path / "run", "eval.every=0")["fingerprint"] == whole["fingerprint"]


def test_the_reward_of_the_readme_runs(settings, tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Rewards")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 12
    (tmp_path / "my_reward.py").write_text(code)
    rated = Reward("my_reward.py:reward", 1.0)
    rated.load()
    row = Origin("here", 1), {}
    assert [rated("", text, row) for text in (" 7, which", " 7.", "")] == [1.0, 0.0, 0.0]
    mine = ["objective.name=my_reward.py:reward", "run.steps=1", "eval.every=0"]
    assert run(settings, tmp_path / "run", *mine)["steps"] == 1


@pytest.mark.parametrize("recipe", [p.stem for p in ROOT.glob("recipes/[cg]*-*.yaml")])
def test_a_recipe_of_rewards_runs_on_a_tiny_model(tiny_model, tmp_path, recipe):
    rows = [{"question": f"the film {i}", "answer": f"it was\n#### {i}"} for i in range(12)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(recipe)
    changes = [f"model.name={tiny_model}", "data.train_examples=8", "data.dev_examples=2"]
    changes += ["batch.sequences=4", "batch.micro=2", "batch.max_tokens=24", "run.steps=2"]
    changes += ["generation.max_new_tokens=3", f"run.dir={tmp_path}/run", "export.at_end=false"]
    changes += ["run.trackers=[]"]
    changes += ["estimator.directions=3"] if config.estimator.directions else ["estimator.probes=2"]
    if config.data.name == "gsm8k":
        changes += [f"data.name={tmp_path}/problems.jsonl", "objective.name=gsm8k"]
    summary = Trainer(load_config(recipe, changes)).train()
    assert summary["steps"] == 2 and summary["eval"].keys() == {"reward"}
