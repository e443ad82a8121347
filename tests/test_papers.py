"""The papers' tasks: each trains on rows in its schema, and asks what the papers ask."""

import copy
import json
import math
import re

import pytest
import torch
from conftest import make_llama
from plain import plain_config, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from zo import Trainer
from zo.config.recipes import FOLDER, load_config, recipe_names
from zo.config.schema import DataConfig
from zo.data import candidates, tasks
from zo.data.answers import MAX_NEW_TOKENS, exact_match, f1
from zo.data.named import NamedRows
from zo.data.papers import TASKS
from zo.data.tasks import Example
from zo.errors import UserError
from zo.model.generate import Decoding, generate, trim
from zo.model.info import ModelInfo
from zo.run.problem import build_problem
from zo.run.restore import adapted

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROWS = {
    "sst2": {"sentence": "the film was long ", "label": 1},
    "rte": {"premise": "A cast is here.", "hypothesis": "It is here.", "label": 0},
    "cb": {"premise": "It was dull.", "hypothesis": "it was", "label": 2},
    "boolq": {"passage": "The plot is bad.", "question": "is it bad", "answer": True},
    "wsc": {"text": "Ann saw Eve. She left.", "span1_text": "Ann", "span2_text": "She", "label": 1},
    "wic": {"word": "cast", "sentence1": "a cast", "sentence2": "to cast", "label": 0},
    "multirc": {"paragraph": "It ends.", "question": "Does it?", "answer": "no", "label": 0},
    "copa": {
        "premise": "The man left.",
        "choice1": "It was late.",
        "choice2": "I saw him.",
        "question": "cause",
        "label": 1,
    },
    "record": {
        "passage": "Ann met Eve.\n@highlight\nEve left",
        "query": "@placeholder left early",
        "entities": ["Ann", "Eve", "Evelyn"],
        "answers": ["Eve", "Evelyn"],
    },
    "squad": {
        "title": "Films",
        "context": "It was long.",
        "question": " How was it? ",
        "answers": {"text": ["long", "very long"], "answer_start": [7, 7]},
    },
    "drop": {
        "passage": "Two and two.",
        "question": "How many?",
        "answers_spans": {"spans": ["4"], "types": ["number"]},
    },
    "sst5": {"text": "the film was long", "label": 4, "label_text": "very positive"},
    "snli": {"premise": "A cast is here.", "hypothesis": "It is here.", "label": 1},
    "mnli": {"premise": "A cast is here!", "hypothesis": "It is here.", "label": 2},
    "trec": {"text": "How far is it ?", "coarse_label": 5, "fine_label": 40},
}
ASKED = {
    "sst2": ("the film was long It was", " great"),
    "rte": ('A cast is here.\nDoes this mean that "It is here." is true? Yes or No?\n', "Yes"),
    "cb": ('Suppose It was dull. Can we infer that "it was"? Yes, No, or Maybe?\n', "Maybe"),
    "boolq": ("The plot is bad. Is it bad?\n", "Yes"),
    "wsc": (
        'Ann saw Eve. She left.\nIn the previous sentence, does the pronoun "she" refer to Ann? '
        "Yes or No?\n",
        "Yes",
    ),
    "wic": (
        'Does the word "cast" have the same meaning in these two sentences? Yes, No?\na cast\nto '
        "cast\n",
        "No",
    ),
    "multirc": (
        'It ends.\nQuestion: Does it?\nI found this answer "no". Is that correct? Yes or No?\n',
        "No",
    ),
    "copa": ("The man left because", " I saw him."),
    "record": ("Ann met Eve.\n- Eve left\n-", " Eve left early"),
    "squad": ("Title: Films\nContext: It was long.\nQuestion: How was it?\nAnswer:", " long\n"),
    "drop": ("Passage: Two and two.\nQuestion: How many?\nAnswer:", " 4\n"),
}
"""Prompt and trained answer of each row above, for a causal language model."""
MASKED = {
    "sst2": ("<s>the film was long It was<mask>.</s>", " great"),
    "rte": ("<s>A cast is here?<mask>, it is here.</s>", " Yes"),
    "sst5": ("<s>the film was long It was<mask>.</s>", " great"),
    "snli": ("<s>A cast is here?<mask>, it is here.</s>", " Maybe"),
    "mnli": ("<s>A cast is here?<mask>, it is here.</s>", " No"),
    "trec": ("<s><mask>: How far is it ?</s>", " Number"),
}


