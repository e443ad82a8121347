"""``report.html``: a run as one page, made from the files of its folder alone.

python -m zo.observe.report DIR     makes the page of a finished run again
"""

import base64
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from zo.config.plain_yaml import read_yaml
from zo.errors import UserError, one_line
from zo.io.atomic import write_for_readers
from zo.observe.chart import Series, draw, short
from zo.observe.curve import Curve, Metrics
from zo.observe.progress import duration
from zo.observe.record import ENDS, EVENTS, STATUS
from zo.observe.tables import answers, class_rows, with_errors

REPORT, METRICS, CONFIG, TIMELINE = "report.html", "metrics.jsonl", "config.yaml", "timeline.png"
EVERY_S, COST_SHARE = 5.0, 0.005
"""Seconds between two pages at least, and the share of the time that making them may take."""
PICTURE_BYTES = 500_000
"""Size of a timeline that a page has room for."""
EVENTS_SHOWN, EVENTS_BYTES, TEXT_LENGTH = 200, 2**17, 2000
MARK = "<!-- Written by zo -->"
"""In the first line of a page, by which a file of somebody else's is told."""
GIB, MIB = 2**30, 2**20
MEMORY = {"host_rss_bytes": "host, now", "device_peak_bytes": "device, peak"}
TRAFFIC = {"read_bytes": "read", "written_bytes": "written", "gathered_bytes": "gathered"}
"""Metrics in bytes, and their names in a legend."""


@dataclass(frozen=True)
class Chart:
    """A figure of the page: the same series over steps and over time."""

    title: str
    series: Sequence[Series]
    by_step: Markup
    by_time: Markup


def _figure(title: str, curve: Curve, series: Sequence[Series], **form: Any) -> Chart:
    """Return a figure; ``form`` goes to :func:`zo.observe.chart.draw`."""
    seconds = [point.seconds for point in curve.points]
    unit, size = _unit_of_time(seconds[-1])
    return Chart(
        title,
        series,
        draw(f"{title} over steps", [p.step for p in curve.points], series, "step", **form),
        draw(f"{title} over time", [s / size for s in seconds], series, unit, **form),
    )


def _unit_of_time(seconds: float) -> tuple[str, float]:
    units = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
    return next((unit for unit in units if seconds >= 3 * unit[1]), units[-1])


def _charts(metrics: Metrics) -> Iterator[Chart]:
    """Yield the figures that a run has values for."""
    steps, scores = metrics.steps, metrics.scores
    if steps.points:
        yield _figure("Training loss", steps, _noisy(steps, "loss"))
    for name in metrics.last:
        form = "marked" if len(scores.points) < 50 else "line"
        found = Series("held-out data", scores.means(name), form, colour=2)
        yield _figure(f"Held-out {name}", scores, [found])
    if not steps.points:
        return
    if steps.has("largest"):
        series = [
            _plain(steps, "largest", "largest", 3),
            _plain(steps, "gradient", "root mean square"),
        ]
        yield _figure("Projected gradients", steps, series, floor=0.0)
    if steps.has("pair_spread"):
        series = [
            _plain(steps, "pair_resolution", "rounding", 3),
            _plain(steps, "pair_spread", "losses of a pair"),
        ]
        yield _figure("Spread of pairs", steps, series, is_log=True)
    if len(set(steps.means("lr"))) > 1:
        yield _figure("Learning rate", steps, [_plain(steps, "lr", "rate")], floor=0.0)
    yield _figure("Tokens per second", steps, _noisy(steps, "tokens_per_s"), floor=0.0)
    yield from _amounts(steps, "Memory, GiB", GIB, MEMORY)
    yield from _amounts(steps, "Traffic, MiB per step", MIB, TRAFFIC)
    if steps.has("wait_share"):
        title = "Waiting for blocks, % of a step"
        yield _figure(title, steps, _noisy(steps, "wait_share", 0.01), floor=0.0)


def _amounts(steps: Curve, title: str, unit: float, names: Mapping[str, str]) -> Iterator[Chart]:
    """Yield a figure of the amounts of bytes that a run has, if any."""
    series = [
        _plain(steps, name, label, colour, unit)
        for colour, (name, label) in enumerate(names.items(), 1)
        if steps.has(name)
    ]
    if series:
        yield _figure(title, steps, series, floor=0.0)


def _noisy(curve: Curve, name: str, unit: float = 1.0) -> list[Series]:
    """Return a step's values as points, and their moving average."""
    points = "each step" if curve.width == 1 else f"every {curve.width}th step"
    return [
        Series(points, _in(unit, curve.samples(name)), "points"),
        Series(f"mean of {curve.window} steps", _in(unit, curve.moving(name, curve.window))),
    ]


def _plain(curve: Curve, name: str, label: str, colour: int = 1, unit: float = 1.0) -> Series:
    return Series(label, _in(unit, curve.means(name)), colour=colour)


def _in(unit: float, values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else value / unit for value in values]


