"""Speed for people: the tables of ``tapeout bench``, and the section of ``report.html`` with its charts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from tapeout.validate.charts import _svg, _text, bars, ranges
from tapeout.validate.measuring import SCENARIOS
from tapeout.validate.page_parts import size
from tapeout.validate.report import GateResult, number

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "duration",
    "gates_table",
    "limit_words",
    "percentile_lines",
    "percentiles",
    "scenarios",
    "speed_charts",
    "speed_tables",
]

_HIGH, _TOP = 150, 26  # pixels of a chart's plane, and above it


def duration(value: float | None) -> str:
    """Seconds for people; a dash for none."""
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def percentiles(found: Mapping[str, Any]) -> str:
    """``p50 1.2 ms (1.1 … 1.3)``, one after another; an end that no sample bounds is a dash."""
    return ", ".join(_told(found))


def percentile_lines(found: Mapping[str, Any]) -> Markup:
    """The same for the page, a line each."""
    return Markup("<br>").join(Markup('<span class="one">{}</span>').format(each) for each in _told(found))


def _told(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} –" if each is None else f"{name} {duration(each['value'])} ({_interval(each)})"
        for name, each in _in_order(found)
    ]


def _interval(found: Mapping[str, Any]) -> str:
    """``1.1 … 1.3 ms``: both ends, with one unit where it is the same."""
    low, high = duration(found["low"]), duration(found["high"])
    number_, _, unit = low.partition(" ")
    return f"{number_ if unit and high.endswith(f' {unit}') else low} … {high}"


def _in_order(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The percentiles among what ``summary`` gives, the lowest first."""
    return sorted(
        ((name, each) for name, each in found.items() if name.startswith("p")),
        key=lambda each: int(each[0][1:]),
    )


