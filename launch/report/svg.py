"""Small inline SVG charts for the report: a line chart and a heat map. The page's style sheet gives the colours."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 42


def lines(
    series: Mapping[str, Points],
    *,
    x: str = "step",
    unit: str = "",
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    smoothed: int = 0,
) -> str:
    """A line chart. Its x axis starts at 0.

    series  name -> points (x, y) in ascending x; points whose y is not finite are left out
    x       label of the x axis
    unit    written after every number of the y axis
    log     use a logarithmic y axis if every value is positive; a line below the chart says so
    marks   (x, what happened there), as vertical lines
    smoothed  number of points that each point is a mean of; a line below the chart says so
    """
    clean = {n: [(float(a), float(b)) for a, b in p if math.isfinite(b)] for n, p in series.items()}
    clean = {n: p for n, p in clean.items() if p}
    if not clean:
        return '<p class="empty">no values yet</p>'
    xs = [a for p in clean.values() for a, _ in p]
    ys = [b for p in clean.values() for _, b in p]
    log = log and min(ys) > 0
    low, high = _limits(ys, log)
    left, right = min(0.0, *xs), max(max(xs), min(xs) + 1e-9)

    def px(a: float) -> float:
        return LEFT + (a - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def py(b: float) -> float:
        b = math.log10(b) if log else b
        return TOP + (high - b) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in _ticks(low, high, log):
        y = py(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}{html.escape(unit)}</text>')
    for tick in _ticks(left, right, False):
        out.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{_short(tick)}</text>')
    out.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{html.escape(x)}</text>')
    for at, what in marks:
        if left <= at <= right:
            out.append(
                f'<line class="mark" x1="{px(at):.1f}" x2="{px(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{html.escape(what)}</title></line>"
            )
    for i, (name, points) in enumerate(clean.items()):
        thin = _thinned(points)
        path = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in thin)
        if len(thin) == 1:
            out.append(f'<circle class="s{i % 10} dot" cx="{px(thin[0][0]):.1f}" cy="{py(thin[0][1]):.1f}" r="3"/>')
        out.append(f'<polyline class="s{i % 10}" points="{path}"><title>{html.escape(name)}</title></polyline>')
    out.append("</svg>")
    if len(clean) > 1:
        keys = "".join(f'<span class="s{i % 10}">{html.escape(n)}</span>' for i, n in enumerate(clean))
        out.append(f'<p class="legend">{keys}</p>')
    notes = [f"mean of {smoothed} points"] * (smoothed > 1) + ["logarithmic axis"] * log
    if notes:
        out.append(f'<p class="note">{", ".join(notes)}</p>')
    return "".join(out)


def heat(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A heat map of shares in [0, 1]. The largest share has the full colour. Each cell shows its share in percent."""
    cell_w, cell_h, label = max(34, min(64, 640 // max(1, len(columns)))), 22, 190
    width, height = label + cell_w * len(columns) + 4, 22 + cell_h * len(rows) + 4
    top = max((v for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0
    out = [f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img">']
    for j, name in enumerate(columns):
        out.append(f'<text x="{label + (j + 0.5) * cell_w}" y="14" text-anchor="middle">{html.escape(name)}</text>')
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = 22 + i * cell_h
        out.append(f'<text x="{label - 6}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>')
        for j, value in enumerate(row):
            share = value / top if math.isfinite(value) else 0.0
            out.append(
                f'<rect class="cell" x="{label + j * cell_w}" y="{y}" width="{cell_w - 2}" height="{cell_h - 2}" '
                f'style="fill-opacity:{share:.3f}">'
                f"<title>{html.escape(name)}, {html.escape(columns[j])}: {value:.3f}</title></rect>"
                f'<text class="{"on" if share > 0.6 else ""}" x="{label + (j + 0.5) * cell_w - 1}" y="{y + 14}" '
                f'text-anchor="middle">{100 * value:.0f}</text>'
            )
    return "".join([*out, "</svg>"])


def _thinned(points: Points, most: int = 600) -> Points:
    """At most about `most` points: of each group in turn the lowest and the highest, so that a spike stays."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        ends = {min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _limits(ys: Sequence[float], log: bool) -> tuple[float, float]:
    if log:
        low, high = math.log10(min(ys)), math.log10(max(ys))
    else:
        low, high = min(ys), max(ys)
        if low > 0 and low < 0.5 * high:
            low = 0.0
    if high - low <= 1e-9 * abs(high):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    pad = 0.04 * (high - low)
    return (low if low == 0 else low - pad), high + pad


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        whole = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
        if len(whole) >= 2:
            return whole
        round_ones = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        shown = [value for value in round_ones if low <= math.log10(value) <= high]
        return shown if len(shown) >= 2 else [10 ** (low + (high - low) * f) for f in (0.1, 0.5, 0.9)]
    raw = (high - low) / 5
    base = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


SMOOTHED = 25  # points in a running mean


def smoothing(points: int) -> int:
    """The number of points that `smooth` takes the mean of, for so many points."""
    return SMOOTHED if points >= 2 * SMOOTHED else 1


def smooth(points: Points) -> list[tuple[float, float]]:
    """A running mean over `SMOOTHED` points; the points themselves if there are fewer than twice as many."""
    window = smoothing(len(points))
    if window == 1:
        return list(points)
    out, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        out.append((x, total / min(i + 1, window)))  # at the start, of the points that there are
    return out
