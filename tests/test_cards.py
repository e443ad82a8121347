"""Model cards: nothing on them is invented, the snippet runs, and so does what repeats the run."""

import json
import re

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer
from plain import CARD, plain_config, run
from transformers import BertConfig, BertForSequenceClassification

from zo import Trainer, load_config
from zo.run.base_card import read_base_card
from zo.run.model_card import Card, model_card, python_of


def card_in(folder):
    return (folder / "model" / "README.md").read_text()


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def execute(text, heading, folder, monkeypatch):
    """Execute the first block of code under a heading in a folder; return its names."""
    code = re.search(rf"## {heading}\n\n```\w*\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names


def of_own_data(overrides, path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = ("data.name", "data.template", "data.label_words", "estimator.directions")
    return [*(o for o in overrides if not o.startswith(dropped)), f"data.name={path}"]


PAIRS = [{"prompt": "the film was", "completion": "good"}] * 20
FORMS = {
    "choice": ("text-generation", "transformers", []),
    "chat": ("text-generation", "transformers", []),
    "plain": ("text-generation", "transformers", []),
    "adapter": ("text-generation", "peft", ["peft.type=lora"]),
    "class": ("text-classification", "transformers", []),
    "no tokenizer": ("text-generation", "transformers", []),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_snippet_of_a_card_runs(overrides, tiny_model, tmp_path, form, monkeypatch, capsys):
    pipeline, library, extra = FORMS[form]
    settings = overrides
    if form in ("chat", "plain"):
        settings = of_own_data(overrides, tmp_path / "pairs.jsonl", PAIRS)
        settings += ["data.template=null", "data.label_words=null"]
    if form == "plain":
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        make_llama().save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        settings += [f"model.name={tmp_path}/base"]
    if form == "class":
        torch.manual_seed(0)
        sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "intermediate_size": 48}
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        settings = [*overrides, f"model.name={tmp_path}/base"]
    if form == "no tokenizer":
        settings = of_own_data(overrides, tmp_path / "none.jsonl", PAIRS)
        settings += ["data.name=synthetic", "batch.max_tokens=8"]
    if form == "adapter":
        pytest.importorskip("peft", reason="needs the extra peft")
    run([*settings, *extra], tmp_path / "run", "run.steps=1", "export.at_end=true")
    text = card_in(tmp_path / "run")
    matter = front_matter(text)
    assert (matter["pipeline_tag"], matter["library_name"]) == (pipeline, library)
    assert ("lora" in matter["tags"]) == (form == "adapter")
    capsys.readouterr()
    names = execute(text, "Use", tmp_path / "run" / "model", monkeypatch)
    said = capsys.readouterr().out
    assert said.strip() or form == "no tokenizer"
    if form == "choice":
        assert said.strip() in ("terrible", "great")
    if form == "class":
        assert "score" in said
    if form == "no tokenizer":
        assert type(names["model"]).__name__ == "LlamaForCausalLM"


CARDS = {
    "of a licence": (
        "---\nlicense: other\nlicense_name: gentle\nlicense_link: https://example.org\n"
        "base_model: someone/base\nextra: 1\n---\n# x",
        {
            "license": "other",
            "license_name": "gentle",
            "license_link": "https://example.org",
            "base_model": "someone/base",
        },
    ),
    "without metadata": ("# A model\nApache-2.0, or so", {}),
    "torn": ("---\nlicense: [\n---\n", {}),
    "of another type": ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
    "in no encoding": (b"---\nlicense: \xff\xfe\n---\n", {}),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_base_models_card_is_read_and_never_guessed(tmp_path, name):
    content, expected = CARDS[name]
    path = tmp_path / "README.md"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_base_card(str(tmp_path)) == expected


def test_a_base_without_a_card_and_a_hub_out_of_reach_have_no_licence(tmp_path, monkeypatch):
    assert read_base_card(str(tmp_path)) == {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_base_card("someone/model-that-is-not-cached") == {}
    assert read_base_card("not an id/at all") == {}
    packaged = read_base_card("smollm2-135m-instruct")
    assert packaged == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }


def test_what_repeats_a_run_from_python_repeats_it(overrides, tmp_path, monkeypatch):
    """The card of a run that no command started, from a folder whose base has a licence."""
    make_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(CARDS["of a licence"][0])
    settings = [*overrides, f"model.name={tmp_path}/base", "export.at_end=true", "eval.every=1"]
    config = plain_config([*settings, f"run.dir={tmp_path}/run", "run.steps=2"])
    summary = Trainer(config).train()
    text = card_in(tmp_path / "run")
    matter = front_matter(text)
    assert (matter["license_name"], matter["base_model"]) == ("gentle", "someone/base")
    assert "The base model's licence (gentle) and limits hold." in text
    assert f"run.dir={tmp_path}" not in text
    (tmp_path / "again").mkdir()
    repeated = execute(text, "Reproduce", tmp_path / "again", monkeypatch)
    (again,) = (tmp_path / "again" / "runs").iterdir()
    status = json.loads((again / "status.json").read_text())
    assert status["summary"]["fingerprint"] == summary["fingerprint"]
    assert repeated["config"].update == config.update


ANY = [
    r"data.template='it\'s {text}: \\ \"so\" [x]'",
    "data.label_words=[' a',' b, c']",
    "data.columns={text: review}",
    "update.lr=1e-7",
    "run.trackers=[]",
    "mesh.perturb=2",
]


@pytest.mark.parametrize("settings", [ANY, ["task=sst2"], ["task=sst2", "data.name=movie-reviews"]])
def test_any_value_of_a_configuration_is_repeated(settings):
    config = load_config("quickstart", settings)
    names = {}
    code = python_of(config, is_own=False).replace("Trainer(config).train()", "")
    exec(code, names)
    assert names["config"] == config


def test_a_users_own_model_is_not_called_by_the_recipes_names(tmp_path, overrides):
    ids = torch.randint(3, 24, (4, 9), generator=torch.Generator().manual_seed(1))
    settings = [f"run.dir={tmp_path}/run", "run.steps=1", "batch.sequences=4", "batch.micro=4"]
    Trainer(
        plain_config([*settings, "eval.every=0"]),
        model=make_llama(),
        objective=lambda model, batch: model(**batch).loss,
        batches=lambda step, column: {"input_ids": ids, "labels": ids},
    ).train()
    text = card_in(tmp_path / "run")
    assert "base_model" not in front_matter(text)
    assert "license" not in front_matter(text)
    assert "| base model | own model |" in text
    assert "objective=objective, batches=batches).train()" in text


def test_the_card_tells_how_to_repeat_and_check_the_run():
    text = model_card(CARD)
    assert front_matter(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "tags": ["zeroth-order", "forward-only", "zo"],
    }
    assert f"```\n{CARD.command}\n```" in text
    for said in (
        "| base model | HuggingFaceTB/SmolLM2-135M-Instruct |",
        f"| base model fingerprint | {CARD.base_fingerprint} |",
        "| data | movie-reviews |",
        f"| data checksum | {CARD.data_checksum} |",
        "| recipe | quickstart |",
        f"| method | {CARD.method} |",
        "| steps | 7 |",
        "| seed | 3 |",
        "| accuracy | 0.753906 |",
        "| torch | 2.13.0 |",
        CARD.fingerprint,
    ):
        assert said in text


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("facebook/opt-125m", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("smollm2-135m-instruct", False),
        ("/data/model", False),
        ("../models/opt", False),
        ("folder/train.jsonl", False),
        ("tests/fixture", False),
        ("a: b/c", False),
    ],
)
def test_only_what_the_hub_has_is_linked(name, is_id, tmp_path, monkeypatch):
    """The hub refuses a card whose base_model or datasets are no ids."""
    (tmp_path / "tests" / "fixture").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    matter = front_matter(model_card(Card(**{**CARD.__dict__, "base": name, "data": name})))
    assert matter.get("base_model") == (name if is_id else None)
    assert matter.get("datasets") == ([name] if is_id else None)


def test_a_card_survives_awkward_values():
    text = model_card(
        Card(**{**CARD.__dict__, "recipe": "a|b\nc", "metrics": {}, "data": "{x}: - [y"})
    )
    assert "| recipe | a\\|b c |" in text
    assert "Not evaluated." in text
    assert "base_model" in front_matter(text)
