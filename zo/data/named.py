"""Tasks by name: where their rows are, and what is asked of them.

A task is one :class:`NamedTask`. Its rows come from the hub or from ``data.name``, a folder or a
file with the same columns. Training and held-out rows are drawn from its training split and test
rows from its test split, all by ``run.seed``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from zo.config.schema import DataConfig
from zo.data.files import NumberedRow, Origin, Row
from zo.data.rows import Rows, permutation
from zo.errors import UserError, one_line
from zo.method.philox import Purpose

TEST = "test"
"""Value of ``data.dev`` for the test rows of a task."""
TEST_EXAMPLES = 1000
"""Test rows, at most; MeZO's number."""
UNLABELLED = -1
"""Label of a row without one, on the hub; such rows are left out."""


class Prompt(NamedTuple):
    """A template and the words of the labels, in their order; a row's options have no words."""

    text: str
    words: tuple[str, ...] = ()


class Options(NamedTuple):
    """The texts that may follow the prompt of a row."""

    texts: Sequence[str]
    right: Sequence[int]
    """Indices of those that count as right; the first is trained on."""


@dataclass(frozen=True)
class NamedTask:
    """A task: its rows, its prompt, and its label words or the options of each row."""

    hub: str
    """Id of its data set on the hub."""
    texts: tuple[str, ...]
    """Columns of text that it needs."""
    answer: str = "label"
    """Column of the label, or of what ``options`` reads."""
    subset: str | None = None
    revision: str | None = None
    """Commit of the data set, as public projects record it."""
    test: str = "validation"
    """Split of the test rows."""
    most_dev: int = 500
    """Held-out rows, at most."""
    causal: Prompt | None = None
    """For a causal language model."""
    masked: Prompt | None = None
    """For a masked language model; its ``{mask}`` is the mask token."""
    prepare: Callable[[Row], Row] = dict
    """Makes the texts of the template of a row's."""
    options: Callable[[Row], Options] | None = None
    """Makes what may follow the prompt where that is the row's own; raises ``ValueError`` with
    what is wrong with the row."""
    generates: bool = False
    """True if the answer is generated: the options are the texts that count as right."""


class NamedRows(Rows):
    """Rows of a named task."""

    def __init__(
        self, name: str, known: dict[str, NamedTask], data: DataConfig, seed: int, model_task: str
    ) -> None:
        """Read and draw the rows.

        Args:
            name: of the task.
            known: all tasks.
            data: the keys of the data; ``data.name`` and its like override the task's.
            seed: the run's; of the draw.
            model_task: ``causal-lm``, ``masked-lm`` or ``sequence-classification``.

        Raises:
            UserError: the task is unknown or does not fit the model, or its rows cannot be read.
        """
        if name not in known:
            raise UserError(f"task={name} is not known; use one of {', '.join(sorted(known))}")
        self.task_name, self.named = name, known[name]
        prompt = self._prompt(model_task)
        if not data.name:
            named, revision = self.named, data.revision or self.named.revision
            subset = data.subset or named.subset
            data = replace(data, name=named.hub, subset=subset, revision=revision)
        self.config, self.template = data, data.template or prompt.text
        self.label_words = data.label_words or list(prompt.words)
        if len(self.label_words) != len(prompt.words):
            raise UserError(
                f"data.label_words={self.label_words} does not fit task={name}, which has "
                f"{len(prompt.words) or 'no'} labels; give as many words"
            )
        rows = self._labelled("data.name", data.name, data.split)
        order = permutation(seed, 0, len(rows), Purpose.SPLIT)
        count = min(data.dev_examples, self.named.most_dev, len(rows) * 2 // 5)
        # The same rows are trained on whichever are scored.
        taken, held_out = self._split(rows, order, count, self.named.answer)
        held = rows
        if data.dev is not None:
            is_test = data.dev == TEST
            source = (data.name, self.named.test) if is_test else self._dev(data.dev)
            held = self._labelled("data.dev", *source)
            count = TEST_EXAMPLES if is_test else data.dev_examples
            held_out = permutation(seed, 0, len(held), Purpose.SPLIT)[:count]
        self.numbered_train = [self._prepared(rows[i]) for i in sorted(taken)]
        self.numbered_dev = [self._prepared(held[i]) for i in sorted(held_out)]

    def _prompt(self, model_task: str) -> Prompt:
        fits = {"causal-lm": self.named.causal, "masked-lm": self.named.masked}
        prompt = fits.get(model_task)
        if prompt is None:
            models = " or ".join(f"model.task={key}" for key, value in fits.items() if value)
            raise UserError(
                f"task={self.task_name} has no prompt for model.task={model_task}; use {models} "
                "and a model of that kind"
            )
        return prompt

    def _labelled(self, key: str, name: str, split: str) -> list[NumberedRow]:
        """Return the rows of a split that have a label."""
        rows = self._read(key, name, split)
        found = [(origin, row) for origin, row in rows if row.get(self.named.answer) != UNLABELLED]
        if not found:
            raise UserError(f"{key}={name} has no row with a label in split {split}; give another")
        return found

    def _prepared(self, numbered: NumberedRow) -> NumberedRow:
        """Return a row with the texts of the template, and its label under that name.

        Raises:
            UserError: a column is missing, empty or no text.
        """
        origin, row = numbered
        for column in (*self.named.texts, self.named.answer):
            value = row.get(column)
            wrong = value is None or (column in self.named.texts and not isinstance(value, str))
            if wrong:
                state = "is missing or empty" if value is None else f"is {type(value).__name__}"
                raise UserError(
                    f"{origin}: column {column}, which task={self.task_name} needs, {state}; its "
                    f"columns are {', '.join(row)}, and data.columns names them"
                )
        label = row[self.named.answer]
        label = int(label) if isinstance(label, bool) else label
        return origin, {**self.named.prepare(row), "label": label}

    def options(self, origin: Origin, row: Row) -> Options:
        """Return the options of a row.

        Raises:
            UserError: the row has none that is right.
        """
        assert self.named.options is not None
        try:
            found = self.named.options(row)
        except (ValueError, KeyError, TypeError) as error:
            lacks = "there is no " if isinstance(error, KeyError) else ""
            raise UserError(
                f"{origin}: {self.named.answer} is not what task={self.task_name} needs ({lacks}"
                f"{one_line(error)}); correct the row, or remove it"
            ) from error
        if not found.texts or not found.right or any(not text.strip() for text in found.texts):
            raise UserError(
                f"{origin}: {self.named.answer} has no answer, or an empty one; give one, or "
                "remove the row"
            )
        return found
