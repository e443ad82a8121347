"""What a run tells while it runs: one JSON line a step in a file, a bar or plain lines on stderr."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from tqdm import tqdm

from zo.errors import UserError

PLAIN_LINE_EVERY_S = 5.0
GIB = 2**30


def finite_or_none(value: Any) -> Any:
    """JSON has no word for a loss that is not a number: null stands for it, in lists and groups too."""
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's object, or ``None`` if it is not one that a run wrote."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def _scores(values: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the scores of an evaluation's object, null as not-a-number; ``None`` if it has none."""
    scores = values.get("eval")
    if not isinstance(scores, dict) or not all(
        isinstance(v, int | float | None) for v in scores.values()
    ):
        return None
    return {name: math.nan if value is None else float(value) for name, value in scores.items()}


class MetricsFile:
    """``metrics.jsonl``: append-only, one object a line."""

    def __init__(
        self, path: Path, last_step: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """Open for a run that goes on after ``last_step``; a torn last line and later steps are dropped.

        Lines that cannot be read stay where they are; ``say`` is told of them once.

        Raises:
            UserError: the disk refuses.
        """
        self._path = path
        self.scores: dict[int, dict[str, float]] = {}
        """Evaluations that the file has, by step."""
        try:
            if unreadable := self._drop_after(last_step):
                first, many = unreadable[0], len(unreadable) > 1
                say(
                    f"{path}: line {first} {f'and {len(unreadable) - 1} more ' * many}cannot be read and is passed over"
                )
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; make room and start the command again"
            ) from error

    def _drop_after(self, last_step: int) -> list[int]:
        """Drop what later steps wrote; return the numbers of the lines that cannot be read."""
        unreadable: list[int] = []
        dropped: list[range] = []
        """Bytes of the file."""
        if not self._path.exists():
            return unreadable
        end = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                values, start, end = _parse(line), end, end + len(line)
                if not line.endswith(b"\n") or (values is not None and values["step"] > last_step):
                    dropped.append(range(start, end))
                elif values is None:
                    unreadable.append(number)
                elif (scores := _scores(values)) is not None:
                    self.scores[values["step"]] = scores
        if dropped and sum(map(len, dropped)) == end - dropped[0].start:
            os.truncate(self._path, dropped[0].start)
        elif dropped:
            self._cut_out(dropped)
        return unreadable

    def _cut_out(self, dropped: Sequence[range]) -> None:
        """Rewrite the file without some of its bytes."""
        beside = self._path.with_name(self._path.name + ".new")
        with open(self._path, "rb") as file, open(beside, "wb") as kept:
            for gap in dropped:
                kept.write(file.read(gap.start - file.tell()))
                file.seek(gap.stop)
            shutil.copyfileobj(file, kept)
        os.rename(beside, self._path)

    def write(self, values: dict[str, Any]) -> None:
        """Add one object.

        Raises:
            UserError: the disk refuses.
        """
        try:
            plain = {key: finite_or_none(value) for key, value in values.items()}
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; the log is safe: make room and start the same command "
                "again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        # What a full disk did not take was reported by write.
        with contextlib.suppress(OSError):
            self._file.close()


def memory(device: torch.device) -> dict[str, int]:
    """Bytes: the device's peak so far (0 on CPU) and this process's resident memory now."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"device_peak_bytes": peak, "host_rss_bytes": psutil.Process().memory_info().rss}


class Progress:
    """Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere; silent on other ranks."""

    def __init__(self, steps: int, done: int, active: bool) -> None:
        """Begin at step ``done`` of ``steps``."""
        self._active, self._steps, self._start_step = active, steps, done
        self._start = self._last_line = time.monotonic()
        self._terminal = active and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def step(self, values: dict[str, Any], scores: dict[str, float]) -> None:
        """Show one step's metrics and the newest scores."""
        if not self._active:
            return
        resident = max(values["device_peak_bytes"], values["host_rss_bytes"]) / GIB
        shown = [
            f"loss {values['loss']:.4f}",
            f"{values['tokens_per_s']:.0f} tokens/s",
            f"{resident:.2f} GiB",
        ]
        shown += [f"dev {name} {value:.4g}" for name, value in scores.items()]
        if self._terminal:
            if self._bar is None:  # Not before: lines on what comes first stand above it.
                self._bar = tqdm(
                    total=self._steps, initial=self._start_step, unit="step", dynamic_ncols=True
                )
                self._bar.start_t -= time.monotonic() - self._start
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update(1)
            return
        now, step = time.monotonic(), values["step"]
        if (
            step == self._steps
            or step == self._start_step + 1
            or now - self._last_line >= PLAIN_LINE_EVERY_S
        ):
            left_s = (now - self._start) / max(1, step - self._start_step) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {'  '.join(shown)}  {_duration(left_s)} left")
            self._last_line = now

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def last_scores(path: Path, step: int) -> dict[str, float]:
    """Return the newest evaluation in a ``metrics.jsonl`` up to a step; empty if there is none."""
    newest: dict[str, float] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        values = _parse(line)
        if (
            values is not None
            and values["step"] <= step
            and (scores := _scores(values)) is not None
        ):
            newest = scores
    return newest
