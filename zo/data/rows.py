"""Raw rows of a task, a file or a hub data set, split into training and held-out rows.

Every row keeps its position in the user's data for error messages. Files must be UTF-8, with or
without a byte-order mark.
"""

import codecs
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zo.config.schema import DataConfig
from zo.errors import UserError
from zo.io import quickstart as assets
from zo.method.philox import Purpose, word_stream

Row = dict[str, Any]

TASKS: dict[str, tuple[Callable[[], list[Row]], str, list[str]]] = {
    "movie-reviews": (assets.movie_reviews, "{text} It was", [" terrible", " great"]),
}
"""Tasks with their own rows, template and label words, by value of ``data.name``."""

SYNTHETIC = "synthetic"
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_CLASSES = 2**16
"""Most classes that numeric labels may define; each is a row of the classifier's head."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order marks of other encodings; longer ones first, since UTF-32's starts with UTF-16's."""
HOLD_OUT_SEED = 0
"""Independent of the run's seed, so that all runs are evaluated on the same examples."""


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, examples: int) -> list[int]:
    """Return the order of the examples in one epoch."""
    words = word_stream(seed, 0, 2 * examples, epoch, Purpose.SHUFFLE).view(-1, 2)
    # Two words make a key of 62 bits, positive in int64; equal keys keep the examples' order.
    keys = (words[:, 0] << 30) | (words[:, 1] >> 2)
    return torch.sort(keys, stable=True).indices.tolist()


class Origin(NamedTuple):
    """The position of a row in the user's data, for error messages."""

    source: str
    """Key and value, such as ``data.name=reviews.jsonl``."""
    row: int
    """Row number from 1, in the order of the file."""

    def __str__(self) -> str:
        """Return key, value and row number."""
        return f"{self.source} row {self.row}"


class Rows:
    """Raw rows, before a model or a tokenizer is known."""

    def __init__(self, config: DataConfig) -> None:
        """Read the rows of ``data.name`` and ``data.dev``.

        Raises:
            UserError: the name is unknown, or the rows cannot be read.
        """
        self.config = config
        self.template, self.label_words = config.template, config.label_words
        self.train: list[Row] = []
        self.dev: list[Row] = []
        self._train_source = self._dev_source = f"data.name={config.name}"
        self._train_indices: list[int] = []
        self._dev_indices: list[int] = []
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
            self._dev_source = f"data.dev={config.dev}"
            self._dev_indices = sorted(
                permutation(HOLD_OUT_SEED, 0, len(held))[: config.dev_examples]
            )
        else:
            held, held_out = rows, min(config.dev_examples, len(rows) // 5)
            self._dev_indices, order = sorted(order[:held_out]), order[held_out:]
        self._train_indices = sorted(order[: config.train_examples])
        self.train, self.dev = (
            [rows[i] for i in self._train_indices],
            [held[i] for i in self._dev_indices],
        )

    def train_with_origins(self) -> Iterator[tuple[Origin, Row]]:
        """Yield the training rows with their origins."""
        for index, row in zip(self._train_indices, self.train, strict=True):
            yield Origin(self._train_source, index + 1), row

    def dev_with_origins(self) -> Iterator[tuple[Origin, Row]]:
        """Yield the held-out rows with their origins."""
        for index, row in zip(self._dev_indices, self.dev, strict=True):
            yield Origin(self._dev_source, index + 1), row

    @property
    def synthetic(self) -> bool:
        """True for random tokens, which have no rows."""
        return self.config.name == SYNTHETIC

    @property
    def columns(self) -> set[str]:
        """Columns of the training rows."""
        return set(self.train[0])

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
                "sequence classifier needs text and label"
            )
        found = {read_label(origin, row) for origin, row in self.train_with_origins()}
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


