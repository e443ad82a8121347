"""Examples from a name, and batches as a pure function of (seed, step, column).

Sequence number p of a run is place ``p % n`` of the permutation of epoch ``p // n``; an epoch's permutation sorts the
examples by Philox keys. The sequences of a step are sorted by length before they are cut into micro-batches, which
saves padding. No state, no worker, no call order: any rank makes any batch of any step.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from zo.config.schema import BatchConfig, Config, template_columns
from zo.data import tasks
from zo.data.rows import Origin, Row, Rows, label_index, permutation, read_label
from zo.data.tasks import Batch, Example, Task
from zo.errors import UserError
from zo.method.philox import Purpose, word_stream
from zo.model.info import ModelInfo


def sequence_numbers(seed: int, step: int, sequences: int, examples: int) -> list[int]:
    """Which examples a step, counted from 0, draws."""
    places = range(step * sequences, (step + 1) * sequences)
    return [permutation(seed, place // examples, examples)[place % examples] for place in places]


class Data:
    """Tokenised examples."""

    def __init__(
        self,
        task: Task,
        train: Sequence[Example],
        dev: Sequence[Example],
        batch: BatchConfig,
        seed: int,
    ) -> None:
        """Hold the examples; nothing is drawn yet."""
        self.task, self.train, self.dev, self.batch, self.seed = task, train, dev, batch, seed

    def batches(self, step: int, column: int) -> Batch:
        """The micro-batch of a step, from 0, and a column."""
        drawn = [
            self.train[i]
            for i in sequence_numbers(self.seed, step, self.batch.sequences, len(self.train))
        ]
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

    def __init__(
        self, task: Task, batch: BatchConfig, seed: int, vocab_size: int, classes: int
    ) -> None:
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


def build_data(
    rows: Rows, config: Config, tokenizer: Any, info: ModelInfo, classes: Sequence[str]
) -> Data:
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
        task, encode = (
            tasks.classification(info, pad),
            encoder.labelled("{text}", classes, special_tokens=True),
        )
    elif "label" in rows.columns and rows.template and rows.label_words:
        task = tasks.choice(info, pad, encoder.word_ids(rows.label_words))
        encode = encoder.labelled(rows.template, rows.label_words, special_tokens=False)
    else:
        task, encode = tasks.completion(info, pad), encoder.completion()
    train = [encode(origin, row) for origin, row in rows.train_with_origins()]
    dev = [encode(origin, row) for origin, row in rows.dev_with_origins()]
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
                raise UserError(
                    f"data.label_words: {word!r} is {len(tokens)} tokens {pieces}; use a word of one token"
                )
        return [tokens[0] for tokens in ids]

    def labelled(
        self, template: str, names: Sequence[str], special_tokens: bool
    ) -> Callable[[Origin, Row], Example]:
        """Rows with a label, for a choice or a classifier."""
        template = self.rows.template or template
        columns = template_columns(template)
        self._need({*columns, "label"}, f"for the template {template!r}")

        def encode(origin: Origin, row: Row) -> Example:
            label = read_label(origin, row)
            target = label_index(label, names)
            if target is None:
                allowed = ", ".join(name.strip() for name in names)
                raise UserError(
                    f"{origin}: label {label!r} is not in the label set; "
                    f"use one of {allowed}, or a number from 0 to {len(names) - 1}"
                )
            text = template.format_map(
                {column: self._text(origin, row, column) for column in columns}
            )
            ids = self._ids(text, add_special_tokens=True)
            kept = ids[: self.max_tokens] if special_tokens else ids[-self.max_tokens :]
            return self._example(origin, kept, target)

        return encode

    def completion(self) -> Callable[[Origin, Row], Example]:
        """Rows with ``messages``, ``prompt`` and ``completion``, or ``text``."""
        columns = self.rows.columns
        if "messages" in columns:
            return self._messages
        if {"prompt", "completion"} <= columns:
            return self._prompted
        label_hint = (
            "; a label needs data.template and data.label_words" if "label" in columns else ""
        )
        if "text" in columns and not label_hint:
            return lambda origin, row: self._joined(
                origin, [], self._ids(self._text(origin, row, "text"), True)
            )
        raise UserError(
            f"data.name={self.name} has columns {', '.join(sorted(columns))}; use text, prompt and completion, or "
            f"messages{label_hint}"
        )

    def _prompted(self, origin: Origin, row: Row) -> Example:
        prompt = self._ids(self._text(origin, row, "prompt"), add_special_tokens=True)
        completion = self._ids(self._text(origin, row, "completion"), add_special_tokens=False)
        end = self.tokenizer.eos_token_id
        return self._joined(origin, prompt, completion + ([] if end is None else [end]))

    def _messages(self, origin: Origin, row: Row) -> Example:
        """The last message is the completion; the chat template says where it begins."""
        messages = row.get("messages")
        objects = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not messages or not objects or messages[-1].get("role") != "assistant":
            raise UserError(f"{origin}: messages must end with one of role assistant")
        if not self.tokenizer.chat_template:
            raise UserError(
                f"data.name={self.name} has messages, but the model's tokenizer has no chat template"
            )
        try:
            before = self.tokenizer.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True
            )
            whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{origin}: the model's chat template refuses the messages: {reason}"
            ) from error
        if not whole.startswith(before):
            raise UserError(
                f"{origin}: the chat template renders the last message apart from the "
                "ones before it; use prompt and completion"
            )
        return self._joined(
            origin, self._ids(before, False), self._ids(whole[len(before) :], False)
        )

    def _joined(self, origin: Origin, prompt: list[int], completion: list[int]) -> Example:
        """Cut to ``max_tokens``: the prompt at its start, then the completion at its end."""
        completion = completion[: self.max_tokens]
        room = self.max_tokens - len(completion)
        prompt = prompt[len(prompt) - room :] if len(prompt) > room else prompt
        # The first token of all has nothing before it to be told from.
        if not completion:
            raise UserError(
                f"{origin}: the completion is empty, so that there is no token to train on; take it out"
            )
        return self._example(origin, prompt + completion, max(1, len(prompt)), 2)

    def _example(self, origin: Origin, ids: list[int], target: int, least: int = 1) -> Example:
        if len(ids) < least:
            raise UserError(f"{origin} is {len(ids)} tokens; give at least {least}")
        return Example(tuple(ids), target)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _text(self, origin: Origin, row: Row, column: str) -> str:
        text = row.get(column)
        if text is None:
            raise UserError(
                f"{origin}: column {column} is empty or missing; give its text, or take the row out"
            )
        if not isinstance(text, str):
            raise UserError(f"{origin}: column {column} holds {type(text).__name__}, not text")
        return text

    def _need(self, columns: set[str], why: str) -> None:
        if missing := columns - self.rows.columns:
            raise UserError(
                f"data.name={self.name} has columns {', '.join(sorted(self.rows.columns))}, not "
                f"{', '.join(sorted(missing))} {why}; rename the columns or change data.template"
            )
