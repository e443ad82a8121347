"""Progress of a run on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

QUIET_S = 1.0
"""Seconds that a phase may take before its line is printed."""
PLAIN_LINE_EVERY_S = 5.0
"""Seconds between two lines where stderr is not a terminal."""
GIB = 2**30


class Progress:
    """Progress of a run; silent unless ``active``, which only rank 0 is."""

    def __init__(self, steps: int, done: int, active: bool) -> None:
        """Begin at step ``done`` of ``steps``."""
        self._active, self._steps, self._start_step = active, steps, done
        self._start = self._last_line = time.monotonic()
        self._terminal = active and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    @contextmanager
    def phase(self, line: str) -> Iterator[None]:
        """Print a line if the block takes longer than ``QUIET_S`` seconds."""
        timer = threading.Timer(QUIET_S, self.say, (line,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

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
            if self._bar is None:  # Lines printed during start-up stay above it.
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
        """Close the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    """Return ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
