"""Examples from a name, and batches as a pure function of (seed, step, column).

Sequence number p of a run is place ``p % n`` of the permutation of epoch ``p // n``; an epoch's permutation sorts the
examples by Philox keys. The sequences of a step are sorted by length before they are cut into micro-batches, which
saves padding. No state, no worker, no call order: any rank makes any batch of any step.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from zo import assets, tasks
from zo.config import BatchConfig, Config, DataConfig, UserError
from zo.philox import Purpose, word_stream
from zo.tasks import Batch, Example, ModelInfo, Task

Row = dict[str, Any]

TASKS: dict[str, tuple[Callable[[], list[Row]], str, list[str]]] = {
    "movie-reviews": (assets.movie_reviews, "{text} It was", [" terrible", " great"]),
}
"""Tasks that bring their rows, template and label words, by the name that ``data.name`` takes."""

SYNTHETIC = "synthetic"
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HOLD_OUT_SEED = 0
"""Not the run's seed: runs of all seeds are scored on the same examples."""


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, examples: int) -> list[int]:
    """The order of one epoch."""
    words = word_stream(seed, 0, 2 * examples, epoch, Purpose.SHUFFLE).view(-1, 2)
    # Two words make a key of 62 bits, which is positive in int64; equal keys keep the examples' order.
    keys = (words[:, 0] << 30) | (words[:, 1] >> 2)
    return torch.sort(keys, stable=True).indices.tolist()


