"""Record of a run for other programs: ``events.jsonl``, what it said; ``status.json``, its phase.

A record that cannot be written never ends a run: one line says so.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from zo.config.redact import without_secrets, without_secrets_in
from zo.io.atomic import write_for_readers
from zo.observe.metrics import finite_or_none

EVENTS, STATUS = "events.jsonl", "status.json"
STATUS_EVERY_S = 1.0
"""Seconds between two writes of the status in one phase, at least."""
ENDS = ("finished", "stopped", "failed")
"""Phases that end a run; those before are ``starting``, ``training``, ``evaluating`` and
``exporting``."""


def _now() -> str:
    """Return the time in UTC, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Record:
    """Both files of one run; until they are opened, events wait and the status is not kept."""

    def __init__(self) -> None:
        """Begin without a folder: what is said before the run exists belongs to it, too."""
        self.step = 0
        """The last step of the log, which an event is dated by."""
        self._folder: Path | None = None
        self._events: TextIO | None = None
        self._waiting: list[dict[str, Any]] = []
        self._phase, self._written_s, self._has_failed = "", 0.0, False

    def open(self, folder: Path, step: int) -> None:
        """Continue the files of a run after ``step``; a torn last event is cut off."""
        self._folder, self.step = folder, step
        try:
            path = folder / EVENTS
            if path.exists() and (content := path.read_bytes()):
                os.truncate(path, content.rfind(b"\n") + 1)
            self._events = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
        except OSError as error:
            self._fail(EVENTS, error)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._write(event | {"step": step})

    def event(self, kind: str, text: str, **more: str) -> None:
        """Add what the run said.

        Args:
            kind: ``info``, ``phase``, ``score``, ``sample``, ``warning`` or ``error``.
            text: one line; secrets are left out.
            more: parts of the text by name.
        """
        event = {
            "time": _now(),
            "step": self.step,
            "kind": kind,
            "text": without_secrets(text),
            **{name: without_secrets(part) for name, part in more.items()},
        }
        if self._folder is None:
            self._waiting.append(event)
        else:
            self._write(event)

    def _write(self, event: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        try:
            self._events.write(json.dumps(event, ensure_ascii=False) + "\n")
            self._events.flush()
        except OSError as error:
            self._fail(EVENTS, error)

    def status(
        self, phase: str, steps: int, left_s: float | None = None, **more: Mapping[str, Any] | str
    ) -> None:
        """Replace the status; within a phase not more often than ``STATUS_EVERY_S``.

        Args:
            phase: one of a run's phases.
            steps: steps in all.
            left_s: seconds to the last step.
            more: ``error`` of a failed run, ``summary`` of a finished one.
        """
        now = time.monotonic()
        if self._folder is None or (
            phase == self._phase and now - self._written_s < STATUS_EVERY_S
        ):
            return
        self._phase, self._written_s = phase, now
        status = {
            "phase": phase,
            "step": self.step,
            "steps": steps,
            "left_s": None if left_s is None else round(left_s, 1),
            "time": _now(),
            **without_secrets_in(more),
        }
        try:
            text = json.dumps(finite_or_none(status), indent=1, ensure_ascii=False)
            write_for_readers(self._folder / STATUS, f"{text}\n".encode(errors="replace"))
        except OSError as error:
            self._fail(STATUS, error)

    def _fail(self, name: str, error: OSError) -> None:
        """Say once that a file cannot be written."""
        if not self._has_failed:
            self._has_failed = True
            tqdm.write(
                f"warning: {name} cannot be written ({error}); the run goes on", file=sys.stderr
            )

    def close(self) -> None:
        """Close the events; the last status stays."""
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._fail(EVENTS, error)
        self._folder = self._events = None
