"""Pairs of a chosen and a rejected answer: their forms, their loss, and runs on them."""

import json
import math

import pytest
import torch
from conftest import WORDS, make_llama
from logs import same_log
from plain import run
from ranks import train
from test_data import CAUSAL, built, write

from zo.config.schema import DataConfig
from zo.data.pairs import Reference, digest, preference
from zo.data.tasks import Example
from zo.errors import UserError
from zo.run.restore import load_run

ASKED = {"role": "user", "content": "the film"}
GOOD, BAD = ({"role": "assistant", "content": word} for word in ("good", "bad"))
FORMS = {
    "texts": {"prompt": "the film", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "a text and whole conversations": {
        "prompt": "the film",
        "chosen": [ASKED, GOOD],
        "rejected": [ASKED, BAD],
    },
    "a text and answers as messages": {"prompt": "the film", "chosen": [GOOD], "rejected": [BAD]},
}


def one(tokenizer, path, *rows):
    return built(tokenizer, DataConfig(name=write(path / "a.jsonl", rows), dev_examples=0))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_answers_alone(tokenizer, tmp_path, form):
    data = one(tokenizer, tmp_path, FORMS[form])
    chosen, rejected = data.train[0].sides
    assert chosen.ids[: chosen.target] == rejected.ids[: rejected.target]
    answers = [tokenizer.decode(e.ids[e.target :]).split()[0] for e in (chosen, rejected)]
    assert answers == ["good", "bad"]
    assert "film" in tokenizer.decode(chosen.ids[: chosen.target])
    assert "[[good" in data.report.example and "[[bad" in data.report.example


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "the", "chosen": " ", "rejected": "bad"}, "row 2: the chosen is empty"),
        ({"prompt": "the", "chosen": "bad", "rejected": ""}, "row 2: the rejected is empty"),
        ({"chosen": "good", "rejected": "bad"}, "row 2: column prompt is empty or missing"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "row 2: chosen must hold a turn of role"),
        ({"chosen": [ASKED, GOOD], "rejected": ["bad"]}, "row 2: rejected must be a list of obj"),
        ({"chosen": [ASKED, GOOD], "rejected": "bad"}, "row 2: rejected must be a list of obj"),
        ({"chosen": [], "rejected": [BAD]}, "row 2: chosen must be a list of objects"),
    ],
)
def test_mistakes_name_the_row(tokenizer, tmp_path, row, said):
    with pytest.raises(UserError, match=said) as error:
        one(tokenizer, tmp_path, FORMS["texts"], row)
    assert "\n" not in str(error.value)


def test_equal_answers_are_warned_of(tokenizer, tmp_path):
    same = {**FORMS["texts"], "rejected": "good"}
    data = one(tokenizer, tmp_path, FORMS["texts"], same)
    (warning,) = data.report.warnings
    assert warning.startswith("in 1 of 2 pairs chosen equals rejected, first in data.name=")
    assert "a.jsonl row 2:" in warning


@torch.no_grad()
def test_the_loss_is_that_of_the_paper():
    torch.manual_seed(1)
    model, base = make_llama(), make_llama(rope_theta=10.0)
    pairs = [
        Example((5, 6, 7, 8), 2, rejected=Example((5, 6, 9), 2)),
        Example((8, 9, 10, 11, 12), 1, (3,), Example((8, 9, 13, 14, 15, 16), 1)),
    ]

    def log_probability(model, e):
        scores = model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
        places = [i for i in range(e.target, len(e.ids)) if i not in e.ignored]
        return sum(scores[i - 1, e.ids[i]].double() for i in places)

    reference = Reference(CAUSAL, 0, lambda steps: pairs)
    for key, batch in reference.missing(1):
        reference.known[key] = float(reference.score(base, batch))
    assert not reference.missing(1)
    margins = []
    for pair in pairs:
        gains = [log_probability(model, e) - log_probability(base, e) for e in pair.sides]
        assert abs(reference.of(pair) - log_probability(base, pair)) < 1e-5
        margins.append(0.5 * (gains[0] - gains[1]))
    assert digest(pairs[0]) != digest(pairs[0].rejected)
    task = preference(CAUSAL, 0, 0.5, reference)
    found = task.terms(model, task.collate(pairs, pairs))
    losses = [-math.log(1 / (1 + math.exp(-margin))) for margin in margins]
    expected = [sum(losses), 2, sum(m > 0 for m in margins), sum(margins)]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def settings(overrides, tmp_path):
    rows = [
        {"prompt": " ".join(WORDS[n : n + 2 + n % 4]), "chosen": "good", "rejected": "bad dull"}
        for n in range(16)
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    kept = [o for o in overrides if not o.startswith(("data.name", "update.lr", "run.steps"))]
    return [*kept, f"data.name={data}", "run.steps=4", "update.lr=1e-2", "data.dev_examples=3"]


PLACES = [
    ["memory.store=host", "memory.slots=2", "memory.lag=2"],
    ["memory.store=disk", "memory.unit=module", "memory.lag=1"],
]
LORA = ["peft.type=lora", "estimator.distribution=rank-one", "batch.fold=2"]


def test_a_run_has_the_same_bits_in_every_store_and_when_its_numbers_are_lost(settings, tmp_path):
    whole = run(settings, tmp_path / "whole")
    assert set(whole["eval"]) == {"accuracy", "loss", "margin"}
    content = json.loads((tmp_path / "whole" / "reference.json").read_text())
    for number, place in enumerate(([], *PLACES)):
        folder = tmp_path / str(number)
        run(settings, folder, *place, "run.steps=2")
        kept = folder / "reference.json"
        known = json.loads(kept.read_text())["values"]
        assert len(known) < len(content["values"])
        if number:
            kept.unlink()
        else:
            kept.write_text(kept.read_text().replace("-", "-1", 1))
        assert run(settings, folder, *place)["fingerprint"] == whole["fingerprint"]
        assert same_log(folder / "steps.log", tmp_path / "whole" / "steps.log")
        assert json.loads(kept.read_text()) == content
    loaded = load_run(tmp_path / "whole", step=0)
    # Under the base itself a margin is 0, up to the rounding that padding changes.
    scores = loaded.problem.task.summarize(
        loaded.replica.plain(
            [
                lambda: loaded.problem.task.terms(
                    loaded.replica.model, loaded.problem.dev_batches[0]
                )
            ],
            1,
            1,
        )[0].tolist()
    )
    loaded.replica.close()
    assert abs(scores["margin"]) < 1e-5 and abs(scores["loss"] - math.log(2)) < 1e-5


@pytest.mark.slow
def test_ranks_find_the_same_numbers(settings, tmp_path):
    expected = run([*settings, *LORA], tmp_path / "alone")
    ranks = ["memory.store=disk", "memory.lag=1", "mesh.slice=2", f"run.dir={tmp_path}/ranks"]
    assert train([*settings, *LORA, *ranks], ranks=2)["fingerprint"] == expected["fingerprint"]
    files = [tmp_path / name / "reference.json" for name in ("alone", "ranks")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_margins_rise(settings, tmp_path):
    options = ["run.steps=60", "eval.every=60", "update.lr=3e-2", "estimator.directions=4"]
    scores = run(settings, tmp_path / "run", *options)["eval"]
    assert scores["accuracy"] == 1.0 and scores["margin"] > 0.05


def test_a_wrong_beta_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"^objective\.beta=0\.0 must be a number above 0"):
        run(settings, tmp_path / "run", "objective.beta=0")
