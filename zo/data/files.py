"""Read the rows of files, folders and hub data sets, each with its position in the user's data.

Files must be UTF-8, with or without a byte-order mark. The splits of a folder are those that
``datasets`` finds in the names of its files.
"""

import codecs
import glob
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from zo.errors import UserError, one_line

Row = dict[str, Any]

FILES = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Reader of each kind of file, by suffix."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order marks of other encodings; longer ones first, since UTF-32's starts with UTF-16's."""


UNREADABLE = (ValueError, TypeError, LookupError, OSError, NotImplementedError, RecursionError)
"""Raised by the readers of pyarrow and pandas for what they cannot read."""
PARQUET = b"PAR1"
"""First and last bytes of a Parquet file."""


class Origin(NamedTuple):
    """The position of a row in the user's data, for error messages."""

    source: str
    """Key and file, such as ``data.name=reviews.jsonl``."""
    row: int
    """Row number from 1, in the order of the file."""

    def __str__(self) -> str:
        """Return key, file and row number."""
        return f"{self.source} row {self.row}"


NumberedRow = tuple[Origin, Row]


def names_files(name: str) -> bool:
    """Return true for files of a known kind or a pattern, whether they exist or not."""
    return Path(name).suffix in FILES or any(sign in name for sign in "*?,")


def number_rows(source: str, rows: list[Row]) -> list[NumberedRow]:
    """Return rows with their origins."""
    return [(Origin(source, number), row) for number, row in enumerate(rows, 1)]


def read_files(key: str, name: str, split: str) -> list[NumberedRow] | None:
    """Read the rows of local files; return ``None`` if ``name`` can only be a hub id.

    Args:
        key: the configuration key of ``name``, for messages.
        name: a file, several with commas between them, a pattern such as ``part-*.csv``, or a
            folder.
        split: of a folder.

    Raises:
        UserError: a file is missing, unreadable or empty.
    """
    parts = [name] if Path(name).expanduser().exists() else [n.strip() for n in name.split(",")]
    found = [_find(key, part, split) for part in parts]
    if found == [None]:
        return None
    rows = []
    for part, paths in zip(parts, found, strict=True):
        if paths is None:
            raise UserError(f"{key}={name}: {part} is not a file; give files alone, or one hub id")
        for path in paths:
            read = _read_file(key, path)
            if not read:
                raise UserError(f"{key}={path} is empty; give a file with at least one row")
            rows += number_rows(f"{key}={path}", read)
    return rows


def _find(key: str, name: str, split: str) -> list[Path] | None:
    """Return the files of a path, a pattern or a folder; ``None`` for a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(key, path, split)
    if not path.exists() and any(sign in name for sign in "*?"):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"{key}={name} matches no file; give a pattern of existing files")
        return matches
    if path.suffix in FILES:
        return [path]
    if path.exists() or path.suffix or name.startswith((".", "/", "~")) or not name:
        raise UserError(
            f"{key}={name} is not a file of a known kind; use one of {', '.join(FILES)}, a folder "
            "of them, a task, synthetic, or a hub id"
        )
    return None


def _in_folder(key: str, folder: Path, split: str) -> list[Path]:
    """Return the files of one split of a folder; all of them if their names have no split."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        patterns = {}
    splits = {
        str(name): sorted({Path(file) for file in files if Path(file).suffix in FILES})
        for name, files in DataFilesDict.from_patterns(patterns, str(folder)).items()
    }
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        raise UserError(f"{key}={folder} holds no file of a known kind: {', '.join(FILES)}")
    if split not in splits:
        raise UserError(
            f"{key}={folder} has no split {split}, but {', '.join(splits)}; set data.split or "
            "data.dev to one of them"
        )
    if len(kinds := sorted({file.suffix for file in splits[split]})) > 1:
        raise UserError(
            f"{key}={folder} holds files of several kinds; give a pattern, such as "
            f"{folder}/*{kinds[0]}"
        )
    return [folder / os.path.relpath(file, folder) for file in splits[split]]


def _read_file(key: str, path: Path) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if path.suffix not in FILES:
        raise UserError(f"{key}={path} is not a file of a known kind; use {', '.join(FILES)}")
    if not path.is_file():
        raise UserError(f"{key}={path} does not exist; give an existing file")
    if path.stat().st_size == 0:
        raise UserError(f"{key}={path} is empty; give a file with at least one row")
    datasets.disable_progress_bars()
    read = {
        "json": datasets.Dataset.from_json,
        "csv": datasets.Dataset.from_csv,
        "parquet": datasets.Dataset.from_parquet,
        "text": datasets.Dataset.from_text,
    }
    options: dict[str, dict[str, Any]] = {
        # A blank cell alone is no value: "None", "NA" and "null" are words.
        ".csv": {"keep_default_na": False, "na_values": [""]},
        ".tsv": {"keep_default_na": False, "na_values": [""], "sep": "\t"},
        ".txt": {"sample_by": "document"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        try:
            text = path if path.suffix == ".parquet" else _as_utf8(key, path, Path(scratch))
            if path.suffix == ".jsonl" or (
                path.suffix == ".json" and not _is_json(key, path, text)
            ):
                _check_lines(key, path, text)
            elif path.suffix == ".parquet":
                _check_parquet(key, path)
            table = read[FILES[path.suffix]](
                str(text), cache_dir=scratch, keep_in_memory=True, **options.get(path.suffix, {})
            )
            return table.to_list()  # type: ignore[no-any-return]
        except UserError:
            raise
        except (DatasetGenerationError, *UNREADABLE) as error:
            reason = one_line(error.__cause__ or error, 300)
            raise UserError(
                f"{key}={path} cannot be read as {path.suffix[1:]}: {reason}"
            ) from error


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


def _is_json(key: str, path: Path, text: Path) -> bool:
    """Return False for a file that is not one JSON value, and so may have one a line.

    Raises:
        UserError: the value has no rows; the reader of tables ends the process at some of these.
    """
    try:
        content = json.loads(text.read_bytes())
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}={path} is invalid JSON: {one_line(error, 300)}") from error
    rows = content if isinstance(content, list) else [content]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{key}={path} is not a list of JSON objects; give one object for each row")
    return True


def _check_parquet(key: str, path: Path) -> None:
    """Raise :class:`UserError` for an archive: the reader would unpack it, whatever its name."""
    with open(path, "rb") as file:
        first = file.read(len(PARQUET))
        file.seek(max(0, path.stat().st_size - len(PARQUET)))
        last = file.read(len(PARQUET))
    if (first, last) != (PARQUET, PARQUET):
        raise UserError(f"{key}={path} is not a Parquet file, or is cut short; give an intact one")


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
            except (ValueError, RecursionError) as error:  # Too many digits, too deep.
                raise UserError(
                    f"{key}={path} line {number} is invalid JSON: {one_line(error, 300)}"
                ) from error
            if not is_object:
                raise UserError(
                    f"{key}={path} line {number} is not a JSON object; give one object per line"
                )


def read_hub(
    key: str, name: str, subset: str | None, split: str, revision: str | None = None
) -> list[Row]:
    """Read the rows of a hub data set, of a branch, tag or commit.

    Raises:
        UserError: it cannot be loaded, or is empty.
    """
    import datasets

    try:
        rows: list[Row] = datasets.load_dataset(
            name, subset, split=split, revision=revision
        ).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 300)
        raise UserError(
            f"{key}={name} cannot be loaded from the hub: {reason}; check the id, or give a local "
            "file"
        ) from error
    if not rows:
        raise UserError(f"{key}={name} has no rows; give another split")
    return rows
