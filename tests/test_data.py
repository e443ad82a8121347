"""Batches as a pure function, encoding, and losses that do not depend on padding."""

import json
import math
import time

import pytest
import torch
from conftest import WORDS, make_llama
from transformers import BertConfig, BertForSequenceClassification

from zo.config.checks import check_threads
from zo.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    RunConfig,
)
from zo.data import tasks
from zo.data.batches import Data, build_data, sequence_numbers
from zo.data.rows import Rows, label_index
from zo.data.tasks import Example
from zo.errors import UserError
from zo.model.info import ModelInfo

CAUSAL = ModelInfo(
    "causal-lm",
    24,
    frozenset({"input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache"}),
)
BARE = ModelInfo("causal-lm", 24, frozenset({"input_ids", "attention_mask", "use_cache"}))
CLASSIFIER = ModelInfo("sequence-classification", 24, frozenset({"input_ids", "attention_mask"}))
# Padding changes the order of sums inside attention: float32's last digits, and no more.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def built(tokenizer, data, info=CAUSAL, classes=(), **batch):
    config = Config(data=data, batch=BatchConfig(**({"sequences": 4, "micro": 2} | batch)))
    return build_data(Rows(data), config, tokenizer, info, classes)


def test_every_epoch_draws_every_example_once_in_another_order():
    steps = [sequence_numbers(3, step, 4, 10) for step in range(10)]
    drawn = [number for step in steps for number in step]
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_any_step_can_be_drawn_first():
    """A resumed run and every rank must see the data that an uninterrupted single process sees."""
    forwards = [sequence_numbers(7, step, 4, 10) for step in range(9)]
    assert [sequence_numbers(7, step, 4, 10) for step in reversed(range(9))] == forwards[::-1]
    assert sequence_numbers(8, 0, 4, 10) != forwards[0]


def test_more_sequences_than_examples():
    assert sorted(sequence_numbers(0, 0, 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_micro_batches_of_a_step_are_its_sequences_by_length():
    examples = [Example(tuple(range(1, 2 + n)), 1) for n in range(1, 13)]
    data = Data(tasks.completion(CAUSAL, 0), examples, [], BatchConfig(sequences=6, micro=2), 1)
    lengths = [int(row.sum()) for c in range(3) for row in data.batches(1, c)["attention_mask"]]
    assert lengths == sorted(len(examples[i].ids) for i in sequence_numbers(1, 1, 6, 12))


@torch.no_grad()
@pytest.mark.parametrize("info", [CAUSAL, BARE])
def test_padding_does_not_change_the_loss_of_a_choice(info):
    model, words = make_llama(), [7, 10]
    examples = [Example((5, 6, 7), 0), Example((8, 9, 10, 11, 12, 13, 14), 1)]
    task = tasks.choice(info, 0, words)
    together = task.terms(model, task.collate(examples, examples))
    alone = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, -1, words]
        alone.append(-logits.log_softmax(-1)[example.target].double())
    torch.testing.assert_close(together[0], sum(alone), **CLOSE)
    assert together[1] == 2


@torch.no_grad()
@pytest.mark.parametrize("sequences", [1, 2, 5, 10])
@pytest.mark.parametrize("make", ["choice", "completion"])
def test_short_micro_batches_have_the_same_bits_with_any_number_of_threads(make, sequences):
    """By default one process has all cores, and of several ranks each its share."""
    model = make_llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    words, threads, found = [[1, 2]] * (make == "choice"), torch.get_num_threads(), []
    task = getattr(tasks, make)(CAUSAL, 0, *words)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for length in range(2, 14):
                ids = (3, *(4 + i % 9 for i in range(length - 1)))
                batch = [Example(ids, 1)] * sequences
                found.append(task.terms(model, task.collate(batch, batch)))
    finally:
        torch.set_num_threads(threads)
    assert torch.stack(found[:12]).equal(torch.stack(found[12:]))


@torch.no_grad()
@pytest.mark.parametrize("info", [CAUSAL, BARE])
def test_only_the_tokens_of_a_completion_have_a_loss(info):
    model = make_llama()
    examples = [Example((5, 6, 7, 8, 9), 2), Example((8, 9, 10, 11, 12, 13, 14), 6)]
    task = tasks.completion(info, 0)
    found, expected = task.terms(model, task.collate(examples, examples)), 0
    for e in examples:
        scores = model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
        expected -= sum(scores[i - 1, e.ids[i]].double() for i in range(e.target, len(e.ids)))
    torch.testing.assert_close(found[0], expected, **CLOSE)
    assert found[1] == 4


@torch.no_grad()
def test_padding_does_not_change_the_loss_of_a_class():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
    task = tasks.classification(CLASSIFIER, 0)
    examples = [Example((5, 6, 7), 0), Example((8, 9, 10, 11, 12, 13, 14), 2)]
    found = task.terms(model, task.collate(examples, examples))
    alone = [
        -model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)[e.target].double()
        for e in examples
    ]
    torch.testing.assert_close(found[0], sum(alone), **CLOSE)


