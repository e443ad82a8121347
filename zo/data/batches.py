"""Batches as a pure function of (seed, step, column).

Sequence p of a run is element ``p % n`` of the permutation of epoch ``p // n``, which sorts the n
examples by Philox keys. The sequences of a step are sorted by length before they are cut into
micro-batches, which saves padding; with ``batch.bucket`` those of several steps are, before they
are dealt out to the steps in a random order. There is no state, worker or call order: any rank can
make any batch of any step.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from zo.config.objective import LIKELIHOOD, reward_name
from zo.config.schema import BatchConfig, Config
from zo.data import seq2seq, tasks
from zo.data.encode import Encoded, Encoding
from zo.data.named import NamedRows
from zo.data.pairs import Reference, preference
from zo.data.prompts import build_prompts
from zo.data.questions import QuestionEncoder
from zo.data.report import DataReport, make_report
from zo.data.rows import Rows, permutation
from zo.data.tasks import Batch, Example, Task
from zo.errors import UserError
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
        report: DataReport | None = None,
        reference: Reference | None = None,
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
            report: on the examples.
            reference: of pairs.
        """
        self.task, self.train, self.dev, self.batch, self.seed = task, train, dev, batch, seed
        self._together, self._dev_batch = together, dev_batch or batch.micro
        self.report, self.reference = report, reference

    def batches(self, step: int, column: int) -> Batch:
        """Return the micro-batch of a step (from 0) and a column."""
        drawn = self._drawn(step)
        micro, wide = self.batch.micro, self.batch.micro * self._together
        first = column // self._together * wide
        among = drawn[first : first + wide]
        return self.task.collate_trained(drawn[column * micro : (column + 1) * micro], among)

    def _drawn(self, step: int) -> list[Example]:
        """Return the examples of a step, sorted by length."""
        count, bucket = self.batch.sequences, self.batch.bucket or 1
        numbers = sequence_numbers(self.seed, step // bucket, count * bucket, len(self.train))
        drawn = sorted((self.train[i] for i in numbers), key=lambda e: e.length)
        place = permutation(self.seed, step // bucket, bucket, Purpose.BUCKET)[step % bucket]
        return drawn[place * count : (place + 1) * count]

    def drawn(self, steps: int) -> list[Example]:
        """Return the examples that so many steps draw, each once, and those to evaluate on."""
        bucket = self.batch.bucket or 1
        count = -(-steps // bucket) * bucket * self.batch.sequences
        order = permutation(self.seed, 0, len(self.train))
        # Beyond the first epoch all of them are drawn.
        return [self.train[i] for i in order[:count]] + list(self.dev)

    @cached_property
    def dev_batches(self) -> "Sequence[Batch]":
        """Batches of the examples to evaluate on, sorted by length."""
        return _Collated(self.task, sorted(self.dev, key=lambda e: e.length), self._dev_batch)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the tokenised training examples."""
        digest = hashlib.sha256()
        for example in (side for pair in self.train for side in pair.sides):
            more = [example.ignored, example.candidates, example.right, example.answers]
            given = [part for part in more if part]
            digest.update(json.dumps([example.ids, example.target, *given]).encode())
        return digest.hexdigest()


class _Collated(Sequence[Batch]):
    """Batches made when they are asked for: those of pairs need the base model's numbers."""

    def __init__(self, task: Task, ordered: Sequence[Example], size: int) -> None:
        self._task = task
        self._batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._task.collate(self._batches[index], self._batches[index])


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
        target = -(-count // 2) if self.task.has_encoder else 1
        if self.task.kind == "class":
            target = words[-1] % self._classes
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
    pad, vocab_size = pad_id(tokenizer, info.vocab_size), info.vocab_size
    has_encoder = info.task == "seq2seq-lm"
    if rows.synthetic:
        task = _synthetic(info, pad)
        return SyntheticData(task, config.batch, config.run.seed, vocab_size, len(classes))
    if reward := reward_name(config.objective, config.data.name):
        return _data(*build_prompts(rows, config, tokenizer, info, pad, reward), config)
    kind = seq2seq.PairEncoder if has_encoder else QuestionEncoder
    encoder = kind(rows, tokenizer, config.batch.max_tokens, vocab_size)
    names, warnings, reference = list(classes), [], None
    if rows.columns >= {"chosen", "rejected"} and not has_encoder and not names:
        reference = Reference(info, pad, lambda steps: data.drawn(steps))
        task = preference(info, pad, config.objective.beta, reference)
        encoding = encoder.language()
    else:
        task, encoding, names = _task(encoder, info, pad, names)
        warnings = encoder.warnings_of(names) if task.kind in ("choice", "candidates") else []
    task = replace(task, names=tuple(names), template=rows.template)
    task = task.minimising(config.objective.name or LIKELIHOOD)
    encoded = [encoding.encode(*row) for row in rows.numbered_train]
    train = [example for row in encoded for example in row.examples]
    dev = [example for row in rows.numbered_dev for example in encoding.encode(*row).examples]
    warnings += [same] if (same := _equal_pairs(rows, encoded)) else []
    limit = config.batch.max_tokens
    report = make_report(
        encoding, encoded, len(rows.numbered_dev), limit, tokenizer, names, warnings
    )
    data = _data(task, train, dev, report, config, reference)
    return data


def _data(
    task: Task,
    train: Sequence[Example],
    dev: Sequence[Example],
    report: DataReport,
    config: Config,
    reference: Reference | None = None,
) -> Data:
    grid, batch = config.grid, config.batch
    # As many rows go through a product at once as in training.
    together, at_once = max(1, grid.fold // grid.height), grid.fold * batch.micro
    if task.kind == "candidates":  # Each is a row.
        at_once = max(1, at_once // max(len(e.candidates) for e in [*train, *dev]))
    return Data(task, train, dev, batch, config.run.seed, together, at_once, report, reference)


def _synthetic(info: ModelInfo, pad: int) -> Task:
    """Return the task of random tokens.

    Raises:
        UserError: they have no mask, which the model needs.
    """
    if info.task == "masked-lm":
        raise UserError(
            "data.name=synthetic has no mask to predict for model.task=masked-lm; use "
            "model.task=sequence-classification to measure speed"
        )
    if info.task == "sequence-classification":
        return tasks.classification(info, pad)
    return _completion(info, pad)


def _completion(info: ModelInfo, pad: int) -> Task:
    """Return the task of predicting completions, in the decoder where the model has an encoder."""
    return seq2seq.completion(pad) if info.task == "seq2seq-lm" else tasks.completion(info, pad)


def _task(
    encoder: QuestionEncoder | seq2seq.PairEncoder, info: ModelInfo, pad: int, classes: list[str]
) -> tuple[Task, Encoding, list[str]]:
    """Return the task of an encoder's rows, their encoding, and the names of their labels.

    Raises:
        UserError: the model is not of a kind that the task is for.
    """
    rows = encoder.rows
    if isinstance(rows, NamedRows) and rows.named.options is not None:
        if not isinstance(encoder, QuestionEncoder):
            raise UserError(
                "this task is for causal models, and model.name has an encoder and a "
                "decoder; use another model or another task"
            )
        return *encoder.options(rows, info, pad), classes
    if info.task == "masked-lm" and isinstance(encoder, QuestionEncoder):
        words = rows.label_words or []
        return *encoder.masked(words, info, pad), words
    if info.task == "sequence-classification":
        encoding = encoder.labelled("{text}", classes, is_classifier=True)
        return tasks.classification(info, pad), encoding, classes
    if "label" in rows.columns and rows.template and rows.label_words:
        words = rows.label_words
        return *encoder.choice(rows.template, words, info, pad), words
    return _completion(info, pad), encoder.language(), classes


def _equal_pairs(rows: Rows, encoded: Sequence[Encoded]) -> str | None:
    """Return a warning if rows have the same answer as chosen and rejected."""
    same = [
        origin
        for (origin, _), row in zip(rows.numbered_train, encoded, strict=True)
        if any(e.rejected == replace(e, rejected=None) for e in row.examples)
    ]
    if not same:
        return None
    return (
        f"in {len(same):,} of {len(encoded):,} pairs chosen equals rejected, first in {same[0]}: "
        "nothing is learned from them"
    )


def pad_id(tokenizer: Any, vocab_size: int) -> int:
    """Return the padding token; masks hide it, so any of the model's serves if there is none."""
    known = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(i for i in known if i is not None and i < vocab_size)
