"""Progress of a run on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean as mean
from typing import Any

from tqdm import tqdm

QUIET_S = 1.0
"""Seconds that a phase may take before its line is printed."""
PLAIN_LINE_EVERY_S = 5.0
"""Seconds between two lines where stderr is not a terminal."""
AVERAGED_STEPS = 20
"""Steps that the loss and the rate shown are means of: one step's loss is mostly noise."""
GIB = 2**30


class Progress:
    """Progress of a run; silent unless ``active``, which only rank 0 is."""

    def __init__(
        self,
        steps: int,
        done: int,
        active: bool,
        record: Callable[[str, str], None] = lambda kind, line: None,
    ) -> None:
        """Begin at step ``done`` of ``steps``; ``record`` takes kind and text of what is said."""
        self._active, self._steps, self._start_step = active, steps, done
        self._start = self._last_line = time.monotonic()
        self._terminal = active and sys.stderr.isatty()
        self._record = record
        self._losses = deque[float](maxlen=AVERAGED_STEPS)
        self._step_s = deque[float](maxlen=AVERAGED_STEPS)
        self._bar: tqdm[Any] | None = None

    @contextmanager
    def phase(self, line: str) -> Iterator[None]:
        """Print a line if the block takes longer than ``QUIET_S`` seconds."""
        timer = threading.Timer(QUIET_S, self.say, (line, "phase"))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def left_s(self, step: int) -> float | None:
        """Return the seconds from a step to the last; ``None`` if none was done to tell by."""
        done, left = step - self._start_step, max(0, self._steps - step)
        return (time.monotonic() - self._start) / max(1, done) * left if done or not left else None

    def step(
        self, values: dict[str, Any], scores: dict[str, float], first: dict[str, float]
    ) -> None:
        """Show one step's metrics, and the newest scores beside the first ones."""
        if not self._active:
            return
        self._step_s.append(values["step_s"])
        if math.isfinite(values["loss"]):
            self._losses.append(values["loss"])
        loss = mean(self._losses) if self._losses else math.nan
        resident = max(values["device_peak_bytes"], values["host_rss_bytes"]) / GIB
        shown = [
            f"loss {loss:.4f}",
            f"{values['tokens_per_s']:.0f} tokens/s",
            f"{resident:.2f} GiB",
        ]
        if scores:
            shown.append(f"dev {scores_text(scores, first)}")
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
            shown.insert(1, _rate(mean(self._step_s)))
            left = duration(self.left_s(step) or 0.0)
            self._print(f"step {step}/{self._steps}  {'  '.join(shown)}  {left} left")
            self._last_line = now

    def say(self, line: str, kind: str = "info") -> None:
        """Print one line, above the bar if there is one, and record it."""
        if self._active:
            self._print(line)
            self._record(kind, line)

    def warn(self, line: str) -> None:
        """Say a line that asks for a look."""
        self.say(line, "warning")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Return ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rate(step_s: float) -> str:
    """Return steps per second, or seconds per step where those are more than one."""
    if step_s > 1:
        return f"{step_s:.1f} s/step"
    return f"{1 / max(step_s, 1e-9):.{1 if step_s > 0.05 else 0}f} steps/s"


def scores_text(
    scores: Mapping[str, float],
    first: Mapping[str, float],
    errors: Mapping[str, float | None] | None = None,
) -> str:
    """Return scores, with standard errors and the change since the first ones where they exist."""
    shown = []
    for name, value in scores.items():
        error = (errors or {}).get(name)
        text = f"{name} {value:.4g}" + ("" if error is None else f" ± {error:.2g}")
        shown.append(text + (f" ({value - first[name]:+.3g})" if name in first else ""))
    return "  ".join(shown)
