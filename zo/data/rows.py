"""Raw rows of a task, files or a hub data set, split into training and held-out rows.

Every row keeps its position in the user's data for error messages.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from zo.config.schema import DataConfig
from zo.data import countdown, gsm8k
from zo.data.files import NumberedRow, Origin, Row, names_files, number_rows, read_files, read_hub
from zo.errors import UserError
from zo.io import quickstart as assets
from zo.method.philox import Purpose, word_stream

TASKS: dict[str, tuple[Callable[[], list[Row]], str, list[str] | None]] = {
    "movie-reviews": (
        assets.movie_reviews,
        "Review: {text}\nSentiment:",
        [" negative", " positive"],
    ),
    "countdown": (countdown.rows, countdown.TEMPLATE, None),
    "gsm8k": (
        lambda: read_hub("data.name", "openai/gsm8k", "main", "train"),
        gsm8k.TEMPLATE,
        None,
    ),
}
"""Tasks with their own rows, template and label words, by value of ``data.name``; without words,
the model completes prompts, and is rewarded."""

SYNTHETIC = "synthetic"
MAX_CLASSES = 2**16
"""Most classes that numeric labels may define; each is a row of the classifier's head."""
HOLD_OUT_SEED = 0
"""Independent of the run's seed, so that all runs are evaluated on the same examples."""


@lru_cache(maxsize=4)
def permutation(
    seed: int, epoch: int, examples: int, purpose: Purpose = Purpose.SHUFFLE
) -> list[int]:
    """Return the order of the examples in one epoch, or of the steps in one bucket."""
    words = word_stream(seed, 0, 2 * examples, epoch, purpose).view(-1, 2)
    # Two words make a key of 62 bits, positive in int64; equal keys keep the examples' order.
    keys = (words[:, 0] << 30) | (words[:, 1] >> 2)
    return torch.sort(keys, stable=True).indices.tolist()


