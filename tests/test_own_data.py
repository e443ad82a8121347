"""A user's own data: forms and files, what is cut, the report, and mistakes by file and row."""

import json
import sys
from copy import deepcopy

import pytest
import torch
from conftest import WORDS, make_llama
from test_data import CAUSAL, CLASSIFIER, built, write
from transformers import AutoTokenizer

from zo import Trainer, load_config
from zo.commands.train import main
from zo.config import cli
from zo.config.schema import BatchConfig, DataConfig
from zo.data import tasks
from zo.data.batches import Data
from zo.data.rows import Rows
from zo.data.tasks import Example
from zo.errors import UserError

SAID = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "the plot"},
    {"role": "assistant", "content": "very dull"},
]
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in SAID]
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if m.role == 'assistant' and loop.last %}bright {% endif %}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Writes the reasoning of the last turn alone, as several families' templates do."""


def one(tokenizer, path, row, **settings):
    """Return the data of one row."""
    batch = {key: settings.pop(key) for key in ("max_tokens",) if key in settings}
    name = write(path / "one.jsonl", [row])
    return built(tokenizer, DataConfig(name=name, dev_examples=0, **settings), **batch)


def trained(tokenizer, example):
    """Return the words of an example that have a loss."""
    kept = [i for i in range(example.target, len(example.ids)) if i not in example.ignored]
    return tokenizer.decode([example.ids[i] for i in kept]).split()


def templated(tokenizer, template):
    made = deepcopy(tokenizer)
    made.chat_template = template
    return made


@pytest.mark.parametrize("row", [{"messages": SAID}, {"conversations": SHAREGPT}])
@pytest.mark.parametrize("then", [[], [{"role": "user", "content": "it was"}]])
def test_every_turn_of_the_assistant_has_a_loss_and_no_other(tokenizer, tmp_path, row, then):
    (key,) = row
    (example,) = one(tokenizer, tmp_path, {key: row[key] + then}).train
    assert trained(tokenizer, example) == ["good", "very", "dull"]


def test_a_template_that_marks_the_assistant_is_believed(tokenizer, tmp_path):
    """It may mark the end of a turn, which is then trained on too."""
    marked = templated(tokenizer, MARKED)
    (example,) = one(marked, tmp_path, {"messages": SAID}).train
    assert trained(tokenizer, example) == ["good", "<eos>", "very", "dull", "<eos>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_sequence_a_turn(tokenizer, tmp_path):
    """Each is what the model sees when it answers."""
    examples = one(templated(tokenizer, FORGETFUL), tmp_path, {"messages": SAID}).train
    assert [trained(tokenizer, e) for e in examples] == [
        ["bright", "good"],
        ["bright", "very", "dull"],
    ]
    assert tokenizer.decode(examples[1].ids).split().count("bright") == 1


@torch.no_grad()
def test_the_loss_of_a_conversation_is_that_of_its_trained_tokens():
    model, task = make_llama(), tasks.completion(CAUSAL, 0)
    examples = [Example((5, 6, 7, 8, 9, 10), 2, (3, 4)), Example((8, 9, 10), 1)]
    found, expected = task.terms(model, task.collate(examples, examples)), 0
    for e in examples:
        scores = model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1)
        kept = [i for i in range(e.target, len(e.ids)) if i not in e.ignored]
        expected -= sum(scores[i - 1, e.ids[i]].double() for i in kept)
    # Padding changes the order of sums inside attention.
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert found[1] == 4


FORMS = {
    "alpaca": {"instruction": "the film", "input": "was", "output": "good"},
    "question": {"question": "the film", "answer": "good"},
    "response": {"system": "short", "prompt": "the film", "response": "good"},
    "turns": {"prompt": [SAID[2], SAID[1]], "completion": [SAID[2]]},
}


@pytest.mark.parametrize("form", FORMS)
def test_usual_columns_are_an_instruction_and_its_answer(tokenizer, tmp_path, form):
    (example,) = one(tokenizer, tmp_path, FORMS[form]).train
    assert trained(tokenizer, example) == ["good"]
    if form != "turns":
        (plain,) = one(templated(tokenizer, None), tmp_path, FORMS[form]).train
        assert trained(tokenizer, plain) == ["good", "<eos>"]
        before = tokenizer.decode(plain.ids[: plain.target])
        assert "the film" in before
        assert ("was" in before) == ("input" in FORMS[form])