@pytest.fixture(scope="session")
def words():
    """A byte-level tokenizer that begins texts as OPT's does; masks' label words are one token."""
    masked = [word for task in TASKS.values() if task.masked for word in task.masked.words]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([word for word in masked for _ in range(50)], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in names.items()},
    )


@pytest.fixture(scope="session")
def language_models(tmp_path_factory, words):
    """Folders of a causal and a masked language model, by model.task."""
    folder, sizes = tmp_path_factory.mktemp("models"), {"pad_token_id": 1, "bos_token_id": 0}
    causal = make_llama(
        vocab_size=len(words),
        max_position_embeddings=512,
        eos_token_id=2,
        num_hidden_layers=2,
        # A small step changes what it answers.
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    masked = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=514,
            type_vocab_size=1,
            eos_token_id=2,
            **sizes,
        )
    )
    framed = copy.deepcopy(words)
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made = (("causal-lm", causal, words), ("masked-lm", masked, framed))
    for name, model, tokenizer in made:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("causal-lm", "masked-lm")}


@pytest.fixture
def rows_of(tmp_path):
    """Write a folder with ten rows for training and three of the test split; return its path."""

    def write(name, **changes):
        folder = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        row = ROWS[name] | changes
        for split, count in (("train", 10), ("test" if TASKS[name].test == "test" else "dev", 3)):
            lines = "".join(json.dumps(row) + "\n" for _ in range(count))
            (folder / f"{split}.jsonl").write_text(lines)
        return folder

    return write


def settings(model, folder, name):
    return [
        f"task={name}",
        f"model.name={model}",
        f"data.name={folder}",
        "batch.sequences=2",
        "batch.micro=2",
        "batch.max_tokens=200",
        "estimator.directions=1",
        "run.steps=2",
        "eval.every=2",
        "export.at_end=false",
        "mesh.check_every=0",
    ]


