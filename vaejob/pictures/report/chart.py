"""Charts as inline SVG, each with its words and, folded away, its numbers."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vaejob.pictures.report.markup import Html, folded, joined, table, tag

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 24, 16, 38
COLORS = 8
"""Colours and dashes that the page's style knows."""
SETTLED_SHARE = 0.05
"""What lies above the frame of a falling curve: points of this first part of it, if they are higher than all after it."""
MOST_MARKERS = 24
FEW_POINTS = 16
"""So many at most have a dot each: what was measured, apart from the line between."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line; a y that is not finite leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    """Half the height of a band around the line."""
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one axis."""

    title: str
    unit: str
    series: Sequence[Series]
    x_title: str = "images seen"
    form: Literal["line", "points", "steps"] = "line"
    """points: each point has a dot of its own; steps: bars without gaps, around each x."""
    note: str = ""
    markers: Sequence[tuple[float, str]] = ()
    """Vertical lines at an x, and what they are."""
    from_zero: bool = False
    digits: int = 4
    """Significant digits of the table, at least."""


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at_x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def figure(chart: Chart, *, key: str) -> Html:
    """The chart with its title, legend, words for who does not see it, and its numbers; key is unique on the page."""
    series = [line for line in chart.series if any(map(math.isfinite, line.y))]
    title = tag("figcaption", tag("strong", chart.title), tag("span", chart.unit, class_="unit"))
    if not series:
        return tag("figure", title, tag("p", "No finite value was reported.", class_="note"), class_="chart")
    frame, above = _frame(chart, series)
    drawn = [_grid(frame, chart), _markers(frame, chart.markers)]
    inside = joined(part for line in series for part in _line(frame, line, chart.form))
    clip = tag("clipPath", tag("rect", x=LEFT, y=TOP - 6, width=WIDTH - LEFT - RIGHT + 6, height=HEIGHT - TOP - BOTTOM + 6), id=f"{key}-frame")  # fmt: skip
    drawn += [tag("defs", clip), tag("g", inside, clip_path=f"url(#{key}-frame)"), _axis_title(chart)]
    svg = tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=in_words(chart, series))
    notes = [chart.note] if chart.note else []
    if above:
        notes.append(f"{above} early point{'s lie' if above > 1 else ' lies'} above the frame; the table has all.")
    said = [tag("p", " ".join(notes), class_="note")] if notes else []
    return tag("figure", title, _legend(series, chart), svg, *said, folded("Numbers", _numbers(chart)), class_="chart")


def in_words(chart: Chart, series: Sequence[Series]) -> str:
    """What the chart shows, for who does not see it."""
    lines = []
    for line in series:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        (first_x, first), (last_x, last) = points[0], points[-1]
        low, high = min(y for _, y in points), max(y for _, y in points)
        ends = f"from {short(first)} at {short(first_x)} to {short(last)} at {short(last_x)}"
        lines.append(f"{line.name}: {ends}, between {short(low)} and {short(high)}, {len(points)} points")
    return f"{chart.title}, {chart.unit}, over {chart.x_title}. " + "; ".join(lines) + "."