@torch.no_grad()
def test_the_loss_of_a_bf16_model_has_the_resolution_of_float32():
    """A bf16 loss moves in steps of 1/128: the difference of two probes would be zero or noise."""
    model, task = make_llama().to(torch.bfloat16), tasks.completion(CAUSAL, 0)
    loss = task.objective(model, task.collate(*[[Example((5, 6, 7, 8, 9), 1)]] * 2))[0]
    assert loss.dtype == torch.float64
    assert float(loss) != float(loss.to(torch.bfloat16))


def test_the_kinds_of_rows(tokenizer, tmp_path):
    the, good, great, end = tokenizer.convert_tokens_to_ids(["the", "good", "great", "<eos>"])
    cases = {
        "prompted": ([{"prompt": "the", "completion": "good great"}], (the, good, great, end), 1),
        "text": ([{"text": "the good great"}], (the, good, great, end), 1),
    }
    for name, (rows, ids, target) in cases.items():
        data = built(
            tokenizer, DataConfig(name=write(tmp_path / f"{name}.jsonl", rows), dev_examples=0)
        )
        assert data.train == [Example(ids, target)]


def test_the_answer_of_messages_is_trained_on(tokenizer, tmp_path):
    said = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good great"}]
    data = built(
        tokenizer,
        DataConfig(name=write(tmp_path / "m.jsonl", [{"messages": said}]), dev_examples=0),
    )
    (example,) = data.train
    assert tokenizer.decode(example.ids[example.target :]).split() == ["good", "great"]
    for bad in ([], said[:1]):
        with pytest.raises(UserError, match="row 1: messages must"):
            built(
                tokenizer,
                DataConfig(name=write(tmp_path / "b.jsonl", [{"messages": bad}]), dev_examples=0),
            )


def test_files_of_every_kind_give_the_same_examples(tokenizer, tmp_path):
    import pandas

    rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": WORDS[i]} for i in range(10)]
    table = pandas.DataFrame(rows)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write(tmp_path / "a.jsonl", rows)
    checksums = {
        built(tokenizer, DataConfig(name=str(tmp_path / f"a.{kind}"), dev_examples=2)).checksum
        for kind in ("csv", "parquet", "json", "jsonl")
    }
    assert len(checksums) == 1


def test_held_out_rows_are_never_trained_on_and_the_same_for_every_seed(reviews):
    rows = Rows(DataConfig(name=str(reviews), dev_examples=10))
    texts = [row["text"] for row in rows.train], [row["text"] for row in rows.dev]
    assert (len(texts[0]), len(texts[1])) == (50, 10)
    assert not set(texts[0]) & set(texts[1])
    fewer = Rows(DataConfig(name=str(reviews), dev_examples=10, train_examples=5))
    assert [row["text"] for row in fewer.dev] == texts[1]
    assert len(fewer.train) == 5
    few = Rows(DataConfig(name=str(reviews), per_label=4))
    for part in few.train, few.dev:
        assert sorted(row["label"] for row in part) == ["great"] * 4 + ["terrible"] * 4


