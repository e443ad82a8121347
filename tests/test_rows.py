"""Rows as they are read: encodings, separators, and a fault named by its file and row."""

import json
from copy import deepcopy

import pytest
from test_data import CAUSAL, CLASSIFIER, built, write

from zo.config.schema import DataConfig
from zo.data.rows import Rows
from zo.errors import UserError


def rows_of(path, **settings):
    return Rows(DataConfig(name=str(path), dev_examples=0, **settings))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_text_of_any_script_and_separator_is_read_as_it_is(tmp_path, kind, mark):
    """U+2028, U+0085 and others end a line for str.splitlines, and are plain characters in JSON."""
    texts = ["the\u2028film", "der\u0085 F\u00e4lm", "\u7535\u5f71 \U0001f3ac", "a\x0bb\x0cc\x1dd"]
    if kind == "csv":
        body = "text\n" + "".join(f'"{text}"\n' for text in texts)
    elif kind == "json":
        body = json.dumps([{"text": text} for text in texts], ensure_ascii=False)
    else:
        body = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(mark + body.encode())
    assert [row["text"] for row in rows_of(path).train] == texts


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_other_encodings_are_named(tmp_path, kind):
    path, body = (
        tmp_path / f"a.{kind}",
        {"csv": "text\na b\nc d\n"}.get(kind, '{"text": "a b"}\n{"text": "c"}\n'),
    )
    for encoding, said in (
        ("utf-16", "is UTF-16"),
        ("utf-32", "is UTF-32"),
        ("utf-16-le", "line 1 contains a zero byte"),
    ):
        path.write_bytes(body.encode(encoding))
        with pytest.raises(UserError, match=f"{said}.*save it as UTF-8"):
            rows_of(path)
    path.write_bytes(body.encode().replace(b" b", b"\xe9b"))
    number = 2 if kind == "csv" else 1
    with pytest.raises(
        UserError, match=rf"a\.{kind} line {number} is not UTF-8: byte 0xe9 at position"
    ):
        rows_of(path)


def test_json_that_is_nested_without_end_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(UserError, match="line 1 is invalid JSON"):
        rows_of(tmp_path / "a.jsonl")


CHOICE = {"template": "{text} it was", "label_words": ["terrible", "great"]}


@pytest.mark.parametrize("held_out", [0, 30])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("info", [CAUSAL, CLASSIFIER])
@pytest.mark.parametrize("row", [1, 4, 97])
def test_a_missing_label_names_its_own_row(tokenizer, tmp_path, kind, held_out, info, row):
    """Gaps turn integers into floats, and holding out renumbers rows; errors show neither."""
    labels = [i % 2 for i in range(100)]
    labels[row - 1] = None
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text(
            "text,label\n" + "".join(f"good,{'' if v is None else v}\n" for v in labels)
        )
    else:
        write(path, [{"text": "good", "label": v} for v in labels])
    settings = DataConfig(name=str(path), dev_examples=held_out, **CHOICE)
    with pytest.raises(UserError, match=rf"a\.{kind} row {row}: the label is missing"):
        built(tokenizer, settings, info, ["terrible", "great"])
    if not held_out:
        with pytest.raises(UserError, match=rf"a\.{kind} row {row}: the label is missing"):
            rows_of(path).class_names()


def test_a_fault_in_the_rows_to_evaluate_on_names_their_file(tokenizer, tmp_path):
    good = write(tmp_path / "a.jsonl", [{"text": "good", "label": 1}] * 10)
    for bad, said in (
        ({"text": "bad", "label": 7}, "label 7 is not in the label set"),
        ({"text": None, "label": 1}, "column text is empty or missing"),
        ({"label": 1}, "column text is empty or missing"),
        ({"text": "bad"}, "the label is missing"),
    ):
        dev = write(tmp_path / "dev.jsonl", [{"text": "good", "label": 0}, bad])
        with pytest.raises(UserError, match=rf"^data\.dev=.*dev\.jsonl row 2: {said}"):
            built(tokenizer, DataConfig(name=good, dev=dev, **CHOICE))


def test_labels_of_a_table_with_gaps_elsewhere_are_numbers_still(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "good,1.0\nbad,0.0\n" * 5)
    assert rows_of(tmp_path / "a.csv").class_names() == ["0", "1"]
    data = built(tokenizer, DataConfig(name=str(tmp_path / "a.csv"), dev_examples=0, **CHOICE))
    assert [e.target for e in data.train] == [1, 0] * 5


def test_a_label_that_is_an_identifier_makes_no_million_classes(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "good", "label": 10**9}])
    with pytest.raises(UserError, match="label 1000000000, which would make that many classes"):
        rows_of(tmp_path / "a.jsonl").class_names()


@pytest.mark.parametrize(
    "template",
    ["{text} {", "{text} }", "{text:>9}", "{0}", "{}", "{text!r}", "{text.upper}", "{a[0]}"],
)
def test_a_template_that_is_no_template_is_refused_before_anything_is_read(template):
    with pytest.raises(UserError, match=r"^data\.template='.*is not understood") as error:
        DataConfig(name="missing.jsonl", template=template)
    assert "\n" not in str(error.value)


def test_a_template_may_name_any_column_and_hold_braces(tokenizer, tmp_path):
    rows = [{"the text": "good", "other": None, "label": 1}]
    settings = DataConfig(
        name=write(tmp_path / "a.jsonl", rows),
        dev_examples=0,
        template="{the text} {{other}} it",
        label_words=["terrible", "great"],
    )
    (example,) = built(tokenizer, settings).train
    assert tokenizer.decode(example.ids).split() == ["good", "<unk>", "it"]


def test_an_empty_completion_is_refused_by_its_row(tokenizer, tmp_path):
    """A micro-batch of empty completions has no terms, so its loss is NaN."""
    rows = [{"prompt": "the film", "completion": "good"}, {"prompt": "the film", "completion": ""}]
    name = write(tmp_path / "a.jsonl", rows)
    endless = deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match=r"a\.jsonl row 2: the completion is empty"):
        built(endless, DataConfig(name=name, dev_examples=0))


@pytest.mark.parametrize("messages", [["hello"], [None], "hello", [{"content": "x"}]])
def test_messages_of_another_form_are_refused_by_their_row(tokenizer, tmp_path, messages):
    name = write(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(UserError, match="row 1: messages must"):
        built(tokenizer, DataConfig(name=name, dev_examples=0))


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must take turns') }}", "{{ messages[0].content + 1 }}", "{% if %}"],
)
def test_messages_that_the_chat_template_refuses_are_named_by_their_row(
    tokenizer, tmp_path, template
):
    said = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    name, strict = write(tmp_path / "a.jsonl", [{"messages": said}]), deepcopy(tokenizer)
    strict.chat_template = template
    with pytest.raises(
        UserError, match=r"a\.jsonl row 1: the model's chat template rejects"
    ) as error:
        built(strict, DataConfig(name=name, dev_examples=0))
    assert "\n" not in str(error.value)