def short(value: float) -> str:
    """At most four significant digits, with k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, *, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _frame(chart: Chart, series: Sequence[Series]) -> tuple[_Frame, int]:
    """The frame, and how many points lie above it."""
    points = [
        (x, y, e) for line in series for x, y, e in zip(line.x, line.y, line.error or [0.0] * len(line.y), strict=True)
        if math.isfinite(y)
    ]  # fmt: skip
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    if chart.x_title == "images seen":
        left = 0.0
    settled = [point for point in points if point[0] >= left + SETTLED_SHARE * (right - left)]
    shown = settled if len(settled) >= 8 and chart.form == "line" else points
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in shown)
    if chart.from_zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        margin = abs(high) * 0.1 or 1.0
        low, high = (low if chart.from_zero and low == 0 else low - margin), high + margin
    room = (high - low) * 0.06
    low = low if chart.from_zero and low == 0 else low - room
    if right == left:
        left, right = left - (abs(left) * 0.1 or 1.0), right + (abs(right) * 0.1 or 1.0)
    return _Frame((left, right), (low, high + room)), sum(y > high + room for _, y, _ in points)


def _grid(frame: _Frame, chart: Chart) -> Html:
    parts = []
    y_ticks = ticks(*frame.y, about=4)
    for value, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        y = _n(frame.at_y(value))
        parts.append(tag("path", d=f"M{LEFT} {y}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(tag("text", text, x=LEFT - 7, y=y, dy="0.32em", text_anchor="end"))
    x_ticks = ticks(*frame.x, about=5)
    for value, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
        x = _n(frame.at_x(value))
        parts.append(tag("path", d=f"M{x} {HEIGHT - BOTTOM}v4", class_="axis"))
        parts.append(tag("text", text, x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts.append(tag("path", d=f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
    return joined(parts)


def _tick_texts(values: Sequence[float]) -> list[str]:
    """All with the same unit and decimals."""
    largest = max((abs(value) for value in values), default=0.0)
    unit, size = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= max(s, 1e4)), ("", 1.0))
    step = min((b - a for a, b in itertools.pairwise(values)), default=largest or 1.0) / size
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [f"{value / size:.{decimals}f}".replace("-", "\u2212") + (unit if value else "") for value in values]


def _axis_title(chart: Chart) -> Html:
    return tag("text", chart.x_title, x=WIDTH - RIGHT, y=HEIGHT - 5, text_anchor="end", class_="title")


def _markers(frame: _Frame, markers: Sequence[tuple[float, str]]) -> Html:
    parts = []
    for x, text in markers[:MOST_MARKERS]:
        if frame.x[0] <= x <= frame.x[1]:
            at = _n(frame.at_x(x))
            parts.append(tag("path", tag("title", text), d=f"M{at} {TOP - 6}V{HEIGHT - BOTTOM}", class_="marker"))
    return joined(parts)


def _line(frame: _Frame, line: Series, form: str) -> Iterable[Html]:
    class_ = f"line c{line.color % COLORS}"
    points = list(zip(line.x, line.y, line.error or [0.0] * len(line.y), strict=True))
    for part in _without_gaps(points):
        if form == "steps":
            yield tag("path", d=_steps(frame, part), class_=f"{class_} area")
            continue
        if line.error is not None:
            yield tag("path", d=_band(frame, part), class_=f"band c{line.color % COLORS}")
        middle = [(x, y) for x, y, _ in part]
        yield tag("path", d=_path(frame, middle), class_=class_)
        if form == "points" or len(points) <= FEW_POINTS or len(part) == 1:
            for x, y in middle:
                yield tag(
                    "circle", cx=_n(frame.at_x(x)), cy=_n(frame.at_y(y)), r=2.6, class_=f"dot c{line.color % COLORS}"
                )


def _without_gaps(points: Sequence[tuple[float, float, float]]) -> Iterable[list[tuple[float, float, float]]]:
    part: list[tuple[float, float, float]] = []
    for point in points:
        if math.isfinite(point[1]):
            part.append(point)
        elif part:
            yield part
            part = []
    if part:
        yield part


def _path(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(frame.at_x(x))} {_n(frame.at_y(y))}" for x, y in points)


def _band(frame: _Frame, points: Sequence[tuple[float, float, float]]) -> str:
    upper = [(x, y + e) for x, y, e in points]
    lower = [(x, y - e) for x, y, e in reversed(points)]
    return _path(frame, upper + lower) + "Z"


def _steps(frame: _Frame, points: Sequence[tuple[float, float, float]]) -> str:
    half = (points[1][0] - points[0][0]) / 2 if len(points) > 1 else 0.5
    corners = [(x + side * half, y) for x, y, _ in points for side in (-1, 1)]
    floor = max(frame.y[0], 0.0)
    return _path(frame, [(corners[0][0], floor), *corners, (corners[-1][0], floor)])


def _legend(series: Sequence[Series], chart: Chart) -> Html:
    """Each line's name beside its colour and dash, and its last value."""
    items = []
    for line in series:
        swatch = tag("svg", tag("path", d="M0 5H22", class_=f"line c{line.color % COLORS}"), viewBox="0 0 22 10", class_="swatch", aria_hidden="true")  # fmt: skip
        last = (
            ""
            if chart.form == "steps"
            else short(next(y for y in reversed(line.y) if math.isfinite(y))).replace("-", "\u2212")
        )
        items.append(tag("li", swatch, line.name, tag("b", last)))
    return tag("ul", *items, class_="legend")


def _numbers(chart: Chart) -> Html:
    """Points of all lines by their x."""
    columns: list[dict[float, str]] = []
    headers = [f">{chart.x_title}"]
    for line in chart.series:
        headers.append(f">{line.name}")
        columns.append({x: _full(y, chart.digits) for x, y in zip(line.x, line.y, strict=True)})
        if line.error is not None:
            headers.append(">\u00b1 s.e.")
            columns.append({x: _full(e, chart.digits) for x, e in zip(line.x, line.error, strict=True)})
    places = sorted({x for line in chart.series for x in line.x})
    rows = [[_place(x), *(column.get(x, "") for column in columns)] for x in places]
    return table(f"{chart.title}, {chart.unit}", headers, rows)


def _place(x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:.5g}"


def _full(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(decimals, 8)}f}"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