def test_a_long_text_is_cut_in_pieces_that_lose_no_token(tokenizer, tmp_path):
    """Every token but the first has a loss once, the end of the sequence too."""
    words, starting = (WORDS * 3)[:50], deepcopy(tokenizer)
    data = one(tokenizer, tmp_path, {"text": " ".join(words)}, max_tokens=8)
    assert max(len(e.ids) for e in data.train) == 8
    found = [word for e in data.train for word in trained(tokenizer, e)]
    assert found == [*words[1:], "<eos>"]
    assert data.report.sequences == len(data.train) > data.report.train_rows == 1
    # With a start-of-sequence token each piece begins with it.
    starting.bos_token = "<pad>"
    starting.backend_tokenizer.post_processor = with_start()
    data = one(starting, tmp_path, {"text": " ".join(words)}, max_tokens=8)
    assert {e.ids[0] for e in data.train} == {0}
    assert [w for e in data.train for w in trained(tokenizer, e)] == [*words, "<eos>"]


def with_start():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])


def test_what_is_cut_keeps_the_answer_and_the_start_of_sequence(tokenizer, tmp_path):
    starting = deepcopy(tokenizer)
    starting.bos_token = "<pad>"
    starting.backend_tokenizer.post_processor = with_start()
    data = one(
        starting, tmp_path, {"prompt": " ".join(WORDS), "completion": "good great"}, max_tokens=6
    )
    (example,) = data.train
    assert tokenizer.decode(example.ids).split() == ["<pad>", *WORDS[-2:], "good", "great", "<eos>"]
    assert example.target == 3
    said = [*SAID[:4], {"role": "assistant", "content": " ".join(WORDS)}]
    (example,) = one(tokenizer, tmp_path, {"messages": said}, max_tokens=6).train
    assert tokenizer.decode(example.ids).split() == WORDS[:6]


def test_several_files_patterns_and_folders_keep_their_rows(tmp_path):
    for name, words in (("a", ("good", "bad")), ("b", ("dull",))):
        write(tmp_path / f"{name}.jsonl", [{"text": word} for word in words])
    listed = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    for name in (listed, f"{tmp_path}/*.jsonl", str(tmp_path)):
        rows = Rows(DataConfig(name=name, dev_examples=0))
        assert [row["text"] for row in rows.train] == ["good", "bad", "dull"]
        assert [str(origin).rpartition("/")[2] for origin, _ in rows.numbered_train] == [
            "a.jsonl row 1",
            "a.jsonl row 2",
            "b.jsonl row 1",
        ]


def test_the_splits_of_a_folder_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}] * 5)
    rows = Rows(DataConfig(name=str(tmp_path), dev="test"))
    assert {row["text"] for row in rows.train} == {"train"}
    assert {row["text"] for row in rows.dev} == {"test"}
    with pytest.raises(UserError, match="has no split validation, but train, test"):
        Rows(DataConfig(name=str(tmp_path), dev="validation"))
    with pytest.raises(UserError, match=r"data\.dev=test is not a file, and"):
        Rows(DataConfig(name=str(tmp_path / "train.jsonl"), dev="test"))


def test_tables_with_tabs_and_words_that_pandas_takes_for_nothing(tmp_path):
    (tmp_path / "a.tsv").write_text("review\tsentiment\nNone\t1\nN/A, null\t0\n")
    names = {"text": "review", "label": "sentiment"}
    rows = Rows(DataConfig(name=str(tmp_path / "a.tsv"), dev_examples=0, columns=names))
    assert rows.train == [{"text": "None", "label": 1}, {"text": "N/A, null", "label": 0}]


def test_a_text_file_is_one_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffthe film\n\nwas good\n")
    assert Rows(DataConfig(name=str(tmp_path / "a.txt"))).train == [
        {"text": "the film\n\nwas good\n"}
    ]


