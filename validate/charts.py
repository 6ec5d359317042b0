"""Small charts as inline SVG: widths in percent and text in pixels, so that they fit any screen; colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log10

from markupsafe import Markup, escape

__all__ = ["bars", "columns", "curve", "heights", "points", "ranges"]

_ROW = 36  # pixels of a row: a line of text, and what is drawn below it
_MORE = 1.05  # the axis goes a little beyond the largest value


def _svg(height: int, said: str, parts: Sequence[str]) -> Markup:
    """An image of ``height`` pixels; ``said`` is what a screen reader says of it."""
    return Markup(
        f'<svg class="chart" role="img" width="100%" height="{height}" aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.2f}%" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<rect x="{x:.2f}%" y="{y:g}" width="{max(0.0, width):.2f}%" height="{height:g}" class="{kind}">{title}</rect>'


def bars(rows: Sequence[tuple[str, float, str, str]], said: str, mark: float | None = None) -> Markup:
    """A bar a row, from zero.

    Args:
        rows: label, value, the value with its unit, and a class (``good``, ``bad`` or none).
        said: what the chart shows.
        mark: where a line is drawn over all of them.
    """
    most = max([value for _, value, *_ in rows] + [mark or 0.0, 1e-300]) * _MORE
    parts = []
    for at, (label, value, shown, kind) in enumerate(rows):
        y = at * _ROW
        parts += [_text(0, y + 14, label), _text(100, y + 14, shown, "end", "soft")]
        parts.append(_rect(0, y + 20, 100, 8, "track"))
        parts.append(_rect(0, y + 20, max(0.3, 100 * value / most), 8, f"bar {kind}", f"{label}: {shown}"))
        if mark is not None:
            x = 100 * mark / most
            parts.append(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{y + 17}" y2="{y + 31}" class="mark"/>')
    return _svg(len(rows) * _ROW, said, parts)


def ranges(rows: Sequence[tuple[str, Sequence[float], str]], said: str, mark: float | None = None) -> Markup:
    """A line a row from the first of its ascending values to the last, with a dot at each, over one axis from zero; ``mark``: see ``bars``."""
    most = max([max(values) for _, values, _ in rows] + [mark or 0.0]) * _MORE
    parts = []
    for at, (label, values, shown) in enumerate(rows):
        y = at * _ROW + 24
        xs = [100 * value / most for value in values]
        parts += [_text(0, y - 10, label), _text(100, y - 10, shown, "end", "soft")]
        parts.append(_rect(0, y - 3, 100, 6, "track"))
        parts.append(_rect(xs[0], y - 3, xs[-1] - xs[0], 6, "bar", f"{label}: {shown}"))
        parts += [f'<circle cx="{x:.2f}%" cy="{y}" r="4" class="dot"/>' for x in xs]
        if mark is not None:
            x = 100 * mark / most
            parts.append(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{y - 5}" y2="{y + 7}" class="mark"/>')
    return _svg(len(rows) * _ROW, said, parts)


def columns(edges: Sequence[float], counts: Sequence[int], said: str) -> Markup:
    """A histogram: a column a bin, its count above it, and the edges, which are powers of ten, below."""
    high, base, most = 110, 130, max(*counts, 1)
    wide = 100 / len(counts)
    parts = []
    for at, count in enumerate(counts):
        tall = max(1.5, high * count / most) if count else 0.0
        bin_ = f"{edges[at]:.0e} to {edges[at + 1]:.0e}: {count}"
        parts.append(_rect(at * wide + 0.4, base - tall, wide - 0.8, tall, "bar", bin_))
        if count:
            parts.append(_text((at + 0.5) * wide, base - tall - 4, f"{count:,}", "middle", "soft"))
    parts.append(f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>')
    step = 2
    for at in range(0, len(edges), step):
        anchor = "start" if at == 0 else "end" if at == len(edges) - 1 else "middle"
        parts.append(
            _text(100 * at / (len(edges) - 1), base + 16, f"1e{round(log10(edges[at]))}", anchor, "soft")
        )
    return _svg(base + 22, said, parts)


def points(
    rows: Sequence[tuple[str, float, float]],
    said: str,
    axes: tuple[tuple[str, Callable[[float], str]], tuple[str, Callable[[float], str]]],
    this: int | None = None,
) -> Markup:
    """Points over two logarithmic axes, numbered as they come.

    Args:
        rows: what each is, and its x and y, all above zero.
        said: what the chart shows.
        axes: what x and y are, and how their values are written.
        this: which of the points stands out.
    """
    base, high = 200, 170
    (x_name, x_shown), (y_name, y_shown) = axes
    (left, right), (low, top) = _span([x for _, x, _ in rows]), _span([y for *_, y in rows])
    parts = [f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>']
    order = sorted(
        range(len(rows)), key=lambda at: at == this
    )  # the one that stands out lies above the others
    for at in order:
        label, x, y = rows[at]
        px = 4 + 92 * (log10(x) - left) / (right - left)
        py = base - 16 - (high - 16) * (log10(y) - low) / (top - low)
        kind = "point" if this in (at, None) else "point other"
        parts.append(
            f'<circle cx="{px:.2f}%" cy="{py:.1f}" r="10" class="{kind}"><title>{escape(label)}</title></circle>'
        )
        parts.append(_text(px, py + 4, str(at + 1), "middle", "in"))
    xs, ys = [x for _, x, _ in rows], [y for *_, y in rows]
    parts += [_text(0, 12, f"↑ {y_name}: {y_shown(min(ys))} … {y_shown(max(ys))}", "start", "soft")]
    parts += [_text(100, base + 16, f"{x_name}: {x_shown(min(xs))} … {x_shown(max(xs))} →", "end", "soft")]
    return _svg(base + 22, said, parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Decimal logarithms around values above zero, never the same two."""
    low, top = log10(min(values)), log10(max(values))
    return (low, top) if top - low > 1e-9 else (low - 1, top + 1)


