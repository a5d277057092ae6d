"""Charts as SVG inside a page: text is text, colours are the page's own (base.html.j2), for light and dark alike.

A chart with axes has no viewBox. Its box is the plotting area, places in it are percent, and labels hang over its
edges: so it is as wide as the page allows, while its text keeps its size. Only curves are stretched, in a box of their
own, whose strokes are not. Nothing has an id, so any number of charts can share a page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from markupsafe import escape as quoted

from trainer.metrics import fixed
from trainer.report.facts import ends
from trainer.report.markdown import plain
from trainer.report.predictions import FEW, Bin

MOST_POINTS = 400  # of a curve: more than a page has pixels to show
PALETTE = 6


@dataclass(frozen=True)
class Series:
    """A curve: `points` (x, y), and where `spread` is given, half the height of the band around each.

    Attributes:
        colour: number in the page's palette.
        dots: each point is marked.
        faint: it stands behind another one, and has no name of its own.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    faint: bool = False
    spread: Sequence[float] = ()


def tag(name: str, *inside: Any, **attributes: Any) -> Markup:
    """An element. Names of attributes: `class_` is class, `_` is -."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{quoted(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(str(part if isinstance(part, Markup) else quoted(plain(part))) for part in inside)
    return Markup(f"<{name}{given}>{inner}</{name}>")  # noqa: S704


def percent(value: float) -> str:
    return f"{value * 100:.2f}".rstrip("0").rstrip(".") + "%"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, the first not above `low` and the last not below `high`."""
    if not high > low:
        low, high = low - abs(low or 1) / 10, high + abs(high or 1) / 10
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def figure(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


@dataclass(frozen=True)
class Axes:
    """Where values lie, and the grid behind them."""

    x: list[float]
    y: list[float]

    def across(self, value: float) -> float:
        return (value - self.x[0]) / (self.x[-1] - self.x[0])

    def down(self, value: float) -> float:
        return 1 - (value - self.y[0]) / (self.y[-1] - self.y[0])

    def grid(self, x_title: str, shown: Callable[[float], str] = figure) -> list[Markup]:
        made = []
        for value in self.y:
            at = percent(self.down(value))
            made += [tag("line", class_="grid-line", x1="0", x2="100%", y1=at, y2=at),
                     tag("text", shown(value), class_="tick end", x="-8", y=at, dy="4")]  # fmt: skip
        for number, value in enumerate(self.x):
            place = "end" if number == len(self.x) - 1 else "middle" if number else "start"
            made.append(tag("text", shown(value), class_=f"tick {place}", x=percent(self.across(value)), y="100%",
                            dy="18"))  # fmt: skip
        return [*made, tag("text", x_title, class_="tick middle", x="50%", y="100%", dy="34")]

    def bar(self, left: float, right: float, height: float, title: str) -> Markup:
        top = self.down(height)
        place = {"x": percent(self.across(left)), "width": percent(self.across(right) - self.across(left))}
        return tag("rect", tag("title", title), class_="bar", y=percent(top), height=percent(1 - top), **place)


def chart(label: str, parts: Sequence[Markup], height: int, kind: str = "") -> Markup:
    return tag("svg", *parts, class_=f"plot {kind}".strip(), role="img", aria_label=label, style=f"height:{height}px")


def lines(
    series: Sequence[Series],
    label: str,
    height: int = 190,
    from_zero: bool = False,
    mark: tuple[float, str] | None = None,
) -> Markup | None:
    """Curves over steps; `mark` is a step to mark, and what it is. None where there is no point."""
    series = [own for own in series if own.points]
    if not series:
        return None
    xs = [x for own in series for x, _ in own.points]
    spreads = [own.spread or [0.0] * len(own.points) for own in series]
    ys = [y + sign * s for own, near in zip(series, spreads, strict=True)
          for (_, y), s in zip(own.points, near, strict=True) for sign in (-1, 1)]  # fmt: skip
    axes = Axes(steps(min(xs), max(xs)), ticks(0 if from_zero else min(ys), max(ys)))
    parts = axes.grid("Step")
    curves = [path for own, near in zip(series, spreads, strict=True) for path in _curve(axes, own, near)]
    parts.append(tag("svg", *curves, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%"))
    if mark is not None:
        parts += _mark(axes, *mark)
    for own in series:
        dots = own.points if own.dots or len(own.points) == 1 else ()
        parts += [
            tag("circle", tag("title", f"{own.name}: {figure(y)} at step {x:,.0f}"), class_=f"dot c{own.colour}", r="3",
                cx=percent(axes.across(x)), cy=percent(axes.down(y)))
            for x, y in (dots if len(dots) <= 60 else ())
        ]  # fmt: skip
    return chart(label, parts, height)


def steps(low: float, high: float) -> list[float]:
    """An axis that ends where the run does: round numbers in between, and not too near to its end."""
    if low == high:
        return [low - 1, low, low + 1]
    gap = (high - low) * 0.22
    return [low, *(t for t in ticks(low, high, 3) if low + gap < t < high - gap), high]


def _curve(axes: Axes, series: Series, spread: Sequence[float]) -> list[Markup]:
    every = math.ceil(len(series.points) / MOST_POINTS)
    kept = [i for i in range(len(series.points)) if i % every == 0 or i == len(series.points) - 1]

    def place(i: int, sign: int = 0) -> str:
        x, y = series.points[i]
        return f"{axes.across(x) * 1000:.1f} {axes.down(y + sign * spread[i]) * 1000:.1f}"

    made = []
    if series.spread:
        edge = [place(i, 1) for i in kept] + [place(i, -1) for i in reversed(kept)]
        made.append(tag("path", class_=f"band c{series.colour}", d=f"M{'L'.join(edge)}Z"))
    kind = f"line c{series.colour}{' faint' if series.faint else ''}"
    return [*made, tag("path", class_=kind, d=f"M{'L'.join(map(place, kept))}")]


def _mark(axes: Axes, at: float, text: str) -> list[Markup]:
    across = axes.across(at)
    if not 0 <= across <= 1:
        return []
    x, side, gap = percent(across), *(("start", 6) if across < 0.6 else ("end", -6))
    line = tag("line", class_="mark", x1=x, x2=x, y1="0", y2="100%")
    return [line, tag("text", text, class_=f"marked {side}", x=x, y="0", dx=gap, dy="12")] if text else [line]


def reliability(bins: Sequence[Bin], label: str, x_title: str) -> Markup:
    """Shares that are right over probabilities, with intervals. Bins of fewer than FEW pairs are hollow."""
    axes = Axes([0, 0.25, 0.5, 0.75, 1], [0, 0.25, 0.5, 0.75, 1])
    total, width = sum(own.count for own in bins), 0.1
    parts = axes.grid(x_title)
    parts += [axes.bar(own.number * width + 0.005, (own.number + 1) * width - 0.005, own.count / total,
                       f"{own.count:,} pairs") for own in bins]  # fmt: skip
    parts.append(tag("line", class_="ideal", x1="0", y1="100%", x2="100%", y2="0"))
    for own in bins:
        x, few = percent(axes.across(own.confidence)), own.count < FEW
        said = f"{own.accuracy:.1%} of {own.count:,} pairs are right, 95 % interval {own.low:.1%} to {own.high:.1%}"
        parts += [tag("line", class_="whisker", x1=x, x2=x, y1=percent(axes.down(own.low)),
                      y2=percent(axes.down(own.high))),
                  tag("circle", tag("title", said), class_=f"dot c0{' hollow' if few else ''}", r="4.5", cx=x,
                      cy=percent(axes.down(own.accuracy)))]  # fmt: skip
    return chart(label, parts, 300, "square")


def scatter(points: Sequence[tuple[float, float]], label: str, x_title: str) -> Markup:
    """Of predicted over true scores, with the line where both are the same."""
    both = [value for point in points for value in point]
    scale = ticks(min(both), max(both), 6)
    axes = Axes(scale, scale)
    parts = [*axes.grid(x_title), tag("line", class_="ideal", x1="0", y1="100%", x2="100%", y2="0")]
    parts += [tag("circle", class_="dot c0 thin", r="2.5", cx=percent(axes.across(x)), cy=percent(axes.down(y)))
              for x, y in points]  # fmt: skip
    return chart(label, parts, 300, "square")


def histogram(counts: Sequence[int], label: str, x_title: str) -> Markup:
    """counts[i] things have the value i; wide ranges are drawn in about 60 bars."""
    first = next((i for i, count in enumerate(counts) if count), 0)
    width = math.ceil((len(counts) - first) / 60)
    starts = list(range(first, len(counts), width))
    sums = [sum(counts[start : start + width]) for start in starts]
    axes = Axes(steps(first, starts[-1] + width), ticks(0, max(sums), 3))
    gap = 0.05 * width
    parts = axes.grid(x_title)
    parts += [axes.bar(start + gap, start + width - gap, height,
                       f"{start if width == 1 else f'{start} to {start + width - 1}'}: {height:,}")
              for start, height in zip(starts, sums, strict=True)]  # fmt: skip
    return chart(label, parts, 150)


def whisker(value: float, interval: tuple[float, float], scale: tuple[float, float]) -> Markup:
    """A score and its interval, for a table's cell; all cells of a column have one scale."""
    axes = Axes([*scale], [0, 1])
    left, right, at = (percent(axes.across(own)) for own in (*interval, value))
    parts = [tag("line", class_="grid-line", x1="0", x2="100%", y1="50%", y2="50%"),
             tag("line", class_="whisker", x1=left, x2=right, y1="50%", y2="50%"),
             tag("circle", class_="dot c0", r="4", cx=at, cy="50%")]  # fmt: skip
    return chart(f"{fixed(value)}, 95 % interval {ends(interval)}", parts, 16, "small")


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str], label: str) -> Markup:
    """A confusion matrix: rows are true classes, shades a cell's share of its row; hits and misses in two colours.

    Up to 12 classes have their numbers in the cells; of more, a cell says them under the pointer.
    """
    n = len(names)
    cell = next(size for most, size in ((3, 96), (6, 64), (12, 48), (24, 20), (math.inf, 12)) if n <= most)
    type_size = min(12, max(9, cell - 3))
    letter = type_size * 0.62
    shown = [plain(name, 22) for name in names]
    longest = max(map(len, shown)) * letter
    turned = longest > cell + 4
    left, top = longest + 12, (longest + 10 if turned else 20)
    parts = []
    for i, name in enumerate(shown):
        middle = (i + 0.5) * cell
        x, y = left + middle, top - 6
        parts += [tag("text", name, class_="name end", x=f"{left - 6:.1f}", y=f"{top + middle:.1f}", dy="4",
                      font_size=type_size),
                  tag("text", name, class_=f"name {'start' if turned else 'middle'}", x=f"{x:.1f}", y=f"{y:.1f}",
                      font_size=type_size, dx="0", dy=type_size * 0.35 if turned else 0,
                      transform=f"rotate(-90 {x:.1f} {y:.1f})" if turned else None)]  # fmt: skip
    for i, row in enumerate(counts):
        total = max(1, sum(row))
        for j, count in enumerate(row):
            where = (left + j * cell, top + i * cell)
            parts += _cell(count, count / total, where, cell, i == j, n, f"{names[i]} taken for {names[j]}")
    size = n * cell
    parts.append(tag("rect", class_="frame", x=f"{left:.1f}", y=f"{top:.1f}", width=size, height=size))
    width, height = math.ceil(left + size + 2), math.ceil(top + size + 2)
    return tag("svg", *parts, class_="matrix", role="img", aria_label=label, viewBox=f"0 0 {width} {height}",
               width=width, height=height)  # fmt: skip


def _cell(
    count: int, share: float, where: tuple[float, float], size: int, hit: bool, n: int, what: str
) -> list[Markup]:
    x, y = where
    made = []
    if count:
        made.append(tag("rect", tag("title", f"{what}: {count:,} ({share:.1%})"), class_="hit" if hit else "miss",
                        x=f"{x + 0.5:.1f}", y=f"{y + 0.5:.1f}", width=size - 1, height=size - 1,
                        fill_opacity=f"{0.08 + 0.5 * share:.3f}"))  # fmt: skip
    if n <= 12:
        middle = f"{x + size / 2:.1f}"
        made.append(tag("text", f"{count:,}", class_="count middle", x=middle, y=f"{y + size / 2:.1f}", dy="-1"))
        made.append(tag("text", f"{share:.1%}" if n <= 6 else f"{share:.0%}", class_="share middle", x=middle,
                        y=f"{y + size / 2:.1f}", dy="13"))  # fmt: skip
    return made


def thin(values: Sequence[Any], most: int) -> list[Any]:
    """Every so many of them that `most` are left."""
    every = math.ceil(len(values) / most) or 1
    return list(values[::every])


def legend(series: Sequence[Series]) -> list[tuple[str, int]]:
    """Names and colours, each once."""
    return list(dict.fromkeys((own.name, own.colour) for own in series if own.points and not own.faint))
