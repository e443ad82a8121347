"""Charts of a report: SVG with a scale, grid lines and a few lines or points, and nothing else.

Colours are the page's own: a series has class ``c1``, ``c2``, ... and the style sheet the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 420, 208
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 24
"""Of the drawing in its own units, which a telephone shows as about one pixel each."""
SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Series:
    """Values over an axis that all series of a chart share."""

    name: str
    """For the legend."""
    values: Sequence[float | None]
    """Finite; ``None`` is not drawn."""
    form: str = "line"
    """``line``, ``points``, or ``marked``: a line with a point at each value."""
    colour: int = 1
    """A class of the style sheet, from 1."""

    @property
    def last(self) -> float | None:
        """The newest value."""
        return next((v for v in reversed(self.values) if v is not None), None)


def short(value: float | None) -> str:
    """Return a number in four digits or fewer, thousands as ``k``; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    for size, letter in SI:
        if abs(value) >= size * (1 if size > 1e3 else 10):
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``, low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999) * power
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to the drawing's units."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        start: float,
        stop: float,
        is_log: bool = False,
        pad: float = 0,
    ) -> "Scale":
        """Return the scale that fits values between ``start`` and ``stop``."""
        if is_log:
            values = [math.log10(value) for value in values]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
            room = abs(low) * 0.1 or 1.0
            low, high = low - room, high + room
        room = (high - low) * pad
        # A quantity that is never negative has no room below zero.
        low = 0.0 if low >= 0 > low - room and not is_log else low - room
        return cls(low, high + room, start, stop, is_log)

    def at(self, value: float) -> float:
        """Return the place of a value."""
        if self.is_log:
            value = math.log10(value)
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return round numbers on the scale; powers of ten on a logarithmic one that has two."""
        if self.is_log:
            whole = range(math.ceil(self.low), math.floor(self.high) + 1)
            if len(whole) > 1:
                return [10.0**n for n in whole[:: 1 + len(whole) // (count + 1)]]
            return ticks(10**self.low, 10**self.high, count)
        return ticks(self.low, self.high, count)


def draw(
    label: str,
    axis: Sequence[float],
    series: Sequence[Series],
    axis_name: str,
    floor: float | None = None,
    is_log: bool = False,
) -> Markup:
    """Return a chart as SVG.

    Args:
        label: what it shows, for those who do not see it.
        axis: the place of each value on the horizontal axis, rising.
        series: to draw, the first one below the others.
        axis_name: its unit.
        floor: a value that the vertical axis reaches down to, such as 0 for an amount.
        is_log: draw powers of ten at equal distances; values that are not above 0 are left out.
    """
    least = 0.0 if is_log else -math.inf
    drawn = [
        [(x, y) for x, y in zip(axis, one.values, strict=True) if y is not None and y > least]
        for one in series
    ]
    x = Scale.over([0.0, *axis[-1:]], LEFT, WIDTH - RIGHT)
    every = [y for points in drawn for _, y in points]
    every += [] if floor is None else [floor]
    y = Scale.over(every, HEIGHT - BOTTOM, TOP, is_log and bool(every), pad=0.06)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{Markup.escape(label)}" '
        f'data-x="{x.low} {x.high} {x.start} {x.stop}" '
        f'data-y="{y.low} {y.high} {y.start} {y.stop} {int(y.is_log)}">'
    ]
    for tick in y.ticks(5):
        at = f"{y.at(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".35em" class="end">{short(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    for tick in x.ticks(5):
        at = f"{x.at(tick):.1f}"
        parts.append(f'<text x="{at}" y="{bottom + 15}" class="mid">{short(tick)}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{bottom + 15}" class="end">{axis_name}</text>')
    for number, (one, points) in enumerate(zip(series, drawn, strict=True)):
        places = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points]
        parts.append(_path(one, number, places))
    # The script moves both to the pointer.
    parts.append(f'<path class="rule"/><text class="mid" y="{TOP + 2}"></text></svg>')
    return Markup("".join(parts))


def _path(one: Series, number: int, places: Sequence[str]) -> str:
    """Return the path of one series; a point is a line of no length with round ends.

    The script reads the values off the path that has the series' number.
    """
    if not places:
        return ""
    form, line = f'c{one.colour}" data-of="{number}', "L".join(places)
    points = f'd="M{"h0M".join(places)}h0"/>'
    if one.form == "points":
        size = 4 if len(places) < 150 else 2.4
        return f'<path class="points {form}" stroke-width="{size}" {points}'
    marks = f'<path class="marks c{one.colour}" {points}' if one.form == "marked" else ""
    return f'<path class="line {form}" d="M{line}h0"/>{marks}'