CASES = [
    *((name, "causal-lm") for name in ASKED),
    *((name, "masked-lm") for name in MASKED),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_task_trains_and_scores_what_the_paper_asks(
    language_models, rows_of, tmp_path, name, kind
):
    """Under the paper's recipe, but for the sizes of a tiny model and two steps."""
    recipe = {"causal-lm": "mezo-opt-13b", "masked-lm": "mezo-roberta-large"}[kind]
    given = [*settings(language_models[kind], rows_of(name), name), "run.trackers=[]"]
    if kind == "masked-lm":
        given.append("data.per_label=1")
    config = load_config(recipe, [*given, f"run.dir={tmp_path}/run"])
    summary = Trainer(config, command="test").train()
    assert summary["steps"] == 2
    assert math.isfinite(summary["loss"])
    score = "f1" if TASKS[name].generates else "accuracy"
    assert 0.0 <= summary["eval"][score] <= 1.0
    shown, answer = (ASKED if kind == "causal-lm" else MASKED)[name]
    shown = shown if kind == "masked-lm" else f"<s>{shown}"
    asked = f"{shown}[[{answer}]]".replace("\n", "\\n")
    said = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    assert any(asked in event.get("text", "") for event in said)


def test_answers_are_generated_alike_in_every_store_and_their_f1_is_trained(
    language_models, words, rows_of, tmp_path
):
    """The gold answer is what the base model says, so that its F1 falls when a probe changes it."""
    given = settings(language_models["causal-lm"], rows_of("squad"), "squad")
    config = plain_config(given)
    problem = build_problem(config)
    base = LlamaForCausalLM.from_pretrained(language_models["causal-lm"]).eval()
    decoding = Decoding(MAX_NEW_TOKENS, tuple({2, *words("\n")["input_ids"][1:]}), 1)
    found = generate(base, problem.dev_batches[0], decoding)[0].tolist()
    said = words.decode(trim(found, decoding.end), skip_special_tokens=True).strip()
    answer = said.partition("\n")[0]
    assert answer
    folder = rows_of("squad", answers={"text": ["other", answer]})
    runs = []
    for store in ("device", "host"):
        more = [
            f"data.name={folder}",
            "objective.name=f1",
            "estimator.eps=1e-3",
            f"memory.store={store}",
        ]
        runs.append(run([*given, *more], tmp_path / store))
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    for store in ("device", "host"):
        steps = [json.loads(line) for line in (tmp_path / store / "metrics.jsonl").open()]
        assert next(step["eval"] for step in steps if "eval" in step)["f1"] == 1.0
        assert any(any(step.get("scalars", ())) for step in steps)


def test_f1_and_exact_match_are_those_of_squad():
    assert f1("The long, long film", "a long film") == pytest.approx(0.8)
    assert f1("short", "long") == f1("", "long") == 0.0
    assert exact_match("The Film!", "film") == 1.0
    assert exact_match("long film", "film long") == 0.0


CAUSAL = ModelInfo("causal-lm", 24, frozenset({"input_ids", "attention_mask", "use_cache"}))


@torch.no_grad()
def test_a_candidate_counts_by_the_mean_log_likelihood_of_its_tokens():
    model, task = make_llama().double(), candidates.candidates(CAUSAL, 0)
    examples = [
        Example((5, 6, 7), 1, candidates=((8, 9), (10,), (11, 12, 13)), right=(0, 2)),
        Example((5, 14, 15, 16, 17), 0, candidates=((18,), (19, 20))),
    ]
    loss, count, right = 0.0, 0, 0
    for e in examples:
        means = []
        for candidate in e.candidates:
            logits = model(torch.tensor([e.ids + candidate])).logits[0].float()
            likelihood = logits.log_softmax(-1)[len(e.ids) - 1 : -1]
            means.append(likelihood[range(len(candidate)), candidate].mean())
        scores = torch.stack(means)
        loss -= float(scores.log_softmax(-1)[e.target])
        count, right = count + 1, right + (int(scores.argmax()) in (e.right or (e.target,)))
    for batch in ([examples], [[e] for e in examples]):
        sums = sum(task.terms(model, task.collate(part, examples)) for part in batch)
        assert sums.tolist() == pytest.approx([loss, count, right], rel=1e-5)


@torch.no_grad()
def test_label_words_of_one_token_give_the_same_loss_either_way():
    model, examples = make_llama().double(), [Example((5, 6, 7), 1), Example((9, 4), 0)]
    choice, several = tasks.choice(CAUSAL, 0, [8, 10]), candidates.candidates(CAUSAL, 0)
    spread = [Example(e.ids, e.target, candidates=((8,), (10,))) for e in examples]
    one = choice.terms(model, choice.collate(examples, examples))
    other = several.terms(model, several.collate(spread, spread))
    assert one.tolist() == pytest.approx(other.tolist(), rel=1e-6)


def drawn(folder, seed=0, **keys):
    rows = NamedRows("sst2", TASKS, DataConfig(name=str(folder), **keys), seed, "causal-lm")
    return [[row["sentence"] for row in part] for part in (rows.train, rows.dev)]


def test_splits_are_drawn_by_the_seed_and_the_test_rows_do_not_change_what_is_trained(tmp_path):
    for split, count in (("train", 40), ("validation", 7)):
        lines = [json.dumps({"sentence": f"{split} {i}", "label": i % 2}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join([*lines, lines[0].replace("0}", "-1}")]))
    train, dev = drawn(tmp_path, dev_examples=10, train_examples=20)
    assert (len(train), len(dev)) == (20, 10)
    assert not {*train} & {*dev}
    assert drawn(tmp_path, dev_examples=10, train_examples=20) == [train, dev]
    assert drawn(tmp_path, 1, dev_examples=10, train_examples=20)[1] != dev
    tested = drawn(tmp_path, dev="test", dev_examples=10, train_examples=20)
    assert tested[0] == train
    assert sorted(tested[1]) == [f"validation {i}" for i in range(7)]
    few, held = drawn(tmp_path, per_label=3)
    assert not {*few} & {*held}
    for part in few, held:
        assert sorted(int(text.split()[1]) % 2 for text in part) == [0, 0, 0, 1, 1, 1]
    # Of a label with too few rows none is held out.
    assert [len(part) for part in drawn(tmp_path, per_label=15)] == [30, 10]
    config = plain_config(["task=sst2", f"data.name={tmp_path}"])
    assert adapted(config, "test", None, False).data.dev == "test"


def test_a_masked_text_that_is_too_long_keeps_its_mask(language_models, words, rows_of):
    long = "a " * 300
    for name, column in (("sst2", "sentence"), ("trec", "text")):
        given = settings(language_models["masked-lm"], rows_of(name, **{column: long}), name)
        batch = build_problem(plain_config([*given, "batch.max_tokens=32"])).batches(0, 0)
        assert batch["input_ids"].shape == (2, 32)
        at_mask = batch["input_ids"].gather(1, batch["places"][:, None])
        assert set(at_mask.flatten().tolist()) == {words.mask_token_id}
        assert set(batch["input_ids"][:, -1].tolist()) == {words.eos_token_id}


REFUSED = [
    (
        "sst2",
        "causal-lm",
        {"label": 2},
        [],
        r"train.jsonl row \d+: label 2 is not in the label set",
    ),
    ("rte", "causal-lm", {"premise": None}, [], r"row \d+: column premise, which task=rte needs"),
    ("wic", "causal-lm", {"word": 3}, [], r"row \d+: column word, .* is int"),
    ("snli", "causal-lm", {}, [], "no prompt for model.task=causal-lm; use model.task=masked-lm"),
    ("squad", "masked-lm", {}, [], "no prompt for model.task=masked-lm; use model.task=causal-lm"),
    ("copa", "causal-lm", {"question": "why"}, [], "question is 'why', not cause or effect"),
    (
        "record",
        "causal-lm",
        {"answers": ["Bob"]},
        [],
        "answers is not .*no entity is among them",
    ),
    ("record", "causal-lm", {"entities": None}, [], r"row \d+: answers is not what"),
    ("squad", "causal-lm", {"answers": {"text": []}}, [], "answers has no answer"),
    ("drop", "causal-lm", {"answers_spans": {"x": 1}}, [], "there is no 'spans'"),
    ("drop", "causal-lm", {}, ["objective.name=accuracy"], "use cross-entropy or f1"),
    ("sst2", "causal-lm", {}, ["objective.name=f1"], "use cross-entropy or accuracy"),
    ("sst2", "causal-lm", {}, ["data.label_words=[bad,'']"], "has an empty word"),
    ("sst2", "causal-lm", {}, ["data.label_words=[a,b,c]"], "does not fit task=sst2"),
    ("sst2", "masked-lm", {}, ["data.label_words=[wrong,qqqq]"], "is 5 tokens"),
    ("sst2", "masked-lm", {}, ["data.template='{sentence}'"], "needs {mask} once"),
    ("copa", "causal-lm", {"choice1": "no " * 99}, ["batch.max_tokens=50"], "has no room"),
]


@pytest.mark.parametrize(("name", "kind", "changes", "more", "said"), REFUSED)
def test_what_a_task_cannot_use_is_refused_in_one_line(
    language_models, rows_of, name, kind, changes, more, said
):
    given = settings(language_models[kind], rows_of(name, **changes), name)
    with pytest.raises(UserError, match=said) as error:
        build_problem(plain_config([*given, *more]))
    assert "\n" not in str(error.value)


def test_an_unknown_task_is_told_the_names(language_models):
    config = plain_config(["task=sst3", f"model.name={language_models['causal-lm']}"])
    with pytest.raises(UserError, match=r"task=sst3 is not known; use one of boolq, cb, .*, wsc$"):
        build_problem(config)


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_task_replaces_the_data_of_any_recipe(recipe):
    """Only its name is of the task: the other keys of the recipe's data belong to its rows."""
    config = load_config(recipe, ["task=rte", "model.name=m", "data.dev_examples=3"])
    assert (config.task, config.data.name, config.data.dev_examples) == ("rte", "", 3)
    assert (config.data.template, config.data.label_words, config.data.dev) == (None, None, None)


@pytest.mark.parametrize(
    ("recipe", "kind", "count"),
    [("mezo-opt-13b", "causal", 11), ("mezo-roberta-large", "masked", 6)],
)
def test_a_paper_recipe_names_the_tasks_that_fit_it(recipe, kind, count):
    header = (FOLDER / f"{recipe}.yaml").read_text().partition("# Machine")[0]
    fits = {name for name, task in TASKS.items() if getattr(task, kind)}
    assert {name for name in TASKS if re.search(rf"\b{name}\b", header)} == fits
    assert len(fits) == count