class Rows:
    """Raw rows, before a model or a tokenizer is known."""

    def __init__(self, config: DataConfig) -> None:
        """Read the rows of ``data.name`` and ``data.dev``.

        Raises:
            UserError: the name is unknown, or the rows cannot be read.
        """
        self.config = config
        self.template, self.label_words = config.template, config.label_words
        self.numbered_train: list[NumberedRow] = []
        self.numbered_dev: list[NumberedRow] = []
        if config.name == SYNTHETIC:
            return
        if config.name in TASKS:
            _, template, words = TASKS[config.name]
            self.template, self.label_words = self.template or template, self.label_words or words
        rows = self._read("data.name", config.name, config.split)
        order = permutation(HOLD_OUT_SEED, 0, len(rows))
        count = 0 if config.dev is not None else min(config.dev_examples, len(rows) // 5)
        taken, held_out = self._split(rows, order, count)
        held = rows
        if config.dev is not None:
            held = self._read("data.dev", *self._dev(config.dev))
            held_out = permutation(HOLD_OUT_SEED, 0, len(held))[: config.dev_examples]
        self.numbered_train = [rows[i] for i in sorted(taken)]
        self.numbered_dev = [held[i] for i in sorted(held_out)]

    def _split(
        self, rows: Sequence[NumberedRow], order: list[int], count: int, label: str = "label"
    ) -> tuple[list[int], list[int]]:
        """Return the numbers of rows to train on, and of rows that are held out.

        Args:
            rows: all of them.
            order: their numbers, in the order in which they are drawn.
            count: rows to hold out; with ``data.per_label`` that many of each label instead.
            label: column of the label.

        Raises:
            UserError: a row has no label to draw by.
        """
        each = self.config.per_label
        if each is None:
            return order[count:][: self.config.train_examples], order[:count]
        of_label: dict[str, list[int]] = {}
        for i in order:
            origin, row = rows[i]
            if row.get(label) is None:
                raise UserError(
                    f"{origin}: data.per_label={each} draws rows by column {label}, which is "
                    "missing or empty; give it, or use data.train_examples"
                )
            of_label.setdefault(str(row[label]), []).append(i)
        found = of_label.values()
        return (
            [i for some in found for i in some[:each]],
            [i for some in found for i in some[each : 2 * each]],
        )

    def _read(self, key: str, name: str, split: str) -> list[NumberedRow]:
        """Return the rows of ``data.name`` or ``data.dev``, their columns renamed."""
        if name in TASKS:
            return number_rows(f"{key}={name}", TASKS[name][0]())
        rows = read_files(key, name, split)
        if rows is None:
            shown = split if key == "data.dev" and name == self.config.name else name
            config = self.config
            read = read_hub(key, name, config.subset, split, config.revision)
            rows = number_rows(f"{key}={shown}", read)
        return [(origin, self._rename(origin, row)) for origin, row in rows]

    def _dev(self, dev: str) -> tuple[str, str]:
        """Return the name and the split that ``data.dev`` means."""
        name, split = self.config.name, self.config.split
        has_splits = not names_files(name) and name not in TASKS
        if dev == name or names_files(dev) or (not has_splits and Path(dev).expanduser().is_dir()):
            return dev, split
        if has_splits:
            return name, dev
        raise UserError(
            f"data.dev={dev} is not a file, and data.name={name} has no splits; give an existing "
            "file or folder, or data.dev=null"
        )

    def _rename(self, origin: Origin, row: Row) -> Row:
        """Return a row with the names that ``data.columns`` gives to its columns."""
        names = self.config.columns or {}
        if not names:
            return row
        if missing := [theirs for theirs in names.values() if theirs not in row]:
            raise UserError(
                f"data.columns: {origin.source} has no column {missing[0]}; its columns are "
                f"{', '.join(row)}; give data.columns names that it has"
            )
        kept = {k: v for k, v in row.items() if k not in names and k not in names.values()}
        return kept | {ours: row[theirs] for ours, theirs in names.items()}

    @property
    def train(self) -> list[Row]:
        """Training rows."""
        return [row for _, row in self.numbered_train]

    @property
    def dev(self) -> list[Row]:
        """Held-out rows."""
        return [row for _, row in self.numbered_dev]

    @property
    def synthetic(self) -> bool:
        """True for random tokens, which have no rows."""
        return str(self.config.name) == SYNTHETIC

    @cached_property
    def columns(self) -> set[str]:
        """Columns of the training rows."""
        return {column for _, row in self.numbered_train for column in row}

    def class_names(self, known: Sequence[str] = ()) -> list[str]:
        """Return the class names: the label words, else ``known`` if they fit, else the labels.

        Args:
            known: class names of a pretrained classifier.

        Raises:
            UserError: there is no label column, or a label is missing or too large a number.
        """
        if self.synthetic:
            return list(known) or ["0", "1"]
        if self.label_words:
            return [word.strip() for word in self.label_words]
        if "label" not in self.columns:
            raise UserError(
                f"data.name={self.config.name} has columns {', '.join(sorted(self.columns))}; a "
                "sequence classifier needs text and label, which data.columns can name"
            )
        found = {read_label(origin, row) for origin, row in self.numbered_train}
        if known and all(label_index(value, known) is not None for value in found):
            return list(known)
        numbers = [value for value in found if isinstance(value, int)]
        if len(numbers) == len(found):
            if max(numbers) >= MAX_CLASSES:
                raise UserError(
                    f"data.name={self.config.name} has the label {max(numbers)}, which would make "
                    f"that many classes; number the classes from 0, at most {MAX_CLASSES}"
                )
            return [str(i) for i in range(max(2, max(numbers) + 1))]
        return sorted(str(value) for value in found)


def read_label(origin: Origin, row: Row) -> str | int | float:
    """Return a row's label; 1.0 becomes 1, since a column with gaps is read as floats.

    Raises:
        UserError: the label is missing or blank, or neither a string nor a number.
    """
    value = row.get("label")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{origin}: the label is missing or blank; give one, or remove the row")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{origin}: the label is blank; give one, or remove the row")
    if not isinstance(value, str | int | float):
        raise UserError(f"{origin}: the label is a {type(value).__name__}; give a word or a number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def label_index(value: object, names: Sequence[str]) -> int | None:
    """Return the index of a label (a number or a name) among ``names``; ``None`` if absent."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(names) else None
    stripped = [name.strip() for name in names]
    return stripped.index(str(value).strip()) if str(value).strip() in stripped else None