def scenarios(figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Those that were measured, in the order of their measuring."""
    found = figures.get("scenarios", {})
    return [(name, found[name]) for name in SCENARIOS if name in found]


def gates_table(gates: Sequence[GateResult]) -> list[Table]:
    """The limits that were given, if there are any, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    if not gates:
        return []
    table = Table("gate", "verdict", "measured", "limit", "what")
    styles = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    for gate in gates:
        told = Text(gate.status, styles[gate.status])
        table.add_row(
            gate.name, told, number(gate.value), number(gate.limit), f"{gate.metric}: {gate.reason}"
        )
    return [table]


def speed_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Scenarios, sweeps, the roofline, and what disturbed or was skipped, for the terminal."""
    from rich.table import Table

    found = []
    if measured := scenarios(figures):
        table = Table("scenario", "requests", "first token", "time per output token", "tokens/s", "J/token")
        for name, each in measured:
            joules = each["joules_per_token"]
            table.add_row(
                name,
                f"{each['samples']} after {each['warm_up']}",
                _lines(each.get("first_token")),
                _lines(each.get("token")),
                f"{each['tokens_per_s']:.1f}",
                "–" if joules is None else f"{joules:.3g}",
            )
        table.caption = "\n".join(disturbances(figures))
        table.caption_justify = "left"
        found.append(table)
    if sweep := figures.get("server_sweep"):
        table = Table("load", "requests/s", "requests", "first token", "time per output token", "tokens/s")
        for row in sweep:
            table.add_row(
                f"{row['load']:g}",
                f"{row['arrivals_per_s']:.3g}",
                f"{row['samples']} after {row['warm_up']}",
                _lines(row["first_token"]),
                _lines(row["token"]),
                f"{row['tokens_per_s']:.1f}",
            )
        table.title, table.title_justify = "server", "left"
        table.caption = limit_words(figures)
        table.caption_justify = "left"
        found.append(table)
    if sweep := figures.get("context_sweep"):
        table = Table("context", "keys and values", "prefill", "token p50", "prefill", "decode")
        for row in sweep:
            table.add_row(
                f"{row['context']:,}",
                f"{row['cache_bytes'] / 1e6:.3g} MB",
                duration(row["prefill_s"]),
                f"{duration(row['token_p50_s'])} ({duration(row['token_low_s'])} … {duration(row['token_high_s'])})",
                *(f"{row[f'{what}_tokens_per_s']:.1f} tokens/s" for what in ("prefill", "decode")),
            )
        found.append(table)
    if sweep := figures.get("thread_sweep"):
        table = Table("threads", "prefill", "decode", "token p50")
        for row in sweep:
            rates = (f"{row[f'{what}_tokens_per_s']:.1f} tokens/s" for what in ("prefill", "decode"))
            table.add_row(str(row["threads"]), *rates, duration(row["token_p50_s"]))
        found.append(table)
    if roof := figures.get("roofline"):
        table = Table(
            "roofline", "context", "operations / byte", "operations/s", "bytes/s", "bound by", "of the bound"
        )
        for point in roof["points"]:
            table.add_row(
                point["phase"],
                f"{point['context']:,}",
                number(point["intensity"]),
                f"{point['operations_per_s'] / 1e9:.3g} G",
                f"{point['bytes_per_s'] / 1e9:.3g} GB",
                {"memory": "bandwidth", "compute": "arithmetic"}[point["bound"]],
                f"{point['fraction']:.1%}",
            )
        table.caption = roof_words(roof)
        table.caption_justify = "left"
        found.append(table)
    if skipped := figures.get("skipped"):
        table = Table("skipped", "why")
        for each in skipped:
            table.add_row(each["what"], each["reason"])
        found.append(table)
    return found


def _lines(found: Mapping[str, Any] | None) -> str:
    return percentiles(found).replace("), ", ")\n") if found else "–"


def disturbances(figures: Mapping[str, Any]) -> list[str]:
    """What made figures worse, scenario by scenario, and why there is no energy."""
    measured = scenarios(figures)
    usual = figures.get("scenarios", {}).get("server", {}).get("load")
    measured += [
        (f"server at load {row['load']:g}", row)
        for row in figures.get("server_sweep", ())
        if row["load"] != usual
    ]
    told = [f"{name}: {note}" for name, each in measured for note in each["notes"]]
    silent = {each["energy"] for _, each in measured if each["joules_per_token"] is None}
    return told + [f"energy was not measured: {reason}" for reason in sorted(silent)]


def limit_words(figures: Mapping[str, Any]) -> str:
    """Up to which load the demanded time to the first token is kept; empty: none was demanded."""
    found = figures.get("server_limit")
    if not found:
        return ""
    asked = f"{found['percentile']} of the time to the first token is at most {found['max_ttft_ms']:g} ms, which was demanded,"
    if found["load"] is None:
        return f"At no load that was measured: {asked.removesuffix(',')}."
    most = found["load"] == figures["server_sweep"][-1]["load"]
    return (
        f"{asked} up to a load of {found['load']:g}, {found['arrivals_per_s']:.3g} requests/s"
        f"{': at every load that was measured' if most else ''}."
    )


def roof_words(roof: Mapping[str, Any]) -> str:
    """What was measured for the roof."""
    told = ", ".join(
        f"{number(each['operations_per_s'] / 1e9)} G {each['type']} operations/s ({each['measured_with']})"
        for each in roof["peaks"]
    )
    where = f"Measured on {roof['device']}" if "device" in roof else "Measured here"
    how = f" ({roof['bandwidth_measured_with']})" if "bandwidth_measured_with" in roof else ""
    return (
        f"{where}: {number(roof['bandwidth_bytes_per_s'] / 1e9)} GB/s{how}, {told}. Below {number(roof['ridge'])} operations a byte "
        "memory is what bounds."
    )


def speed_charts(figures: Mapping[str, Any]) -> dict[str, Markup]:
    """The charts of the section, by name; one that nothing was measured for is absent."""
    drawn: dict[str, Markup] = {}
    for key, what in (("contexts", "token"), ("encodings", "run"), ("runs", "run")):
        if rows := figures.get(key):
            drawn["latency"] = _latency(rows, what)
    if rows := figures.get("contexts"):
        most = figures["bandwidth_bytes_per_s"]
        drawn["bandwidth"] = bars(
            [
                (
                    f"after {row['context']} tokens",
                    row["roofline_fraction"] * most / 1e9,
                    f"{row['roofline_fraction'] * most / 1e9:.3g} GB/s, {row['roofline_fraction']:.1%}",
                    "",
                )
                for row in rows
            ],
            "bytes of weights read a second by decoding; the line is the machine's measured bandwidth",
            mark=most / 1e9,
        )
    if (rows := figures.get("contexts")) and len(rows) > 1 and not figures.get("context_sweep"):
        drawn["length"] = bars(
            [
                (f"{row['context']} tokens", row["first_token_s"], duration(row["first_token_s"]), "")
                for row in rows
            ],
            "time to the first token against the prompt's length",
        )
    for name, each in scenarios(figures):
        for key, label in (("first_token", "first token"), ("token", "per output token")):
            if key in each:
                drawn[f"{name} {key}"] = _intervals(each[key], label)
    if rows := figures.get("server_sweep"):
        limit = figures.get("server_limit", {}).get("max_ttft_ms")
        for key, mark in (("first_token", limit and limit / 1e3), ("token", None)):
            drawn[f"loads {key}"] = _by_load(rows, key, mark)
    if (rows := figures.get("context_sweep")) and len(rows) > 1:
        for key, value, what in (
            ("attention_time", "token_p50_s", "time of a token"),
            ("prefill_time", "prefill_s", "time of the prompt"),
            ("attention_memory", "cache_bytes", "bytes of keys and values"),
        ):
            drawn[key] = _curve(
                [(row["context"], row[value], _shown(row[value], value)) for row in rows],
                f"{what} against tokens of context",
                "tokens",
            )
    if (rows := figures.get("thread_sweep")) and len(rows) > 1:
        drawn["threads"] = _curve(
            [
                (row["threads"], row["decode_tokens_per_s"], f"{number(row['decode_tokens_per_s'])} tokens/s")
                for row in rows
            ],
            "tokens a second against threads",
            "threads",
        )
    if roof := figures.get("roofline"):
        drawn["roofline"] = _roof(roof)
    return drawn


def _shown(value: float, key: str) -> str:
    return size(value) if key == "cache_bytes" else duration(value)


def _latency(rows: Sequence[Mapping[str, Any]], what: str) -> Markup:
    """p50, p90 and p99 as far as the samples carry them; where that is p50 alone, its interval."""
    told = []
    for row in rows:
        ends = values = [row[f"{what}_{q}_s"] for q in ("p50", "p90", "p99")]
        called = (
            f"batch of {row['batch']} × {row['context']} tokens"
            if "batch" in row
            else "a run of the first sample"
        )
        if what == "token":
            called = f"after {row['context']} tokens"
        if values[1:] == [None, None]:
            ends = [row.get(f"{what}_low_s"), values[0], row.get(f"{what}_high_s")]
        known = [value for value in ends if value is not None]
        told.append((called, known, " / ".join(duration(value) for value in values)))
    return ranges(told, f"p50, p90 and p99 of the time of a {what}, or p50 alone with its interval")


def _by_load(rows: Sequence[Mapping[str, Any]], key: str, mark: float | None) -> Markup:
    """The percentiles of each load, without their intervals."""
    told, names = [], []
    for row in rows:
        known = [(name, each["value"]) for name, each in _in_order(row[key]) if each is not None]
        names = [name for name, _ in known]
        told.append(
            (
                f"load {row['load']:g}, {row['arrivals_per_s']:.3g} requests/s",
                [value for _, value in known],
                " / ".join(duration(value) for _, value in known),
            )
        )
    what = {"first_token": "time to the first token", "token": "time per output token"}[key]
    return ranges(told, f"{', '.join(names)} of the {what} at each load", mark)


def _intervals(found: Mapping[str, Any], label: str) -> Markup:
    """Each percentile with the interval that holds it."""
    rows = []
    for name, each in _in_order(found):
        if each is not None:
            ends = [value for value in (each["low"], each["value"], each["high"]) if value is not None]
            shown = f"{duration(each['value'])} ({_interval(each)})"
            rows.append((f"{label}, {name}", ends, shown))
    return ranges(
        rows, f"percentiles of the time of the {label.removeprefix('per ')} with their 95 % intervals"
    )


def _curve(points: Sequence[tuple[float, float, str]], said: str, unit: str) -> Markup:
    """Points over a logarithmic axis, joined, from zero up; each has its value above it and its place below."""
    low, high = log10(points[0][0]), log10(points[-1][0])
    most = max(value for _, value, _ in points) or 1.0
    places = [
        (2 + 96 * (log10(x) - low) / (high - low), _TOP + _HIGH * (1 - y / most), f"{x:,.0f}", shown)
        for x, y, shown in points
    ]
    base = _TOP + _HIGH
    parts = [f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>']
    for (x, y, *_), (next_x, next_y, *_) in itertools.pairwise(places):
        parts.append(f'<line x1="{x:.2f}%" y1="{y:.1f}" x2="{next_x:.2f}%" y2="{next_y:.1f}" class="curve"/>')
    for at, (x, y, place, shown) in enumerate(places):
        anchor = "start" if at == 0 else "end" if at == len(places) - 1 else "middle"
        title = f"<title>{escape(f'{place} {unit}: {shown}')}</title>"
        parts.append(f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="4" class="dot">{title}</circle>')
        parts += [_text(x, y - 9, shown, anchor, "over"), _text(x, base + 16, place, anchor, "soft")]
    return _svg(base + 24, said, parts)


def _roof(roof: Mapping[str, Any]) -> Markup:
    """Operations a second over operations a byte, both logarithmic: the roof, and what was measured below it."""
    points, top, wide = roof["points"], max(each["operations_per_s"] for each in roof["peaks"]), roof["ridge"]
    xs = [wide, *(point["intensity"] for point in points)]
    left, right = floor(log10(min(xs)) - 0.1), ceil(log10(max(xs)) + 0.1)
    least = min([roof["bandwidth_bytes_per_s"] * 10**left, *(point["operations_per_s"] for point in points)])
    most = max(top, *(point["operations_per_s"] for point in points))
    low, high = floor(log10(least)), ceil(log10(most) + 0.1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = 4 + 92 * (log10(x) - left) / (right - left)
        return across, _TOP + _HIGH * (1 - (log10(y) - low) / (high - low))

    base = _TOP + _HIGH
    corners = [at(10**left, roof["bandwidth_bytes_per_s"] * 10**left), at(wide, top), at(10**right, top)]
    parts = [f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>']
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        parts.append(f'<line x1="{x:.2f}%" y1="{y:.1f}" x2="{next_x:.2f}%" y2="{next_y:.1f}" class="mark"/>')
    for point in points:
        x, y = at(point["intensity"], point["operations_per_s"])
        words = f"{point['phase']} after {point['context']} tokens: {point['operations_per_s'] / 1e9:.3g} G operations/s"
        kind = "dot" if point["phase"] == "decode" else "point"
        parts.append(
            f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="5" class="{kind}"><title>{escape(words)}</title></circle>'
        )
    parts.append(_text(0, 12, f"operations/s, from 1e{low} to 1e{high}", "start", "soft"))
    parts.append(_text(100, base + 16, f"operations a byte, from 1e{left} to 1e{right}", "end", "soft"))
    parts.append(_text(0, base + 32, "rings: decode, dots: prefill", "start", "soft"))
    return _svg(base + 40, "measured operations a second below the roofline", parts)