class Report:
    """The page of one run, made again while the run goes on."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Read the metrics so far; ``warn`` takes one line if a page cannot be written."""
        self._folder, self._warn = folder, warn
        self._metrics, self._due_s, self._has_failed = Metrics(folder / METRICS), 0.0, False
        self._attempt(self._metrics.follow)

    def refresh(self, now: bool = False) -> None:
        """Write the page if that is due, or ``now``; a page that fails never ends a run."""
        begun = time.monotonic()
        if not now and begun < self._due_s:
            return
        self._attempt(self.write)
        done = time.monotonic()
        self._due_s = done + max(EVERY_S, (done - begun) / COST_SHARE)

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # Whatever is in those files, it is not worth a run.
            if not self._has_failed:
                self._has_failed = True
                said = one_line(f"{type(error).__name__}: {error}", 200)
                self._warn(f"warning: {REPORT} cannot be written ({said}); the run goes on")

    def write(self) -> None:
        """Write the page.

        Raises:
            OSError: the disk refuses.
            UserError: there is a file of that name that zo did not write.
        """
        path = self._folder / REPORT
        if path.exists() and MARK not in _head(path):
            raise UserError(f"zo did not write {path}; move it elsewhere")
        write_for_readers(path, self.page().encode(errors="replace"))

    def page(self) -> str:
        """Return the page."""
        self._metrics.follow()
        status, folder = _json(self._folder / STATUS), self._folder
        picture, config = folder / TIMELINE, self._config.get("config")
        size = picture.stat().st_size if picture.exists() else 0
        newest = _events(folder / EVENTS)
        timeline = base64.b64encode(picture.read_bytes()) if 0 < size <= PICTURE_BYTES else b""
        return PAGES.get_template("report.html").render(
            mark=Markup(MARK),
            name=folder.resolve().name,
            status=status,
            is_live=status.get("phase") not in (None, *ENDS),
            tiles=list(_tiles(self._metrics, status)),
            charts=list(_charts(self._metrics)),
            timeline=timeline.decode(),
            events=[event for event in newest if event.get("kind") != "sample"],
            said=answers([*_events(folder / EVENTS, oldest=True), *newest]),
            scored=with_errors(self._metrics.last, self._metrics.details),
            examples=self._metrics.details.get("examples"),
            classes=class_rows(self._metrics.details),
            config=config if isinstance(config, dict) else {},
            facts=self._config,
            script=Markup(SCRIPT),
            script_hash=SCRIPT_HASH,
        )

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The content of ``config.yaml``, which is written once."""
        try:
            content = read_yaml((self._folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _head(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(200)


def _json(path: Path) -> dict[str, Any]:
    """Return a file's object; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _events(path: Path, oldest: bool = False) -> list[dict[str, Any]]:
    """Return the newest events, or the oldest, in their order."""
    try:
        with open(path, "rb") as file:
            file.seek(0 if oldest else max(0, path.stat().st_size - EVENTS_BYTES))
            lines = file.read(EVENTS_BYTES).split(b"\n")
    except OSError:
        return []
    lines = lines[:EVENTS_SHOWN] if oldest else lines[-EVENTS_SHOWN - 1 :]
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # Cut off at either end.
        if isinstance(event, dict):
            found.append(event)
    return found


def _tiles(metrics: Metrics, status: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and remark of the numbers that a page begins with."""
    steps = metrics.steps
    of, left = status.get("steps"), status.get("left_s")
    of = of if isinstance(of, int) else None
    step = status.get("step")
    step = step if isinstance(step, int) else steps.points[-1].step if steps.points else 0
    remark = f"{duration(left)} left" if isinstance(left, int | float) and step != of else ""
    yield "Steps", f"{step:,} of {of:,}" if of else f"{step:,}", remark
    losses = [loss for loss in steps.moving("loss", steps.window) if loss is not None]
    if losses:
        yield "Training loss", short(losses[-1]), f"mean of {steps.window} steps"
    for name, value in metrics.last.items():
        first = metrics.first.get(name, value)
        remark = f"from {short(first)}" if value != first else "held-out data"
        yield f"Held-out {name}", short(value), remark
    best = status.get("best")
    if isinstance(best, dict) and isinstance(top := best.get("value"), int | float):
        yield f"Best {best.get('metric')}", short(top), f"after step {best.get('step')}"
    if not steps.points:
        return
    pace = metrics.seconds / max(1, steps.count)
    yield "Training time", duration(metrics.seconds), f"{short(pace)} s each"
    speeds = [speed for speed in steps.moving("tokens_per_s", steps.window) if speed is not None]
    if speeds:
        yield "Tokens per second", short(speeds[-1]), f"mean of {steps.window} steps"
    peak = max(metrics.peaks.values(), default=0.0)
    yield "Memory", f"{peak / GIB:.3g} GiB", "most of any step"


PAGES = Environment(
    loader=PackageLoader("zo.observe", "page"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.policies["json.dumps_kwargs"] = {"sort_keys": False}
PAGES.filters |= {"short": short, "cut": lambda text: str(text)[:TEXT_LENGTH]}
SCRIPT = PAGES.get_template("report.js").render()
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""By which a page allows this script and no other."""


def main(arguments: list[str]) -> int:
    """Make the page of a folder again."""
    if len(arguments) != 1 or not (Path(arguments[0]) / CONFIG).exists():
        print("usage: python -m zo.observe.report DIR, the folder of a run", file=sys.stderr)
        return 2
    Report(Path(arguments[0]), print).write()
    print(Path(arguments[0]) / REPORT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