def test_buckets_are_a_function_of_the_step_and_draw_every_example_once():
    """Any step may be drawn first, as after a resume; the first and last of an epoch too."""
    examples = [Example(tuple(range(1, 3 + n % 17)), 1) for n in range(40)]
    task, cuts = tasks.completion(CAUSAL, 0), {}
    for bucket in (None, 5):
        batch = BatchConfig(sequences=4, micro=4, bucket=bucket)
        cuts[bucket] = [
            Data(task, examples, [], batch, 3).batches(step, 0)["attention_mask"]
            for step in reversed(range(10))
        ][::-1]
        again = Data(task, examples, [], batch, 3)
        assert all(
            torch.equal(again.batches(step, 0)["attention_mask"], cuts[bucket][step])
            for step in range(10)
        )
    lengths = {
        b: sorted(torch.cat([m.sum(1) for m in masks]).tolist()) for b, masks in cuts.items()
    }
    assert lengths[None] == lengths[5] == sorted(len(e.ids) for e in examples)
    padded = {b: sum(m.numel() - int(m.sum()) for m in masks) for b, masks in cuts.items()}
    assert padded[5] < padded[None] / 2


def test_the_report_counts_what_is_cut_and_shows_what_is_trained_on(tokenizer, tmp_path):
    rows = [{"prompt": "the film was", "completion": "good"}] * 8
    rows += [{"prompt": "the", "completion": " ".join(WORDS)}] * 2
    name = write(tmp_path / "a.jsonl", rows)
    report = built(tokenizer, DataConfig(name=name, dev_examples=0), max_tokens=6).report
    assert (report.train_rows, report.dev_rows) == (10, 0)
    assert (report.median_tokens, report.longest_tokens, report.cut_rows) == (5, 22, 2)
    lines = "\n".join(report.lines())
    assert "2 of 10 rows cut to 6 tokens: raise batch.max_tokens" in lines
    assert "2 of 10 answers have more than 6 tokens by themselves and lost their end" in lines
    assert "the film was[[good <eos>]]" in lines


def test_an_answer_without_an_end_is_warned_of(tokenizer, tmp_path):
    endless = deepcopy(tokenizer)
    endless.eos_token = None
    for made, warned in ((tokenizer, False), (endless, True)):
        report = one(made, tmp_path, {"prompt": "the", "completion": "film"}).report
        assert any("does not learn to stop" in line for line in report.lines()) == warned


def test_a_label_word_without_its_space_is_warned_of(tokenizer, reviews):
    """For a tokenizer of bytes another word than the one that follows in running text."""
    from tokenizers import pre_tokenizers

    spaced = deepcopy(tokenizer)
    spaced.add_tokens([" great", " terrible"])
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    words = {"template": "{text} it was", "label_words": ["terrible", "great"]}
    settings = DataConfig(name=str(reviews), dev_examples=0, **words)
    wide = CAUSAL.__class__("causal-lm", 99, CAUSAL.accepts)
    (warning,) = built(spaced, settings, wide).report.warnings
    assert "[' terrible',' great']" in warning
    assert not built(tokenizer, settings).report.warnings


@pytest.mark.parametrize(
    ("rows", "info", "settings", "said"),
    [
        ([{"text": "good", "label": " "}], CLASSIFIER, {}, "row 1: the label is blank"),
        (
            [{"text": "good"}],
            CAUSAL,
            {"template": "{text} it", "label_words": ["good", "bad"]},
            "has columns text; .*label is missing",
        ),
        ([{"text": "good"}], CLASSIFIER, {}, "has columns text.*, not label"),
        ([{"text": " "}], CAUSAL, {}, "row 1: the text is empty"),
        ([{"prompt": "the", "completion": " "}], CAUSAL, {}, "row 1: the completion is empty"),
        (
            [{"q": "the", "a": ""}],
            CAUSAL,
            {"columns": {"question": "q", "answer": "a"}},
            "row 1: the a is empty",
        ),
        ([{"messages": [{"role": "assistant", "content": ""}]}], CAUSAL, {}, "turn 1 of messages"),
        ([{"conversations": SHAREGPT[:2]}], CAUSAL, {}, "conversations must hold a turn of role"),
        ([{"text": "good"}], CAUSAL, {"columns": {"text": "review"}}, "has no column review"),
    ],
)
def test_mistakes_in_rows(tokenizer, tmp_path, rows, info, settings, said):
    settings = DataConfig(name=write(tmp_path / "a.jsonl", rows), dev_examples=0, **settings)
    with pytest.raises(UserError, match=said) as error:
        built(tokenizer, settings, info, ["terrible", "great"])
    assert "\n" not in str(error.value)


