"""Tasks of the papers on zeroth-order fine-tuning, for ``task=NAME``.

Rows, prompts and label words of "Fine-Tuning Language Models with Just Forward Passes" (MeZO,
Malladi et al. 2023, arXiv:2305.17333): eleven tasks of the OPT models, and six of RoBERTa-large,
whose prompts are those of LM-BFF (Gao et al. 2021). Revisions are the commits that several public
projects record for these data sets; where there is none, ``data.revision`` can give one.

To add a task, add a row to ``TASKS``.
"""

from zo.data.files import Row
from zo.data.named import NamedTask, Options, Prompt

SUPER_GLUE = ("aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646")
GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
NO_YES = ("No", "Yes")
ENTAILMENT = Prompt("{premise}?{mask}, {hypothesis}", (" Yes", " Maybe", " No"))


def _stripped(row: Row) -> Row:
    return row | {key: value.strip() for key, value in row.items() if isinstance(value, str)}


def _with_clause(row: Row) -> Row:
    """Return a row whose premise ends without its mark, and whose hypothesis begins small."""
    premise, hypothesis = row["premise"].strip(), row["hypothesis"].strip()
    return row | {
        "premise": premise[:-1] if premise[-1:] in tuple(".?!,;") else premise,
        "hypothesis": hypothesis[:1].lower() + hypothesis[1:],
        # The row's own, for prompts that quote it.
        "said": row["premise"],
        "claim": row["hypothesis"],
    }


def _question(row: Row) -> Row:
    question = row["question"].strip()
    question = question if question.endswith("?") else f"{question}?"
    return row | {"question": question[:1].upper() + question[1:]}


def _pronoun(row: Row) -> Row:
    return row | {"span2_text": row["span2_text"].lower()}


CONJUNCTIONS = {"effect": "so", "cause": "because"}


def _premise(row: Row) -> Row:
    conjunction = CONJUNCTIONS.get(row["question"], row["question"])
    return row | {"premise": row["premise"].rstrip().removesuffix("."), "conjunction": conjunction}


def _alternatives(row: Row) -> Options:
    """Return both alternatives of COPA, as the end of a sentence."""
    if row["question"] not in CONJUNCTIONS:
        raise ValueError(f"the question is {row['question']!r}, not cause or effect")
    if row["label"] not in (0, 1):
        raise ValueError(f"it is {row['label']!r}, not 0 or 1")
    texts = []
    for choice in (row["choice1"], row["choice2"]):
        first, space, rest = choice.partition(" ")
        texts.append(f" {first if first == 'I' else first.lower()}{space}{rest}")
    return Options(texts, [row["label"]])


def _passage(row: Row) -> Row:
    return row | {"passage": row["passage"].replace("@highlight\n", "- ")}


def _entities(row: Row) -> Options:
    """Return the query of ReCoRD with each entity of the passage in its place."""
    entities, answers = list(row["entities"]), row["answers"]
    if not (right := [i for i, entity in enumerate(entities) if entity in answers]):
        raise ValueError("no entity is among them")
    return Options([f" {row['query'].replace('@placeholder', e)}" for e in entities], right)


def _squad_answers(row: Row) -> Options:
    texts = list(row["answers"]["text"])
    return Options(texts, range(len(texts)))


def _drop_answers(row: Row) -> Options:
    texts = list(row["answers_spans"]["spans"])
    return Options(texts, range(len(texts)))