def sequence_numbers(seed: int, step: int, sequences: int, examples: int) -> list[int]:
    """Which examples a step, counted from 0, draws."""
    places = range(step * sequences, (step + 1) * sequences)
    return [permutation(seed, place // examples, examples)[place % examples] for place in places]


class Data:
    """Tokenised examples."""

    def __init__(
        self, task: Task, train: Sequence[Example], dev: Sequence[Example], batch: BatchConfig, seed: int
    ) -> None:
        """Hold the examples; nothing is drawn yet."""
        self.task, self.train, self.dev, self.batch, self.seed = task, train, dev, batch, seed

    def batches(self, step: int, column: int) -> Batch:
        """The micro-batch of a step, from 0, and a column."""
        drawn = [self.train[i] for i in sequence_numbers(self.seed, step, self.batch.sequences, len(self.train))]
        drawn.sort(key=lambda e: len(e.ids))
        micro = self.batch.micro
        return self.task.collate(drawn[column * micro : (column + 1) * micro])

    @cached_property
    def dev_batches(self) -> list[Batch]:
        """The examples to evaluate on, by length."""
        ordered, micro = sorted(self.dev, key=lambda e: len(e.ids)), self.batch.micro
        return [self.task.collate(ordered[i : i + micro]) for i in range(0, len(ordered), micro)]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the training examples as the model sees them."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(json.dumps([example.ids, example.target]).encode())
        return digest.hexdigest()


class SyntheticData(Data):
    """Random tokens, every sequence ``batch.max_tokens`` long and never drawn twice; there is nothing to learn."""

    def __init__(self, task: Task, batch: BatchConfig, seed: int, vocab_size: int, classes: int) -> None:
        """Make nothing yet: a sequence is a function of its number."""
        super().__init__(task, [], [], batch, seed)
        self._vocab_size, self._classes = vocab_size, classes

    def batches(self, step: int, column: int) -> Batch:
        """The micro-batch of a step, from 0, and a column."""
        first = step * self.batch.sequences + column * self.batch.micro
        return self.task.collate([self._example(first + i) for i in range(self.batch.micro)])

    def _example(self, number: int) -> Example:
        count = self.batch.max_tokens
        words = word_stream(self.seed, number * (count + 1), count + 1, 0, Purpose.TOKENS).tolist()
        target = words[-1] % self._classes if self.task.kind == "class" else 1
        return Example(tuple(w % self._vocab_size for w in words[:-1]), target)

    @cached_property
    def checksum(self) -> str:
        """The same for all data made by this rule."""
        return hashlib.sha256(b"synthetic").hexdigest()


class Rows:
    """Raw rows, before a model or a tokenizer is known."""

    def __init__(self, config: DataConfig) -> None:
        """Read the rows of ``data.name`` and ``data.dev``.

        Raises:
            UserError: what is wrong with the name, the file or its columns.
        """
        self.config = config
        self.template, self.label_words = config.template, config.label_words
        self.train: list[Row] = []
        self.dev: list[Row] = []
        if config.name == SYNTHETIC:
            return
        if config.name in TASKS:
            read, template, words = TASKS[config.name]
            rows = read()
            self.template, self.label_words = self.template or template, self.label_words or words
        else:
            rows = read_rows("data.name", config.name, config, config.split)
        self._split(rows)

    def _split(self, rows: list[Row]) -> None:
        config, order = self.config, permutation(HOLD_OUT_SEED, 0, len(rows))
        if config.dev is not None:
            is_file = Path(config.dev).suffix in FILES
            held = read_rows("data.dev", config.dev if is_file else config.name, config, config.dev)
            self.dev = [held[i] for i in sorted(permutation(HOLD_OUT_SEED, 0, len(held))[: config.dev_examples])]
        else:
            held_out = min(config.dev_examples, len(rows) // 5)
            self.dev = [rows[i] for i in sorted(order[:held_out])]
            order = order[held_out:]
        self.train = [rows[i] for i in sorted(order[: config.train_examples])]

    @property
    def synthetic(self) -> bool:
        """Whether there are no rows, for tokens are made up."""
        return self.config.name == SYNTHETIC

    @property
    def columns(self) -> set[str]:
        """Columns of the training rows."""
        return set(self.train[0])

    def class_names(self, known: Sequence[str] = ()) -> list[str]:
        """Names of the classes: given, or the model's if they fit, or those that the rows have.

        Args:
            known: the names that a pretrained classifier has.
        """
        if self.synthetic:
            return list(known) or ["0", "1"]
        if self.label_words:
            return [word.strip() for word in self.label_words]
        if "label" not in self.columns:
            raise UserError(
                f"data.name={self.config.name} has columns {', '.join(sorted(self.columns))}; a sequence classifier "
                "needs text and label"
            )
        found = {row["label"] for row in self.train}
        if known and all(label_index(value, known) is not None for value in found):
            return list(known)
        if all(isinstance(value, int) for value in found):
            return [str(i) for i in range(max(2, *(value + 1 for value in found)))]
        return sorted(str(value) for value in found)


def read_rows(key: str, name: str, config: DataConfig, split: str) -> list[Row]:
    """Rows of a local file or of a hub data set.

    Raises:
        UserError: missing, unreadable or empty.
    """
    path, suffix = Path(name).expanduser(), Path(name).suffix
    if suffix in FILES:
        rows = _read_file(key, path)
    elif path.exists() or suffix or name.startswith((".", "/", "~")) or not name:
        raise UserError(
            f"{key}={name} is no file of a known kind; use one of {', '.join(FILES)}, a task ({', '.join(TASKS)}), "
            f"{SYNTHETIC}, or a hub id"
        )
    else:
        rows = _read_hub(key, name, config.subset, split)
    if not rows:
        raise UserError(f"{key}={name} is empty; give a file with at least one row")
    return rows


def _read_file(key: str, path: Path) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise UserError(f"{key}={path} does not exist; give an existing file")
    if path.stat().st_size == 0:
        raise UserError(f"{key}={path} is empty; give a file with at least one row")
    if path.suffix == ".jsonl":
        _check_lines(key, path)
    datasets.disable_progress_bars()
    read = {
        "json": datasets.Dataset.from_json,
        "csv": datasets.Dataset.from_csv,
        "parquet": datasets.Dataset.from_parquet,
    }
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = read[FILES[path.suffix]](str(path), cache_dir=cache, keep_in_memory=True)
        except (DatasetGenerationError, ValueError, OSError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(f"{key}={path} cannot be read as {path.suffix[1:]}: {reason}") from error
        return table.to_list()  # type: ignore[no-any-return]


def _check_lines(key: str, path: Path) -> None:
    """Find the line that is no JSON object: the reader would name the file alone."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            whole = not line.strip() or isinstance(json.loads(line), dict)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{key}={path} line {number} is broken JSON: {error.msg} at column {error.colno}"
            ) from error
        if not whole:
            raise UserError(f"{key}={path} line {number} is no JSON object; give one object a line")


def _read_hub(key: str, name: str, subset: str | None, split: str) -> list[Row]:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split).to_list()  # type: ignore[no-any-return]
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}={name} cannot be had from the hub: {reason}; or give a local file") from error


def label_index(value: object, names: Sequence[str]) -> int | None:
    """Which of the names a label is, by number or by word; ``None`` if it is none of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(names) else None
    stripped = [name.strip() for name in names]
    return stripped.index(str(value).strip()) if str(value).strip() in stripped else None


def build_data(rows: Rows, config: Config, tokenizer: Any, info: ModelInfo, classes: Sequence[str]) -> Data:
    """Tokenise rows for a model.

    Args:
        rows: what was read.
        config: of the run.
        tokenizer: the model's; may be ``None`` for synthetic data.
        info: of the model.
        classes: names of a classifier's classes; unused by a language model.

    Raises:
        UserError: columns that fit no task, a label outside the label set, a label word of several tokens.
    """
    pad = pad_id(tokenizer)
    classifier = info.task == "sequence-classification"
    if rows.synthetic:
        task = tasks.classification(info, pad) if classifier else tasks.completion(info, pad)
        return SyntheticData(task, config.batch, config.run.seed, info.vocab_size, len(classes))
    encoder = Encoder(rows, tokenizer, config.batch.max_tokens)
    if classifier:
        task, encode = tasks.classification(info, pad), encoder.labelled("{text}", classes, special_tokens=True)
    elif "label" in rows.columns and rows.template and rows.label_words:
        task = tasks.choice(info, pad, encoder.word_ids(rows.label_words))
        encode = encoder.labelled(rows.template, rows.label_words, special_tokens=False)
    else:
        task, encode = tasks.completion(info, pad), encoder.completion()
    train, dev = ([encode(i, row) for i, row in enumerate(part)] for part in (rows.train, rows.dev))
    return Data(task, train, dev, config.batch, config.run.seed)


def pad_id(tokenizer: Any) -> int:
    """The token that fills; masks hide it, so any will do where a tokenizer has none."""
    known = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(i for i in known if i is not None)


class Encoder:
    """Rows to examples."""

    def __init__(self, rows: Rows, tokenizer: Any, max_tokens: int) -> None:
        """Use a tokenizer for rows of one data set."""
        self.rows, self.tokenizer, self.max_tokens = rows, tokenizer, max_tokens
        self.name = rows.config.name

    def word_ids(self, words: Sequence[str]) -> list[int]:
        """Each label word's one token.

        Raises:
            UserError: a word is several tokens.
        """
        ids = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, tokens in zip(words, ids, strict=True):
            if len(tokens) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(tokens)
                raise UserError(f"data.label_words: {word!r} is {len(tokens)} tokens {pieces}; use a word of one token")
        return [tokens[0] for tokens in ids]

    def labelled(self, template: str, names: Sequence[str], special_tokens: bool) -> Callable[[int, Row], Example]:
        """Rows with a label, for a choice or a classifier."""
        template = self.rows.template or template
        self._need({*re.findall(r"{(\w+)}", template), "label"}, f"for the template {template!r}")

        def encode(number: int, row: Row) -> Example:
            target = label_index(row["label"], names)
            if target is None:
                allowed = ", ".join(name.strip() for name in names)
                raise UserError(
                    f"data.name={self.name} row {number + 1}: label {row['label']!r} is not in the label set; "
                    f"use one of {allowed}, or a number from 0 to {len(names) - 1}"
                )
            text = template.format_map({k: self._text(number, row, k) for k in row if f"{{{k}}}" in template})
            ids = self._ids(text, add_special_tokens=True)
            kept = ids[: self.max_tokens] if special_tokens else ids[-self.max_tokens :]
            return self._example(number, kept, target)

        return encode

    def completion(self) -> Callable[[int, Row], Example]:
        """Rows with ``messages``, ``prompt`` and ``completion``, or ``text``."""
        columns = self.rows.columns
        if "messages" in columns:
            return self._messages
        if {"prompt", "completion"} <= columns:
            return self._prompted
        label_hint = "; a label needs data.template and data.label_words" if "label" in columns else ""
        if "text" in columns and not label_hint:
            return lambda number, row: self._joined(number, [], self._ids(self._text(number, row, "text"), True))
        raise UserError(
            f"data.name={self.name} has columns {', '.join(sorted(columns))}; use text, prompt and completion, or "
            f"messages{label_hint}"
        )

    def _prompted(self, number: int, row: Row) -> Example:
        prompt = self._ids(self._text(number, row, "prompt"), add_special_tokens=True)
        completion = self._ids(self._text(number, row, "completion"), add_special_tokens=False)
        end = self.tokenizer.eos_token_id
        return self._joined(number, prompt, completion + ([] if end is None else [end]))

    def _messages(self, number: int, row: Row) -> Example:
        """The last message is the completion; the chat template says where it begins."""
        messages = row["messages"]
        if not messages or not isinstance(messages, list) or messages[-1].get("role") != "assistant":
            raise UserError(f"data.name={self.name} row {number + 1}: messages must end with one of role assistant")
        if not self.tokenizer.chat_template:
            raise UserError(f"data.name={self.name} has messages, but the model's tokenizer has no chat template")
        before = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(before):
            raise UserError(
                f"data.name={self.name} row {number + 1}: the chat template renders the last message apart from the "
                "ones before it; use prompt and completion"
            )
        return self._joined(number, self._ids(before, False), self._ids(whole[len(before) :], False))

    def _joined(self, number: int, prompt: list[int], completion: list[int]) -> Example:
        """Cut to ``max_tokens``: the prompt at its start, then the completion at its end."""
        completion = completion[: self.max_tokens]
        room = self.max_tokens - len(completion)
        prompt = prompt[len(prompt) - room :] if len(prompt) > room else prompt
        # The first token of all has nothing before it to be told from.
        return self._example(number, prompt + completion, max(1, len(prompt)), 2)

    def _example(self, number: int, ids: list[int], target: int, least: int = 1) -> Example:
        if len(ids) < least:
            raise UserError(f"data.name={self.name} row {number + 1} is {len(ids)} tokens; give at least {least}")
        return Example(tuple(ids), target)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _text(self, number: int, row: Row, column: str) -> str:
        if not isinstance(row[column], str):
            raise UserError(
                f"data.name={self.name} row {number + 1}: column {column} holds {type(row[column]).__name__}, not text"
            )
        text: str = row[column]
        return text

    def _need(self, columns: set[str], why: str) -> None:
        if missing := columns - self.rows.columns:
            raise UserError(
                f"data.name={self.name} has columns {', '.join(sorted(self.rows.columns))}, not "
                f"{', '.join(sorted(missing))} {why}; rename the columns or change data.template"
            )