def test_rows_without_a_label_are_not_drawn_by_it(tmp_path):
    name = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=r"pairs.jsonl.* 1: data.per_label=4 draws rows by column"):
        Rows(DataConfig(name=name, per_label=4))


def test_what_is_too_long_loses_the_start_of_its_prompt(tokenizer, tmp_path):
    rows = [
        {"prompt": " ".join(WORDS), "completion": "good great"},
        {"prompt": "the", "completion": " ".join(WORDS)},
    ]
    data = built(
        tokenizer,
        DataConfig(name=write(tmp_path / "long.jsonl", rows), dev_examples=0),
        max_tokens=6,
    )
    first, second = (tokenizer.decode(e.ids).split() for e in data.train)
    assert first == [*WORDS[-3:], "good", "great", "<eos>"]
    assert second == WORDS[:6]
    assert [e.target for e in data.train] == [3, 1]


def test_labels_by_word_or_number():
    names = [" terrible", " great"]
    known = {0: 0, 1: 1, "great": 1, " terrible ": 0}
    assert {label: label_index(label, names) for label in known} == known
    assert all(label_index(label, names) is None for label in (2, -1, "meh", True, 0.5, None))


def test_a_classifier_learns_its_classes_from_the_rows(tokenizer, reviews):
    rows = Rows(DataConfig(name=str(reviews)))
    assert (len(rows.train), len(rows.dev)) == (48, 12)
    assert rows.class_names() == ["great", "terrible"]
    assert rows.class_names(["terrible", "great", "neutral"]) == ["terrible", "great", "neutral"]
    data = built(
        tokenizer, DataConfig(name=str(reviews), dev_examples=0), CLASSIFIER, ["terrible", "great"]
    )
    assert {e.target for e in data.train} == {0, 1}
    assert data.task.kind == "class"


def test_synthetic_sequences_fill_the_budget_and_need_no_tokenizer():
    config = Config(
        data=DataConfig(name="synthetic"), batch=BatchConfig(sequences=4, micro=2, max_tokens=16)
    )
    data = build_data(Rows(config.data), config, None, CAUSAL, [])
    batches = [data.batches(step, column) for step in range(3) for column in range(2)]
    assert all(b["input_ids"].shape == (2, 16) and bool(b["attention_mask"].all()) for b in batches)
    rows = torch.cat([b["input_ids"] for b in batches])
    assert len({tuple(row) for row in rows.tolist()}) == 12
    assert 0 <= int(rows.min()) <= int(rows.max()) < 24
    assert torch.equal(data.batches(2, 1)["input_ids"], batches[5]["input_ids"])


def test_scores_are_of_the_whole_set():
    choice, completion = tasks.choice(CAUSAL, 0, [1, 2]), tasks.completion(CAUSAL, 0)
    assert choice.summarize([6.0, 12.0, 9.0]) == {"accuracy": 0.75, "loss": 0.5}
    assert completion.summarize([6.0, 12.0, 0.0]) == {"loss": 0.5, "perplexity": math.exp(0.5)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: BatchConfig(sequences=10**9, micro=7),
            "batch.sequences=1000000000 is out of range",
        ),
        (
            lambda: EstimatorConfig(directions=10**9),
            "estimator.directions=1000000000 is out of range",
        ),
        (
            lambda: Config(
                estimator=EstimatorConfig(directions=2**12),
                batch=BatchConfig(sequences=2**10, micro=1),
            ),
            "are 4194304 pairs a step; use at most 1048576",
        ),
        (lambda: RunConfig(threads=100_000), "run.threads=100000 is out of range"),
        (lambda: check_threads(99, 2), "use at most 8"),
        (lambda: RunConfig(steps=-(10**400)), "is out of range"),
    ],
)
def test_numbers_beyond_all_machines_are_refused_at_once(make, said):
    started = time.monotonic()
    with pytest.raises(UserError, match=said):
        make()
    assert time.monotonic() - started < 1