TASKS: dict[str, NamedTask] = {
    "sst2": NamedTask(
        "stanfordnlp/sst2",
        ("sentence",),
        revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        prepare=_stripped,
        causal=Prompt("{sentence} It was", (" terrible", " great")),
        masked=Prompt("{sentence} It was{mask}.", (" terrible", " great")),
    ),
    "rte": NamedTask(
        SUPER_GLUE[0],
        ("premise", "hypothesis"),
        subset="rte",
        revision=SUPER_GLUE[1],
        prepare=_with_clause,
        causal=Prompt('{said}\nDoes this mean that "{claim}" is true? Yes or No?\n', ("Yes", "No")),
        masked=Prompt(ENTAILMENT.text, (" Yes", " No")),
    ),
    "cb": NamedTask(
        SUPER_GLUE[0],
        ("premise", "hypothesis"),
        subset="cb",
        revision=SUPER_GLUE[1],
        most_dev=100,
        causal=Prompt(
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
        ),
    ),
    "boolq": NamedTask(
        "google/boolq",
        ("passage", "question"),
        "answer",
        revision="35b264d03638db9f4ce671b711558bf7ff0f80d5",
        prepare=_question,
        causal=Prompt("{passage} {question}\n", NO_YES),
    ),
    "wsc": NamedTask(
        SUPER_GLUE[0],
        ("text", "span1_text", "span2_text"),
        subset="wsc.fixed",
        revision=SUPER_GLUE[1],
        prepare=_pronoun,
        causal=Prompt(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
            "{span1_text}? Yes or No?\n",
            NO_YES,
        ),
    ),
    "wic": NamedTask(
        SUPER_GLUE[0],
        ("word", "sentence1", "sentence2"),
        subset="wic",
        revision=SUPER_GLUE[1],
        causal=Prompt(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n{sentence2}\n",
            NO_YES,
        ),
    ),
    "multirc": NamedTask(
        SUPER_GLUE[0],
        ("paragraph", "question", "answer"),
        subset="multirc",
        revision=SUPER_GLUE[1],
        causal=Prompt(
            '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
            "Yes or No?\n",
            NO_YES,
        ),
    ),
    "copa": NamedTask(
        SUPER_GLUE[0],
        ("premise", "choice1", "choice2", "question"),
        subset="copa",
        revision=SUPER_GLUE[1],
        most_dev=100,
        prepare=_premise,
        causal=Prompt("{premise} {conjunction}"),
        options=_alternatives,
    ),
    "record": NamedTask(
        SUPER_GLUE[0],
        ("passage", "query"),
        "answers",
        subset="record",
        revision=SUPER_GLUE[1],
        prepare=_passage,
        causal=Prompt("{passage}\n-"),
        options=_entities,
    ),
    "squad": NamedTask(
        "rajpurkar/squad",
        ("title", "context", "question"),
        "answers",
        revision="7b6d24c440a36b6815f21b70d25016731768db1f",
        prepare=_stripped,
        causal=Prompt("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"),
        options=_squad_answers,
        generates=True,
    ),
    "drop": NamedTask(
        "ucinlp/drop",
        ("passage", "question"),
        "answers_spans",
        revision="95cda593fae71b60b5b19f82de3fcf3298c1239c",
        prepare=_stripped,
        causal=Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:"),
        options=_drop_answers,
        generates=True,
    ),
    "sst5": NamedTask(
        "SetFit/sst5",
        ("text",),
        revision="e51bdcd8cd3a30da231967c1a249ba59361279a3",
        test="test",
        prepare=_stripped,
        masked=Prompt("{text} It was{mask}.", (" terrible", " bad", " okay", " good", " great")),
    ),
    "snli": NamedTask(
        "stanfordnlp/snli",
        ("premise", "hypothesis"),
        revision="cdb5c3d5eed6ead6e5a341c8e56e669bb666725b",
        test="test",
        prepare=_with_clause,
        masked=ENTAILMENT,
    ),
    "mnli": NamedTask(
        GLUE[0],
        ("premise", "hypothesis"),
        subset="mnli",
        revision=GLUE[1],
        test="validation_matched",
        prepare=_with_clause,
        masked=ENTAILMENT,
    ),
    # The hub's conversion of a data set that is a script; the order of its labels is ABBR, ENTY,
    # DESC, HUM, LOC, NUM.
    "trec": NamedTask(
        "CogComp/trec",
        ("text",),
        "coarse_label",
        revision="refs/convert/parquet",
        test="test",
        prepare=_stripped,
        masked=Prompt(
            "{mask}: {text}",
            (" Expression", " Entity", " Description", " Human", " Location", " Number"),
        ),
    ),
}
"""Tasks by name."""
