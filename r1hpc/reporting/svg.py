"""Plots as inline SVG whose text keeps its size: a drawing that stretches, with HTML labels on top.

    plot = Plot("GPU-hours left", x=Scale(begin, end), y=Scale(0, 20000), height=260)
    plot.line(times, hours, "useful")
    plot.label(end, 1200, "1,200 left", "end")
    html = plot.render()

An SVG that scales as a whole has unreadable text on a telephone. Here only the shapes scale, in a box of
1000 x 1000 units with strokes in pixels (vector-effect: non-scaling-stroke), and text is placed by percent.
Colours are classes: the page's style sheet knows them, light and dark. All text is escaped here.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r1hpc.reporting.html import text as html_text

Tick = tuple[float, str]
_DAY = 86400.0
TIMES = "\N{MULTIPLICATION SIGN}"
_HOUR = 3600.0
_SPANS_S: tuple[float, ...] = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(hours * _HOUR for hours in (1, 2, 3, 4, 6, 12)),
    *(days * _DAY for days in (1, 2, 4, 7, 14, 30, 61, 91, 182, 365)),
)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as 0..1."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = math.log(low), math.log(high), math.log(max(value, 1e-12))
        return (here - low) / (high - low) if high > low else 0.5

    def ticks(self, count: int = 5) -> list[Tick]:
        """Round numbers with their labels."""
        values = _log_ticks(self) if self.log else _ticks(self, count)
        return [(value, short(value)) for value in values]

    def time_ticks(self, count: int = 5) -> list[Tick]:
        """Round local times with their labels."""
        step = next((s for s in _SPANS_S if (self.high - self.low) / s <= count), _SPANS_S[-1])
        zone = time.localtime(self.low).tm_gmtoff
        value = math.ceil((self.low + zone) / step) * step - zone
        found = []
        while value <= self.high:
            found.append((value, _time_label(value, step)))
            value += step
        return found


class Plot:
    """One plot. `label` says what it shows to those who cannot see it."""

    def __init__(self, label: str, x: Scale, y: Scale, height: int = 210) -> None:
        self._label = label
        self._x, self._y = x, y
        self._height = height
        self._shapes: list[str] = []
        self._texts: list[str] = []
        self._unit = self._x_unit = ""

    def axes(
        self,
        x_ticks: Sequence[Tick],
        y_ticks: Sequence[Tick],
        unit: str,
        x_unit: str = "",
        wide: bool = False,
    ) -> None:
        """Grid lines and tick labels; of a `wide` plot every other x label is left out on a telephone."""
        self._unit, self._x_unit = unit, x_unit
        for value, text in y_ticks:
            top = 100 * (1 - self._y.at(value))
            self._shapes.append(f'<path class="grid" d="M0 {10 * top:.1f}H1000"/>')
            self._texts.append(f'<span class="yt" style="top:{top:.2f}%">{html_text(text)}</span>')
        for i, (value, text) in enumerate(x_ticks):
            left = 100 * self._x.at(value)
            side = " s" if left < 3 else " e" if left > 97 else ""
            odd = " odd" if wide and i % 2 else ""
            self._texts.append(
                f'<span class="xt{side}{odd}" style="left:{left:.2f}%">{html_text(text)}</span>'
            )

    def line(self, xs: Sequence[float], ys: Sequence[float | None], css: str) -> None:
        """A line; None and NaN interrupt it."""
        points = [(x, y) for x, y in zip(xs, ys, strict=True)]
        path = "".join(self._polyline(part) for part in _parts(points))
        if path:
            self._shapes.append(f'<path class="line {css}" d="{path}"/>')

    def area(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> None:
        """The room between two lines."""
        if not xs:
            return
        there = list(zip(xs, high, strict=True))
        back = list(zip(xs, low, strict=True))[::-1]
        self._shapes.append(f'<path class="fill {css}" d="{self._polyline([*there, *back])}Z"/>')

    def bar(self, left: float, right: float, low: float, high: float, css: str, title: str = "") -> None:
        """A rectangle in data coordinates."""
        x0, x1 = sorted((1000 * self._x.at(left), 1000 * self._x.at(right)))
        y0, y1 = sorted((1000 - 1000 * self._y.at(low), 1000 - 1000 * self._y.at(high)))
        told = f"<title>{html_text(title)}</title>" if title else ""
        self._shapes.append(
            f'<rect class="fill {css}" x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0, 0.8):.1f}" '
            f'height="{max(y1 - y0, 0):.1f}">{told}</rect>'
        )

    def dot(self, x: float, y: float, css: str, title: str = "") -> None:
        """A point that stays round: a line of no length with round ends."""
        told = f"<title>{html_text(title)}</title>" if title else ""
        self._shapes.append(f'<path class="dot {css}" d="M{self._xy(x, y)}h.01">{told}</path>')

    def rule(self, x: float, css: str) -> None:
        """A line from bottom to top."""
        at = 1000 * self._x.at(x)
        self._shapes.append(f'<path class="line {css}" d="M{at:.1f} 0V1000"/>')

    def label(self, x: float, y: float, text: str, side: str = "end", css: str = "") -> None:
        """Text at a point; `side` start, middle or end is the part of the text that stands there."""
        left, top = 100 * self._x.at(x), 100 * (1 - self._y.at(y))
        self._texts.append(
            f'<span class="tx {side[0]} {css}" style="left:{left:.2f}%;top:{top:.2f}%">'
            f"{html_text(text)}</span>"
        )

    def render(self) -> str:
        """The HTML of the plot."""
        unit = f'<div class="unit">{html_text(self._unit)}</div>' if self._unit else ""
        below = f'<div class="xunit">{html_text(self._x_unit)}</div>' if self._x_unit else ""
        return (
            f'{unit}<div class="plot" style="height:{self._height}px">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
            f'aria-label="{html_text(self._label)}">{"".join(self._shapes)}</svg>{"".join(self._texts)}</div>{below}'
        )

    def _xy(self, x: float, y: float) -> str:
        return f"{1000 * self._x.at(x):.1f} {1000 - 1000 * self._y.at(y):.1f}"

    def _polyline(self, points: Sequence[tuple[float, float]]) -> str:
        if len(points) == 1:
            return f"M{self._xy(*points[0])}h1"
        return "M" + "L".join(self._xy(x, y) for x, y in points)


class Rows:
    """Horizontal bars under each other: a name, a drawing, a number."""

    def __init__(self, label: str, x: Scale) -> None:
        self._label, self._x = label, x
        self._rows: list[str] = []

    def add(self, name: str, shapes: Sequence[str], value: str, css: str = "") -> None:
        """One row; `shapes` come from `bar`, `tick` and `dot`."""
        self._rows.append(
            f'<span class="rn {css}">{html_text(name)}</span><span class="rv {css}">{html_text(value)}</span>'
            f'<svg class="rb {css}" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{html_text(f"{self._label}, {name}: {value}")}"><path class="grid" d="M0 50H1000"/>'
            f"{''.join(shapes)}</svg>"
        )

    def bar(self, left: float, right: float, css: str, title: str = "", thick: float = 1.0) -> str:
        x0, x1 = 1000 * self._x.at(left), 1000 * self._x.at(right)
        told = f"<title>{html_text(title)}</title>" if title else ""
        height = 100 * thick
        return (
            f'<rect class="fill {css}" x="{x0:.1f}" y="{50 - height / 2:.0f}" '
            f'width="{max(x1 - x0, 1.5):.1f}" height="{height:.0f}">{told}</rect>'
        )

    def tick(self, x: float, css: str, title: str = "") -> str:
        told = f"<title>{html_text(title)}</title>" if title else ""
        return f'<path class="line {css}" d="M{1000 * self._x.at(x):.1f} 5V95">{told}</path>'

    def dot(self, x: float, css: str, title: str = "") -> str:
        told = f"<title>{html_text(title)}</title>" if title else ""
        return f'<path class="dot {css}" d="M{1000 * self._x.at(x):.1f} 50h.01">{told}</path>'

    def render(self, ticks: Sequence[Tick] = (), unit: str = "", stacked: bool = False) -> str:
        """The HTML; with `ticks` an axis below. `stacked`: names above the bars, as always on a telephone."""
        axis = ""
        if ticks:
            spans = "".join(self._tick_text(value, text) for value, text in ticks)
            axis = f'<div class="ra">{spans}</div>'
        below = f'<div class="xunit low">{html_text(unit)}</div>' if unit else ""
        css = "rows stacked" if stacked else "rows"
        return f'<div class="{css}">{"".join(self._rows)}{axis}</div>{below}'

    def _tick_text(self, value: float, text: str) -> str:
        left = 100 * self._x.at(value)
        side = " s" if left < 3 else " e" if left > 97 else ""
        return f'<span class="xt{side}" style="left:{left:.2f}%">{html_text(text)}</span>'


def short(value: float) -> str:
    """A tick label: 0  0.25  40  12,000."""
    if value == 0:
        return "0"
    if abs(value) >= 10 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.6f}".rstrip("0") if abs(value) >= 0.001 else f"{value:.0e}"


def _time_label(value: float, step: float) -> str:
    """The hour, and at midnight the day; for long steps the month, for very short ones the second."""
    when = time.localtime(value)
    if step < 60:
        return time.strftime("%H:%M:%S", when)
    if step < _DAY and (when.tm_hour or when.tm_min):
        return time.strftime("%H:%M", when)
    return time.strftime("%d %b" if step < 180 * _DAY else "%b %Y", when).lstrip("0")


def _ticks(scale: Scale, count: int) -> list[float]:
    span = scale.high - scale.low
    if span <= 0:
        return [scale.low]
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= count)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(scale: Scale) -> list[float]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    every = max(1, math.ceil((last - first) / 5))
    return [
        10.0**n for n in range(first, last + 1, every) if scale.low <= 10.0**n * 1.001 <= scale.high * 1.002
    ]


def _parts(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """The pieces of a line between its gaps."""
    part: list[tuple[float, float]] = []
    for x, y in points:
        if y is None or not math.isfinite(y):
            if part:
                yield part
            part = []
        else:
            part.append((x, y))
    if part:
        yield part
