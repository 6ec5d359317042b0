"""Small charts as inline SVG: widths in percent and text in pixels, so that they fit any screen; colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

from markupsafe import Markup, escape

__all__ = ["bars", "columns", "points", "ranges"]

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


def ranges(rows: Sequence[tuple[str, Sequence[float], str]], said: str) -> Markup:
    """A line a row from the first of its ascending values to the last, with a dot at each, over one axis from zero."""
    most = max(max(values) for _, values, _ in rows) * _MORE
    parts = []
    for at, (label, values, shown) in enumerate(rows):
        y = at * _ROW + 24
        xs = [100 * value / most for value in values]
        parts += [_text(0, y - 10, label), _text(100, y - 10, shown, "end", "soft")]
        parts.append(_rect(0, y - 3, 100, 6, "track"))
        parts.append(_rect(xs[0], y - 3, xs[-1] - xs[0], 6, "bar", f"{label}: {shown}"))
        parts += [f'<circle cx="{x:.2f}%" cy="{y}" r="4" class="dot"/>' for x in xs]
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


def points(rows: Sequence[tuple[str, float, float]], said: str, axes: tuple[str, str]) -> Markup:
    """Points over two logarithmic axes, numbered as they come.

    Args:
        rows: what each is, and its x and y, all above zero.
        said: what the chart shows.
        axes: what x and y are, with their unit.
    """
    base, high = 200, 170
    (left, right), (low, top) = _decades([x for _, x, _ in rows]), _decades([y for *_, y in rows])
    parts = [f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>']
    for at, (label, x, y) in enumerate(rows, 1):
        px = 3 + 94 * (log10(x) - left) / (right - left)
        py = base - 12 - (high - 12) * (log10(y) - low) / (top - low)
        parts.append(
            f'<circle cx="{px:.2f}%" cy="{py:.1f}" r="10" class="point"><title>{escape(label)}</title></circle>'
        )
        parts.append(_text(px, py + 4, str(at), "middle", "in"))
    parts += [_text(0, 14, f"{axes[1]}, from 1e{low} to 1e{top}", "start", "soft")]
    parts += [_text(100, base + 16, f"{axes[0]}, from 1e{left} to 1e{right}", "end", "soft")]
    return _svg(base + 22, said, parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around values above zero, never the same two."""
    low = floor(log10(min(values)))
    return low, max(low + 1, floor(log10(max(values))) + 1)
