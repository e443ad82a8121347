"""Metrics of a run: one JSON object a step and an evaluation, in ``metrics.jsonl``."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from zo.errors import UserError
from zo.observe.history import Evaluation, History, read_line


def finite_or_none(value: Any) -> Any:
    """Return a value with ``None`` for numbers that are not finite, in lists and groups too.

    JSON has no such numbers.
    """
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """``metrics.jsonl``: append-only, one object a line."""

    def __init__(
        self, path: Path, last_step: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """Open for a run that continues after ``last_step``; drop a torn last line and later steps.

        Lines that cannot be read are kept; ``say`` prints one warning for all of them.

        Raises:
            UserError: the file cannot be read or written.
        """
        self._path = path
        self.evaluations: dict[int, Evaluation] = {}
        """Those in the file, by step."""
        self.losses: list[float] = []
        """Finite losses of the steps in the file."""
        try:
            if unreadable := self._drop_after(last_step):
                more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
                say(f"{path}: line {unreadable[0]}{more} cannot be read; ignored")
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; make room and start the command again"
            ) from error

    def _drop_after(self, last_step: int) -> list[int]:
        """Drop the lines of later steps; return the numbers of the lines that cannot be read."""
        unreadable: list[int] = []
        dropped: list[range] = []
        """Ranges of bytes in the file."""
        if not self._path.exists():
            return unreadable
        end = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                values, start, end = read_line(line), end, end + len(line)
                if not line.endswith(b"\n") or (values is not None and values["step"] > last_step):
                    dropped.append(range(start, end))
                elif values is None:
                    unreadable.append(number)
                elif (found := Evaluation.of_json(values.get("eval"))) is not None:
                    self.evaluations[values["step"]] = found
                elif isinstance(loss := values.get("loss"), float):
                    self.losses.append(loss)
        if dropped and sum(map(len, dropped)) == end - dropped[0].start:
            os.truncate(self._path, dropped[0].start)
        elif dropped:
            self._cut_out(dropped)
        return unreadable

    def _cut_out(self, dropped: Sequence[range]) -> None:
        """Rewrite the file without some of its bytes."""
        beside = self._path.with_name(self._path.name + ".new")
        beside.unlink(missing_ok=True)  # A link would be written through.
        with open(self._path, "rb") as file, open(beside, "wb") as kept:
            for gap in dropped:
                kept.write(file.read(gap.start - file.tell()))
                file.seek(gap.stop)
            shutil.copyfileobj(file, kept)
        os.rename(beside, self._path)

    def write(self, values: dict[str, Any]) -> None:
        """Add one object.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            plain = {key: finite_or_none(value) for key, value in values.items()}
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; the log is intact: make room and "
                "start the same command again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        # A write that failed has raised already.
        with contextlib.suppress(OSError):
            self._file.close()


def memory(device: torch.device) -> dict[str, int]:
    """Return in bytes the device's peak so far (0 on CPU) and the process's resident memory now."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"device_peak_bytes": peak, "host_rss_bytes": psutil.Process().memory_info().rss}


def read_history(
    path: Path, last_step: int, metric: str | None = None, patience: int | None = None
) -> History:
    """Return the evaluations in a ``metrics.jsonl`` up to a step.

    Args:
        path: of the file, which may be missing.
        last_step: evaluations of later ones are left out.
        metric: ``eval.metric``.
        patience: ``eval.patience``.

    Raises:
        UserError: an evaluation has no such metric.
    """
    history = History(metric, patience)
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        values = read_line(line)
        if values is None or values["step"] > last_step:
            continue
        if (evaluation := Evaluation.of_json(values.get("eval"))) is not None:
            history.add(values["step"], evaluation)
    return history


def last_scores(path: Path, step: int) -> dict[str, float]:
    """Return the newest scores in a ``metrics.jsonl`` up to a step; empty if there are none."""
    newest = read_history(path, step).last()
    return newest[1].scores if newest else {}