def read_rows(key: str, name: str, config: DataConfig, split: str) -> list[Row]:
    """Read the rows of a local file or a hub data set.

    Args:
        key: the configuration key of ``name``, for messages.
        name: a path or a hub id.
        config: its ``subset`` selects a subset of a hub data set.
        split: of a hub data set.

    Raises:
        UserError: the data is missing, unreadable or empty.
    """
    path, suffix = Path(name).expanduser(), Path(name).suffix
    if suffix in FILES:
        rows = _read_file(key, path)
    elif path.exists() or suffix or name.startswith((".", "/", "~")) or not name:
        raise UserError(
            f"{key}={name} is not a file of a known kind; use one of {', '.join(FILES)}, a task "
            f"({', '.join(TASKS)}), {SYNTHETIC}, or a hub id"
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
    datasets.disable_progress_bars()
    read = {
        "json": datasets.Dataset.from_json,
        "csv": datasets.Dataset.from_csv,
        "parquet": datasets.Dataset.from_parquet,
    }
    with tempfile.TemporaryDirectory() as scratch:
        try:
            text = path if path.suffix == ".parquet" else _as_utf8(key, path, Path(scratch))
            if path.suffix == ".jsonl":
                _check_lines(key, path, text)
            table = read[FILES[path.suffix]](str(text), cache_dir=scratch, keep_in_memory=True)
        except UserError:
            raise
        except (DatasetGenerationError, ValueError, OSError, NotImplementedError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(
                f"{key}={path} cannot be read as {path.suffix[1:]}: {reason}"
            ) from error
        return table.to_list()  # type: ignore[no-any-return]


def _as_utf8(key: str, path: Path, scratch: Path) -> Path:
    """Return the path of the text as UTF-8 without a byte-order mark: ``path``, or a copy.

    Args:
        key: configuration key of the file, for messages.
        path: the user's file.
        scratch: folder for the copy.

    Raises:
        UserError: the file has another encoding.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if other := next((name for mark, name in MARKS.items() if start.startswith(mark)), None):
            raise UserError(f"{key}={path} is {other}; save it as UTF-8")
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{key}={path} line {number} is not UTF-8: byte 0x{line[error.start]:02x} at "
                    f"position {error.start + 1}; save the file as UTF-8"
                ) from error
            if b"\0" in line:
                raise UserError(
                    f"{key}={path} line {number} contains a zero byte, as UTF-16 does; save it as "
                    "UTF-8"
                )
        if not start.startswith(codecs.BOM_UTF8):
            return path
        file.seek(len(codecs.BOM_UTF8))
        with open(scratch / path.name, "wb") as copy:
            shutil.copyfileobj(file, copy)
    return scratch / path.name


def _check_lines(key: str, path: Path, text: Path) -> None:
    """Check that every line is a JSON object; the reader's own errors lack line numbers.

    Args:
        key: configuration key of the file, for messages.
        path: the user's file, for messages.
        text: the same text as UTF-8.

    Raises:
        UserError: a line is not a JSON object.
    """
    with open(text, "rb") as file:
        # Lines end at \n, \r\n and \r; str.splitlines would also cut at U+2028, U+0085 and more.
        lines = (line for part in file for line in part.rstrip(b"\r\n").split(b"\r"))
        for number, line in enumerate(lines, 1):
            try:
                is_object = not line.strip() or isinstance(json.loads(line), dict)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{key}={path} line {number} is invalid JSON: {error.msg} at column "
                    f"{error.colno}"
                ) from error
            except RecursionError as error:
                raise UserError(
                    f"{key}={path} line {number} is invalid JSON: it is nested too deeply"
                ) from error
            if not is_object:
                raise UserError(
                    f"{key}={path} line {number} is not a JSON object; give one object per line"
                )


def _read_hub(key: str, name: str, subset: str | None, split: str) -> list[Row]:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split).to_list()  # type: ignore[no-any-return]
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}={name} cannot be loaded from the hub: {reason}; check the id, or give a local "
            "file"
        ) from error


def read_label(origin: Origin, row: Row) -> str | int | float:
    """Return a row's label; 1.0 becomes 1, since a column with gaps is read as floats.

    Raises:
        UserError: the label is missing, or neither a string nor a number.
    """
    value = row.get("label")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{origin}: the label is missing; give one, or remove the row")
    if not isinstance(value, str | int | float):
        raise UserError(f"{origin}: the label is a {type(value).__name__}; give a word or a number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def label_index(value: object, names: Sequence[str]) -> int | None:
    """Return the index of a label (a number or a name) among ``names``; ``None`` if absent."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(names) else None
    stripped = [name.strip() for name in names]
    return stripped.index(str(value).strip()) if str(value).strip() in stripped else None
