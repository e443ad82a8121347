"""What looks like a secret is in nothing that a run stores; what does not is stored as it was
typed."""

import time

import pytest

from zo.config.redact import without_secrets, without_secrets_in

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7xY9zA2c"
KEY = "0123456789abcdef" * 2 + "01234567"
"""As W&B's were: nothing tells them from a commit."""
HIDDEN = [
    ("data.name=https://user:p@ss@host/a.jsonl", "data.name=https://***@host/a.jsonl"),
    ("1st_token=abc", "1st_token=***"),
    ("x=wandb_v1_0123456789abcdefgh", "x=***"),
    (f"data_{TOKEN}cde.jsonl", "data_***.jsonl"),
    (
        "said 401 to Authorization: Bearer abcdefgh0123456789",
        "said 401 to Authorization: Bearer ***",
    ),
    ("data.name=" + TOKEN, "data.name=***"),
    (TOKEN, "***"),
    (f"HF_TOKEN={TOKEN} python", "'HF_TOKEN=***' python"),
    ("hub.token=abc", "hub.token=***"),
    ("+hub.token=abc", "+hub.token=***"),
    ("token=abc", "token=***"),
    ("authToken=abc", "authToken=***"),
    ("aws_secret_access_key=abc", "aws_secret_access_key=***"),
    ("client.secret=abc", "client.secret=***"),
    ("db_password='my pass word'", "db_password=***"),
    ("python x 'db_password=my pass word'", "python x 'db_password=***'"),
    ("python x 'note=he said it' password=hunter2", "python x 'note=he said it' 'password=***'"),
    ("api_key=abc", "api_key=***"),
    ("key=Zx81kQ0pLm29vBn4", "key=***"),
    ("model.key=Zx81kQ0pLm29vBn4", "model.key=***"),
    ("data.name=https://user:pass@host/a.jsonl", "data.name=https://***@host/a.jsonl"),
    ("data.name=https://oauth2-token@host/a.jsonl", "data.name=https://***@host/a.jsonl"),
    (
        "data.name=https://host/a.jsonl?token=abc&x=1",
        "data.name=https://host/a.jsonl?token=***&x=1",
    ),
    (
        "data.name=https://host/a?X-Amz-Signature=0f3&b=2",
        "data.name=https://host/a?X-Amz-Signature=***&b=2",
    ),
    ("x=ghp_0123456789abcdefABCDEF0123456789abcd", "x=***"),
    ("x=AKIAIOSFODNN7EXAMPLE", "x=***"),
    ("x=sk-proj-0123456789abcdefghij", "x=***"),
    ("x=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", "x=***"),
]
SHOWN = [
    "python launch/train.py recipe=quickstart batch.max_tokens=512 model.tokenizer=org/tokenizer",
    "python launch/train.py recipe=opt-13b 'data.template={text} it was' "
    "'data.label_words=[terrible,great]'",
    "data.name=nyu-mll/glue data.subset=sst2 update.lr=1e-6 run.dir=runs/a-20260101-101010-123456",
    "model.name=HuggingFaceTB/SmolLM2-135M-Instruct run.seed=18446744073709551",
    "data.name=https://host/a.jsonl?x=1",
    "key=value",
    "model.key=attention_key",
    "Is this a token: {text}? Password: {word} token={text}",
    "it's a text with one quote",
    "model.revision=3f2a9c1b7d5e4f60718293a4b5c6d7e8f9012345",
    "",
]


@pytest.mark.parametrize(("typed", "stored"), HIDDEN)
def test_a_secret_is_replaced(typed, stored):
    assert without_secrets(typed) in (stored, stored.replace("'", ""))


@pytest.mark.parametrize("typed", SHOWN)
def test_what_is_no_secret_is_stored_word_for_word(typed):
    assert without_secrets(typed) == typed


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_of_the_environment_is_one_wherever_it_stands(monkeypatch, name):
    assert without_secrets(f"at {KEY}.") == f"at {KEY}."
    monkeypatch.setenv(name, KEY)
    assert without_secrets(f"at {KEY}.") == "at ***."
    assert without_secrets_in({"data": {"name": f"a/{KEY}"}}) == {"data": {"name": "a/***"}}


def test_the_working_folder_is_no_password(monkeypatch):
    monkeypatch.setenv("PWD", "/data/reviews")
    assert without_secrets("data.name=/data/reviews/a.csv") == "data.name=/data/reviews/a.csv"


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "a=" * 50_000, "key=" * 25_000, "eyJ-" * 50_000, "secret" * 30_000 + ".=x"],
    ids=["word", "assignments", "keys", "tokens", "secrets"],
)
def test_a_long_text_takes_no_time(text):
    """It took hours: a row of a data set may be one word of some hundred kilobytes."""
    begun = time.process_time()
    without_secrets(text)
    assert time.process_time() - begun < 5


def test_groups_and_lists_are_gone_through():
    tree = {
        "config": {"batch": {"max_tokens": 512}, "hub": {"token": "abc", "names": [TOKEN, "x"]}},
        "command": TOKEN,
    }
    assert without_secrets_in(tree) == {
        "config": {"batch": {"max_tokens": 512}, "hub": {"token": "***", "names": ["***", "x"]}},
        "command": "***",
    }


def test_no_file_of_a_run_holds_a_secret(command, overrides, reviews, tmp_path, monkeypatch):
    """And a run whose stored keys were cleaned is the same run to the command that began it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    data = tmp_path / f"{TOKEN}.jsonl"
    data.write_bytes(reviews.read_bytes())
    settings = [
        overrides[0],
        f"data.name={data}",
        *overrides[2:-1],
        "export.at_end=true",
        "data.split=${oc.env:WANDB_API_KEY}",
        f"run.dir={tmp_path}/run",
    ]
    for steps in (2, 3):
        code, _, err = command("train", *settings, f"run.steps={steps}")
        assert code == 0, err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "README.md"} <= {path.name for path in files}
    for secret in (TOKEN, KEY):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert b"***.jsonl" in (tmp_path / "run" / "model" / "README.md").read_bytes()
