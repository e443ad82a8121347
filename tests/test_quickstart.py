"""The quickstart's real model and data, from the package index, and its run on them."""

import hashlib
import json
import os
from dataclasses import replace

import pytest
import torch
from ranks import RECIPE, server, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo.errors import UserError
from zo.io import quickstart as assets

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.


def test_the_reviews_are_the_published_ones():
    rows = assets.movie_reviews()
    assert sum(row["label"] for row in rows) == 4539
    assert len(rows) == 4539 + 4484
    assert all(row["text"] and row["text"] == row["text"].strip() for row in rows)


def test_the_model_is_whole_and_loads_as_any_other():
    folder = assets.model_folder("smollm2-135m-instruct")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert [len(tokenizer(word)["input_ids"]) for word in (" negative", " positive")] == [1, 1]
    # A broken conversion still loads; it does not know what comes next.
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("ranks", [2])
def test_real_weights_train_to_the_same_bits_on_two_ranks(tmp_path, ranks):
    settings = [RECIPE, "run.steps=2", "eval.every=2", "data.dev_examples=8", "batch.sequences=4"]
    settings.append("export.at_end=false")
    alone = train([*settings, f"run.dir={tmp_path}/alone"])
    shared = train([*settings, f"run.dir={tmp_path}/shared"], ranks=ranks)
    assert shared["fingerprint"] == alone["fingerprint"]
    assert shared["eval"] == alone["eval"]


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ZO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_index_that_cannot_be_reached_ends_in_one_line_and_leaves_nothing(
    empty_cache, monkeypatch
):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"pip could not fetch vaderSentiment==3\.3\.2: .*"
    ) as caught:
        assets.movie_reviews()
    assert "\n" not in str(caught.value)
    assert [path.name for path in empty_cache.iterdir()] == ["movie-reviews.lock"]


def test_a_file_with_another_hash_is_refused(empty_cache, monkeypatch):
    monkeypatch.setattr(
        assets, "VADER", replace(assets.VADER, sha256=hashlib.sha256(b"other").hexdigest())
    )
    with pytest.raises(UserError, match="pip could not fetch"):
        assets.movie_reviews()
    assert [path.name for path in empty_cache.iterdir()] == ["movie-reviews.lock"]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("ZO_CACHE", "/proc/zo")
    with pytest.raises(UserError, match="set ZO_CACHE to a writable folder"):
        assets.movie_reviews()


def count_rows(cache, results):
    os.environ["ZO_CACHE"] = cache
    results.put(len(assets.movie_reviews()))


def test_ranks_that_start_together_fill_the_cache_once(tmp_path):
    context = server()
    results = context.Queue()
    processes = [
        context.Process(target=count_rows, args=(str(tmp_path / "cache"), results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [9023] * 3
    for process in processes:
        process.join()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "movie-reviews",
        "movie-reviews.lock",
    }


def test_the_folder_of_the_cache_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.delenv("ZO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "zo"
    assert json.dumps(sorted(assets.MODELS)) == '["smollm2-135m-instruct"]'
