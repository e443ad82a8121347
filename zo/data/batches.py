"""Batches as a pure function of (seed, step, column).

Sequence p of a run is element ``p % n`` of the permutation of epoch ``p // n``, which sorts the n
examples by Philox keys. The sequences of a step are sorted by length before they are cut into
micro-batches, which saves padding. There is no state, worker or call order: any rank can make any
batch of any step.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from zo.config.schema import BatchConfig, Config
from zo.data import tasks
from zo.data.encode import Encoder
from zo.data.rows import Rows, permutation
from zo.data.tasks import Batch, Example, Task
from zo.method.philox import Purpose, word_stream
from zo.model.info import ModelInfo


def sequence_numbers(seed: int, step: int, sequences: int, examples: int) -> list[int]:
    """Return the indices of the examples that a step (from 0) draws."""
    numbers = range(step * sequences, (step + 1) * sequences)
    return [permutation(seed, n // examples, examples)[n % examples] for n in numbers]


class Data:
    """Tokenised examples, drawn in micro-batches."""

    def __init__(
        self,
        task: Task,
        train: Sequence[Example],
        dev: Sequence[Example],
        batch: BatchConfig,
        seed: int,
        together: int = 1,
        dev_batch: int | None = None,
    ) -> None:
        """Store the examples; draw nothing yet.

        Args:
            task: of the examples.
            train: to draw from.
            dev: to evaluate on.
            batch: sizes of a step and a micro-batch.
            seed: the run's.
            together: consecutive micro-batches that are padded to one length, those of a fold.
            dev_batch: examples of a batch to evaluate on; as many as in a micro-batch by default.
        """
        self.task, self.train, self.dev, self.batch, self.seed = task, train, dev, batch, seed
        self._together, self._dev_batch = together, dev_batch or batch.micro

    def batches(self, step: int, column: int) -> Batch:
        """Return the micro-batch of a step (from 0) and a column."""
        drawn = [
            self.train[i]
            for i in sequence_numbers(self.seed, step, self.batch.sequences, len(self.train))
        ]
        drawn.sort(key=lambda e: len(e.ids))
        micro, wide = self.batch.micro, self.batch.micro * self._together
        first = column // self._together * wide
        among = drawn[first : first + wide]
        return self.task.collate(drawn[column * micro : (column + 1) * micro], among)

    @cached_property
    def dev_batches(self) -> list[Batch]:
        """Batches of the examples to evaluate on, sorted by length."""
        ordered, size = sorted(self.dev, key=lambda e: len(e.ids)), self._dev_batch
        batches = (ordered[i : i + size] for i in range(0, len(ordered), size))
        return [self.task.collate(batch, batch) for batch in batches]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the tokenised training examples."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(json.dumps([example.ids, example.target]).encode())
        return digest.hexdigest()


class SyntheticData(Data):
    """Random tokens: every sequence has ``batch.max_tokens`` and is drawn once."""

    def __init__(
        self, task: Task, batch: BatchConfig, seed: int, vocab_size: int, classes: int
    ) -> None:
        """Store the sizes; each sequence is computed from its number."""
        super().__init__(task, [], [], batch, seed)
        self._vocab_size, self._classes = vocab_size, classes

    def batches(self, step: int, column: int) -> Batch:
        """Return the micro-batch of a step (from 0) and a column."""
        first = step * self.batch.sequences + column * self.batch.micro
        examples = [self._example(first + i) for i in range(self.batch.micro)]
        return self.task.collate(examples, examples)

    def _example(self, number: int) -> Example:
        count = self.batch.max_tokens
        words = word_stream(self.seed, number * (count + 1), count + 1, 0, Purpose.TOKENS).tolist()
        target = words[-1] % self._classes if self.task.kind == "class" else 1
        return Example(tuple(w % self._vocab_size for w in words[:-1]), target)

    @cached_property
    def checksum(self) -> str:
        """A constant: synthetic data depends on nothing but the configuration."""
        return hashlib.sha256(b"synthetic").hexdigest()


def build_data(
    rows: Rows, config: Config, tokenizer: Any, info: ModelInfo, classes: Sequence[str]
) -> Data:
    """Tokenise rows for a model.

    Args:
        rows: rows of the data.
        config: the run's configuration.
        tokenizer: the model's; may be ``None`` for synthetic data.
        info: the model's facts.
        classes: names of a classifier's classes; unused by a language model.

    Raises:
        UserError: the columns fit no task, a label is not in the label set, or a label word is
            several tokens.
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
    grid, batch = config.grid, config.batch
    # As many rows go through a product at once as in training.
    together, at_once = max(1, grid.fold // grid.height), grid.fold * batch.micro
    return Data(task, train, dev, batch, config.run.seed, together, at_once)


def pad_id(tokenizer: Any) -> int:
    """Return the padding token; masks hide it, so any token serves if there is none."""
    known = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(i for i in known if i is not None)
