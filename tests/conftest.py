"""Small real models and data that tests share, and a clean place to run in."""

import json
import os
import random
import sys
from importlib import import_module

import pytest
import torch
from plain import PLAIN
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    *[
        "the",
        "film",
        "was",
        "a",
        "bad",
        "good",
        "great",
        "terrible",
        "dull",
        "bright",
        "long",
        "short",
        "it",
        "story",
        "and",
        "of",
        "cast",
        "plot",
        "ending",
        "very",
    ]
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

torch.set_num_threads(1)
"""Workers of the suite share the cores: threads in each would mostly wait for one another's."""


def make_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    made.chat_template = CHAT
    return made


def make_llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a Llama of 23,000 parameters with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A .jsonl of 60 reviews with text and label, of many lengths."""
    path, chance = tmp_path_factory.mktemp("data") / "reviews.jsonl", random.Random(0)
    rows = [
        {
            "text": " ".join(chance.choices(WORDS, k=chance.randint(3, 20))),
            "label": chance.choice(["terrible", "great"]),
        }
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def overrides(tiny_model, reviews):
    """Overrides that make the quickstart a run of a second on the tiny model and data."""
    settings = [
        f"model.name={tiny_model}",
        f"data.name={reviews}",
        "data.template='{text} it was'",
        "data.label_words=[terrible,great]",
        "data.dev_examples=10",
        "batch.sequences=4",
        "batch.micro=2",
        "batch.max_tokens=64",
        "update.lr=1e-3",
        "update.schedule=constant",
        "update.warmup_steps=0",
        "estimator.directions=1",
        "run.steps=4",
        "eval.every=2",
        "export.at_end=false",
    ]
    given = {setting.partition("=")[0] for setting in settings}
    plain = [setting for setting in PLAIN if setting.partition("=")[0] not in given]
    return [*settings[:-1], *plain, settings[-1]]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command in this process: exit code, stdout, stderr."""
    from zo.config import cli
    from zo.observe import progress

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "QUIET_S", 60.0)  # On a busy machine a phase may last a second.

    def run(name, *arguments):
        main = import_module(f"zo.commands.{name}").main
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            code = cli.run(main)
        except SystemExit as error:  # Of a finding, such as that two logs part.
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def why_no_deepnvme():
    """Return the disk engine's error if libaio's headers or a compiler are missing, else ``""``."""
    from zo.errors import UserError
    from zo.io.engines import ENGINES

    try:
        ENGINES["deepnvme"]()
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def skip_without_deepnvme(request):
    """Skip cases of the engine, with its error as the reason, where it cannot be compiled."""
    case = getattr(request.node, "callspec", None)
    if (
        case
        and "deepnvme" in repr(case.params)
        and (why := request.getfixturevalue("why_no_deepnvme"))
    ):
        pytest.skip(why)


def pytest_runtest_logreport(report):
    """List tests skipped for want of a Debian package in the file that ``.ci/run`` names."""
    listed = os.environ.get("ZO_MISSING_PACKAGES")
    if not (listed and report.skipped and isinstance(report.longrepr, tuple)):
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # The process that started the workers has every report too.
    if any(words in report.longrepr[2] for words in ("deepnvme needs", "iproute2", "chromium")):
        with open(listed, "a") as file:
            file.write(report.nodeid + "\n")