@pytest.fixture
def train(monkeypatch, capsys, tmp_path, overrides):
    """Train in this process on other data: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *arguments):
        data = write(tmp_path / "own.jsonl", rows)
        given = [f"data.name={data}", f"run.dir={tmp_path}/run", *arguments]
        mine = {argument.partition("=")[0] for argument in given}
        kept = [o for o in overrides if o.partition("=")[0] not in mine]
        monkeypatch.setattr(sys, "argv", ["train", *kept, *given])
        capsys.readouterr()
        code = cli.run(main)
        captured = capsys.readouterr()
        assert {path.name for path in tmp_path.iterdir()} <= {"own.jsonl", "model"}
        return code, captured.out, captured.err

    return run


GOOD = {"text": "a good film", "label": "great"}
ANSWERED = {"prompt": "the film was", "completion": "good"}
MISTAKES = {
    "a row without a column": (
        [*[GOOD] * 20, {"label": "great"}, *[GOOD] * 9],
        [],
        "own.jsonl row 21: column text is empty or missing",
    ),
    "an empty completion": (
        [*[ANSWERED] * 20, {**ANSWERED, "completion": ""}, *[ANSWERED] * 9],
        [],
        "own.jsonl row 21: the completion is empty",
    ),
    "a label outside the set": (
        [*[GOOD] * 6, {**GOOD, "label": "meh"}],
        [],
        "own.jsonl row 7: label 'meh' is not in the label set",
    ),
    "too long for the model": (
        [GOOD] * 5,
        ["batch.max_tokens=65"],
        "batch.max_tokens=65 is more than the 64 positions",
    ),
    "no chat template": (
        [{"messages": SAID}] * 5,
        ["model.tokenizer={other}"],
        "the model's tokenizer has no chat template",
    ),
    "another model's tokenizer": (
        [ANSWERED] * 5 + [{**ANSWERED, "completion": "zebra"}],
        ["model.tokenizer={other}"],
        "own.jsonl row 6: the tokenizer makes token 24, but the model's vocabulary has 24",
    ),
    "a name of other libraries": ([GOOD] * 5, ["learning_rate=1"], "did you mean update.lr?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_is_one_line_and_writes_nothing(train, tiny_model, tmp_path, mistake):
    rows, arguments, said = MISTAKES[mistake]
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.chat_template = None
    other.add_tokens(["horse", "zebra"])
    other.save_pretrained(tmp_path / "model")
    code, out, err = train(rows, *[a.format(other=tmp_path / "model") for a in arguments])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err


def test_check_reports_and_loads_no_weights(train, tiny_model, tmp_path):
    """A folder without weights is enough for it."""
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    rows = [{"messages": SAID}] * 10
    code, out, err = train(rows, "--check", f"model.name={folder}", "data.dev_examples=2")
    assert code == 0, err
    assert (json.loads(out)["train_rows"], json.loads(out)["dev_rows"]) == (8, 2)
    assert "the film <unk>[[good]]<unk> the plot <unk>[[very dull]]" in err


def test_a_run_that_stops_within_a_bucket_goes_on_with_the_same_bits(overrides, tmp_path):
    data = write(tmp_path / "a.jsonl", [{"messages": SAID[: 3 + 2 * (n % 2)]} for n in range(14)])
    changed = ("data.name", "export.at_end", "run.steps", "eval.every")
    kept = [o for o in overrides if o.partition("=")[0] not in changed]
    settings = [*kept, f"data.name={data}", "export.at_end=false", "batch.bucket=3", "eval.every=0"]

    def run(folder, steps):
        given = [*settings, f"run.dir={tmp_path}/{folder}", f"run.steps={steps}"]
        return Trainer(load_config("quickstart", given)).train()["fingerprint"]

    run("stopped", 4)
    assert run("stopped", 5) == run("whole", 5)
