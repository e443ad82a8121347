"""Metrics of a run of any length as curves of at most ``POINTS`` points, read as they are written.

A point is the mean of so many steps in a row as that takes: when there are too many, each two that
are neighbours become one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from zo.observe.history import DETAILS, read_line

POINTS = 600
"""Points of a curve at most, and half of it at least once a run has more steps."""


@dataclass
class Point:
    """Some steps in a row."""

    step: int
    """The last of them."""
    seconds: float
    """Time of all steps up to it."""
    sums: dict[str, tuple[float, int]]
    """Sum and number of the finite values, by name."""
    sample: dict[str, float]
    """The values of one of the steps."""

    def join(self, other: "Point") -> "Point":
        """Return this point and the one that follows as one."""
        sums = dict(self.sums)
        for name, (total, count) in other.sums.items():
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + total, before[1] + count
        return Point(other.step, other.seconds, sums, self.sample or other.sample)


@dataclass
class Curve:
    """Values of any number of steps, as at most ``POINTS`` points."""

    points: list[Point] = field(default_factory=list)
    width: int = 1
    """Steps that a point has."""
    count: int = 0
    """Steps in all."""
    _begun: int = 0
    """Steps that the last point has."""

    def add(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Add a step that follows all others."""
        self.count += 1
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        new = Point(step, seconds, {name: (value, 1) for name, value in finite.items()}, finite)
        if self.points and self._begun < self.width:
            self.points[-1], self._begun = self.points[-1].join(new), self._begun + 1
            return
        self.points.append(new)
        self._begun = 1
        if len(self.points) > POINTS:
            # The last one has just begun, and the number of those before it is even.
            pairs = zip(self.points[:-1:2], self.points[1::2], strict=True)
            self.points = [*(first.join(second) for first, second in pairs), self.points[-1]]
            self.width *= 2

    def means(self, name: str) -> list[float | None]:
        """Return the mean of each point."""
        found = (point.sums.get(name) for point in self.points)
        return [None if one is None else one[0] / one[1] for one in found]

    def samples(self, name: str) -> list[float | None]:
        """Return one step's value of each point."""
        return [point.sample.get(name) for point in self.points]

    def moving(self, name: str, steps: int) -> list[float | None]:
        """Return at each point the mean over that many steps up to it."""
        reach = max(1, round(steps / self.width))
        pairs = [point.sums.get(name, (0.0, 0)) for point in self.points]
        totals = [0.0, *accumulate(total for total, _ in pairs)]
        counts = [0, *accumulate(count for _, count in pairs)]
        ends = [(max(0, i - reach), i) for i in range(1, len(totals))]
        return [
            (totals[b] - totals[a]) / (counts[b] - counts[a]) if counts[b] > counts[a] else None
            for a, b in ends
        ]

    @property
    def window(self) -> int:
        """Steps whose mean shows a trend: enough for the noise, and few enough to see it early."""
        return max(5, self.count // 25, self.width)

    def has(self, name: str) -> bool:
        """Return true if some step has a value other than 0."""
        return any(point.sums.get(name, (0.0, 0))[0] for point in self.points)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what the charts show of one step's line."""
    found = {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    listed = values.get("scalars")
    listed = listed if isinstance(listed, list) else []
    scalars = [abs(float(s)) for s in listed if isinstance(s, int | float)]
    if scalars:
        found["gradient"] = math.sqrt(mean(s * s for s in scalars))
        found["largest"] = max(scalars)
    return found


class Metrics:
    """``metrics.jsonl``, followed as it grows."""

    def __init__(self, path: Path) -> None:
        """Begin before the first line."""
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self.steps, self.scores = Curve(), Curve()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        """The first scores and the newest."""
        self.details: dict[str, Any] = {}
        """Of the newest scores."""
        self.seconds = 0.0
        self.peaks: dict[str, float] = {}
        """The largest memory of any step, in bytes by name."""

    def follow(self) -> None:
        """Read the lines that are new; all of them, if the file is shorter than it was."""
        if not self._path.exists():
            return
        if self._path.stat().st_size < self._offset:
            self._begin()
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # It is being written.
                self._offset += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        if (values := read_line(line)) is None:
            return
        if isinstance(scores := values.get("eval"), dict):
            self.last = _numbers(scores)
            details = scores.get(DETAILS)
            self.details = details if isinstance(details, dict) else {}
            self.first = self.first or self.last
            self.scores.add(values["step"], self.seconds, self.last)
        else:
            numbers = _numbers(values)
            self.seconds += numbers.get("step_s", 0.0)
            self.steps.add(values["step"], self.seconds, numbers)
            for name in ("device_peak_bytes", "host_rss_bytes"):
                self.peaks[name] = max(self.peaks.get(name, 0.0), numbers.get(name, 0.0))