def heights(rows: Sequence[tuple[str, float, str, str]], said: str) -> Markup:
    """The rows of ``bars`` as columns side by side, for many of them: the first, the last and the tallest have their words."""
    base, high = 140, 108
    most = max([value for _, value, *_ in rows] + [1e-300])
    wide = 100 / len(rows)
    tallest = max(range(len(rows)), key=lambda at: rows[at][1])
    parts = [_text(wide * (tallest + 0.5), 14, rows[tallest][2], _anchor(tallest, len(rows)), "soft")]
    for at, (label, value, shown, kind) in enumerate(rows):
        tall = max(1.0, high * value / most)
        gap = min(0.4, wide / 8)
        parts.append(
            _rect(at * wide + gap, base - tall, wide - 2 * gap, tall, f"bar {kind}", f"{label}: {shown}")
        )
    parts.append(f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>')
    parts += [
        _text(0, base + 16, rows[0][0], "start", "soft"),
        _text(100, base + 16, rows[-1][0], "end", "soft"),
    ]
    if 2 < tallest < len(rows) - 3:
        parts.append(_text(wide * (tallest + 0.5), base + 16, rows[tallest][0], "middle", "soft"))
    return _svg(base + 22, said, parts)


def _anchor(at: int, count: int) -> str:
    return "start" if at < count / 8 else "end" if at > count * 7 / 8 else "middle"


def curve(
    points: Sequence[Sequence[float]],
    spans: Sequence[tuple[str, float, float]],
    said: str,
    shown: tuple[Callable[[float], str], Callable[[float], str]],
) -> Markup:
    """An area under points over time, both axes from zero.

    Args:
        points: (x, y), x ascending.
        spans: names of parts of the axis with their begin and end, which are drawn in turns; those with room are named.
        said: what the chart shows. shown: how x and y are written.
    """
    base, high = 152, 112
    last = max([x for x, _ in points] + [end for *_, end in spans] + [1e-9])
    most = max([y for _, y in points] + [1e-300])
    parts = []
    for at, (name, begin, end) in enumerate(spans):
        x, wide = 100 * begin / last, 100 * (end - begin) / last
        if at % 2 == 0:
            parts.append(_rect(x, base - high, wide, high, "track", name))
        if wide > 3 + 2.2 * len(name):  # a letter takes about 2 % of a phone's width
            parts.append(_text(x + wide / 2, base - high - 6, name, "middle", "soft"))
    corners = " ".join(f"{1000 * x / last:.1f},{100 - 100 * y / most:.2f}" for x, y in points)
    first, final = (1000 * points[at][0] / last for at in (0, -1))
    parts.append(
        f'<svg x="0" y="{base - high}" width="100%" height="{high}" viewBox="0 0 1000 100" preserveAspectRatio="none">'
        f'<polygon points="{first:.1f},100 {corners} {final:.1f},100" class="bar area"/></svg>'
    )
    parts.append(f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>')
    parts += [_text(0, 14, f"↑ 0 … {shown[1](most)}", "start", "soft")]
    parts += [
        _text(0, base + 16, "0 s", "start", "soft"),
        _text(100, base + 16, shown[0](last), "end", "soft"),
    ]
    return _svg(base + 22, said, parts)
