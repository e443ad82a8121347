"""Timeline of steps: a trace for Chrome or Perfetto, and a picture of it.

Tracks, one row of the picture each: step, read, upload, a slice's catch-up and gather,
replay+perturb, forward of each cell, write-back, and the compute's waits for a block. On a GPU a
span on a stream is timed by the stream's own events.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from zo.errors import UserError

COLOURS = {
    "step": "#b0b7bf",
    "read": "#4878a8",
    "upload": "#6aa5c9",
    "catch-up": "#e5ae38",
    "gather": "#937860",
    "wait": "#c44e52",
    "replay+perturb": "#dd8452",
    "forward": "#55a868",
    "write-back": "#8172b3",
}
"""Tracks from top to bottom, and their colours; a track of cells has a row for each cell."""
TRANSFERS, COMPUTE = ("read", "upload", "gather", "write-back"), ("forward", "replay+perturb")
Span = tuple[str, str, float, float]
"""Track, name, start and stop in seconds."""


class Clock(Protocol):
    """The part of :class:`zo.streaming.device.Device` that times work on a stream."""

    def compute_stream(self) -> Any:
        """Return the stream that the calling thread computes on."""
        ...

    def record(self, stream: Any) -> Any:
        """Return an event at the end of what is queued on a stream; on a host, the time."""
        ...

    def synchronize(self, event: Any) -> None:
        """Block until an event has passed."""
        ...

    def elapsed_s(self, start: Any, stop: Any) -> float:
        """Return the seconds between two events."""
        ...


class Timeline:
    """Spans by track, recorded while ``active``."""

    def __init__(self, clock: Clock) -> None:
        """Begin empty and inactive; ``clock`` times spans on a stream."""
        self.active = False
        self._clock, self._origin_s = clock, time.perf_counter()
        self._spans: list[tuple[str, str, Any, Any]] = []
        self._origin = self._event()

    def _event(self) -> Any:
        return self._clock.record(self._clock.compute_stream())

    @contextmanager
    def span(self, track: str, name: str, on_stream: bool = True) -> Iterator[None]:
        """Record the time of the block, on the host or, ``on_stream``, on the compute stream."""
        if not self.active:
            yield
            return
        moment = self._event if on_stream else time.perf_counter
        start = moment()
        try:
            yield
        finally:
            self._spans.append((track, name, start, moment()))

    def spans(self) -> list[Span]:
        """Return track, name, start and stop of each span by start, in seconds since the first."""

        def seconds(moment: Any) -> float:
            if isinstance(moment, float):
                return moment - self._origin_s
            self._clock.synchronize(moment)
            return self._clock.elapsed_s(self._origin, moment)

        found = sorted(
            ((track, name, seconds(a), seconds(b)) for track, name, a, b in self._spans),
            key=lambda s: s[2],
        )
        first = found[0][2] if found else 0.0
        return [(track, name, a - first, b - first) for track, name, a, b in found]

    def save(self, trace: Path, picture: Path, title: str) -> None:
        """Write both files.

        Raises:
            UserError: a file cannot be written.
        """
        spans = self.spans()
        tracks = sorted({track for track, *_ in spans}, key=_row)
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": i, "name": "thread_name", "args": {"name": track}}
            for i, track in enumerate(tracks)
        ]
        events += [
            {
                "ph": "X",
                "pid": 1,
                "tid": tracks.index(track),
                "name": name,
                "ts": a * 1e6,
                "dur": (b - a) * 1e6,
            }
            for track, name, a, b in spans
        ]
        try:
            trace.write_text(
                json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8"
            )
            _draw(spans, tracks, picture, title)
        except OSError as error:
            raise UserError(
                f"cannot write {trace}: {error.strerror}; make room, or unset profile.steps"
            ) from error


def overlap(spans: Sequence[Span]) -> float | None:
    """Return the share of the transfers' time at which a forward or a replay ran, too.

    ``None`` where nothing was transferred.
    """
    compute = sorted((a, b) for track, _, a, b in spans if _kind(track) in COMPUTE)
    merged: list[tuple[float, float]] = []
    for a, b in compute:
        if merged and a <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], b)
        else:
            merged.append((a, b))
    transfers = [(a, b) for track, _, a, b in spans if _kind(track) in TRANSFERS]
    shared = sum(max(0.0, min(b, d) - max(a, c)) for a, b in transfers for c, d in merged)
    total = sum(b - a for a, b in transfers)
    return shared / total if total else None


def _kind(track: str) -> str:
    return track.partition(" ")[0]


def _row(track: str) -> tuple[int, int]:
    kind, _, number = track.partition(" ")
    return list(COLOURS).index(kind), int(number or 0)


def check_drawable() -> None:
    """Check that the picture can be drawn, before a run begins.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "profile.steps needs the extra report, which is not installed; "
            "pip install 'matplotlib>=3.10', or unset profile.steps"
        ) from error


def _draw(spans: list[Span], tracks: list[str], picture: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.4 + 0.45 * len(tracks)), layout="constrained")
    axes = figure.subplots()
    for i, track in enumerate(tracks):
        bars = [(a, max(b - a, 1e-6)) for found, _, a, b in spans if found == track]
        busy = sum(width for _, width in bars)
        axes.broken_barh(bars, (i - 0.38, 0.76), facecolors=COLOURS[_kind(track)])
        axes.text(1.005, i, f"{busy:.2f} s", transform=axes.get_yaxis_transform(), va="center")
    for track, name, a, b in spans:
        if track == "step":
            axes.axvline(a, color=COLOURS["step"], linewidth=0.8, zorder=0)
            axes.text((a + b) / 2, tracks.index(track), name, ha="center", va="center")
    if (share := overlap(spans)) is not None:
        title += f"; {share:.0%} of transfers while computing"
    axes.set_yticks(range(len(tracks)), tracks)
    axes.set_ylim(len(tracks) - 0.5, -0.5)
    axes.set_xlim(0, max((stop for *_, stop in spans), default=1.0))
    axes.set_xlabel("seconds")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(picture, dpi=110)
