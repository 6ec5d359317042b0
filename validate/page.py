"""Reports for people: the page of one (``report.html``) or of several side by side, and Markdown short enough for a comment.

Everything is made from what stands in ``report.json``: the same one gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import log10
from typing import Any

from markupsafe import Markup

from tapeout.validate import charts, page_parts
from tapeout.validate.page_parts import seconds, size
from tapeout.validate.report import GateResult, Report, number
from tapeout.validate.speed_page import (
    disturbances,
    limit_words,
    percentile_lines,
    roof_words,
    scenarios,
    speed_charts,
)

__all__ = [
    "comparison_markdown",
    "comparison_page",
    "comparison_rows",
    "fragment",
    "markdown",
    "page",
    "size",
]

_LONGEST = 300  # letters of a reason in Markdown


def share_of(value: float) -> str:
    """A share in percent; how many times where that is more than ten."""
    return f"{value:.1%}" if value < 10 else f"{number(value)} times"


def quoted(text: str) -> str:
    """A text in quotes, in which nothing is invisible."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def page(report: Report) -> str:
    """``report.html``: one file that asks for no other."""
    return str(_template("report.html.j2").render(report=report, **_shown(report)))


def fragment(report: Report, where: str = "") -> str:
    """What a notebook shows of a report, in its own colours; ``where`` it stands."""
    told = {"counts": counts(report), "headline": headline(report), "risk": risk(report), "where": where}
    return str(_template("notebook.html.j2").render(report=report, **told))


def comparison_page(named: Mapping[str, Report]) -> str:
    """The same page for several packages, by their names."""
    reports = list(named.values())
    rows = comparison_rows(named)
    placed = [
        (name, float(report.provenance["artifact_bytes"]), kl)
        for name, report in named.items()
        if report.provenance.get("artifact_bytes") and (kl := _value(report, "quality/kl"))
    ]
    speeds = [
        (name, rate, f"{number(rate)} {unit}", "")
        for name, report in named.items()
        for rate, unit, _ in [_speed(report)]
        if rate
    ]
    gates = list(dict.fromkeys(gate.name for report in reports for gate in report.gates))
    return str(
        _template("compare.html.j2").render(
            names=list(named),
            reports=reports,
            risks=[risk(report) for report in reports],
            rows=rows,
            same_codes=len({report.provenance.get("codes_sha256") for report in reports}) == 1,
            gates={name: [_gate(report, name) for report in reports] for name in gates},
            quality=len(placed) > 1
            and charts.points(
                placed, "size and quality of each package", (("size", size), ("mean KL, nats", number))
            ),
            speed=len(speeds) > 1 and charts.bars(speeds, "speed of each package"),
        )
    )


def comparison_rows(named: Mapping[str, Report]) -> list[dict[str, Any]]:
    """What is compared, a row a fact: ``fact``, ``unit``, and ``cells``: a number or a text of each package, None where none was measured."""
    facts: list[tuple[str, str, Callable[[Report], Any]]] = [
        ("verdict", "", lambda r: "passed" if r.passed else "failed"),
        ("model", "", lambda r: r.model),
        ("scheme", "", lambda r: r.scheme),
        ("target", "", lambda r: r.target),
        ("format", "", lambda r: r.provenance.get("format")),
        ("rounding", "", lambda r: r.provenance.get("rounding")),
        ("codes", "SHA-256, 16 digits", lambda r: (r.provenance.get("codes_sha256") or "")[:16] or None),
        ("gates passed / failed / skipped", "", lambda r: " / ".join(str(n) for n in counts(r).values())),
        ("size", "MB", lambda r: _scaled(r.provenance.get("artifact_bytes"), 1e-6)),
        ("quality: mean KL to the original", "nats", lambda r: _value(r, "quality/kl")),
        ("quality: equal likeliest tokens", "share", lambda r: _value(r, "quality/top1")),
        ("quality: perplexity / original's", "", lambda r: _value(r, "quality/perplexity")),
        ("task: exact answers", "share", lambda r: _value(r, "task")),
        ("lowering: runtime's own arithmetic", "share of its limit", lambda r: _used(r, "lowering/runtime")),
        ("speed", "tokens/s", lambda r: _speed(r)[0]),
        ("speed measured on", "", lambda r: _speed(r)[2] or None),
        ("time to first token", "ms", lambda r: _scaled(_longest(r).get("first_token_s"), 1e3)),
        ("time per token, p50", "ms", lambda r: _scaled(_longest(r).get("token_p50_s"), 1e3)),
        ("time per token, p99", "ms", lambda r: _scaled(_longest(r).get("token_p99_s"), 1e3)),
        ("resident memory", "MB", lambda r: _scaled(r.throughput.get("resident_bytes"), 1e-6)),
        ("runtime", "", lambda r: r.throughput.get("runtime") or r.provenance.get("runtime")),
        ("processor", "", lambda r: r.machine.get("processor")),
    ]
    rows = [
        {"fact": fact, "unit": unit, "cells": [get(r) for r in named.values()]} for fact, unit, get in facts
    ]
    return [row for row in rows if any(cell is not None for cell in row["cells"])]


def comparison_markdown(named: Mapping[str, Report]) -> str:
    """The same as a table in Markdown."""
    head = ["", *named]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in comparison_rows(named):
        fact = row["fact"] + (f", {row['unit']}" if row["unit"] else "")
        lines.append(_row([fact, *(cell_text(cell) for cell in row["cells"])]))
    return "\n".join(lines) + "\n"


def cell_text(cell: Any) -> str:
    """A cell of ``comparison_rows`` for people."""
    if cell is None:
        return "–"
    return number(cell) if isinstance(cell, float) else str(cell)


def markdown(report: Report) -> str:
    """``report.md``: verdict, figures and gates, as a comment of a pull request has room for."""
    verdict = "✅ **PASSED**" if report.passed else "❌ **FAILED**"
    count = counts(report)
    figures = [f"{name} {value}" for name, value, _ in headline(report)]
    told = ", ".join(f"{n} {status}" for status, n in count.items())
    lines = [
        f"{verdict} {_code(report.model)} → {_code(report.scheme)} → {_code(report.target)}: {told}",
        "",
        " · ".join(figures),
        "",
        f"{'Largest risk' if report.passed else 'Look first'}: {_plain(_cut(risk(report)))}",
        "",
        _row(["gate", "verdict", "measured", "limit", "what"]),
        _row(["---", "---", "---:", "---:", "---"]),
    ]
    for gate in sorted(report.gates, key=lambda each: ("failed", "skipped", "passed").index(each.status)):
        what = gate.metric if gate.status == "passed" else gate.reason
        mark = f"**{gate.status}**" if gate.status == "failed" else gate.status
        lines.append(_row([f"`{gate.name}`", mark, number(gate.value), number(gate.limit), _cut(what)]))
    where = [f"{report.machine.get('processor', '')}, {report.machine.get('cores', '?')} cores"]
    if root := report.provenance.get("root_sha256"):
        where.append(f"root digest `{root[:16]}`")
    return "\n".join([*[line for line in lines if line is not None], "", " · ".join(where)]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(words: str) -> str:
    """Words of others in a line of Markdown: no tag of theirs is one."""
    return " ".join(words.replace("<", "&lt;").split())


def _code(name: str) -> str:
    """A name as code, which nothing in it ends."""
    return f"`{' '.join(name.replace('`', chr(39)).split())}`"


def _cut(words: str) -> str:
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"


def counts(report: Report) -> dict[str, int]:
    """How many gates passed, failed, were skipped."""
    return {
        status: sum(gate.status == status for gate in report.gates)
        for status in ("passed", "failed", "skipped")
    }


def headline(report: Report) -> list[tuple[str, str, str]]:
    """The figures of the first screen: name, value with its unit, how it was measured. Nothing stands for what was not measured."""
    found: list[tuple[str, str, str]] = []
    if (count := report.provenance.get("artifact_bytes")) is not None:
        found.append(("size", size(count), "files that the runtime loads"))
    rate, unit, how = _speed(report)
    if rate:
        found.append(("speed", f"{number(rate)} {unit}", how))
    best = _longest(report)
    if "first_token_s" in best:
        found.append(
            (
                "first token",
                seconds(best["first_token_s"]),
                f"after {best['context']} tokens, median of repeats",
            )
        )
    if "run_p50_s" in best:
        found.append(("a run", seconds(best["run_p50_s"]), f"median of {best['samples']} runs"))
    if report.throughput:
        found.append(
            ("memory", size(report.throughput["resident_bytes"]), "resident, added by loading and running")
        )
    for name, label, how in (
        ("quality/kl", "loss by the scheme", "mean KL to the original, nats a token"),
        ("quality/cosine", "loss by the scheme", "mean of 1 - cosine to the original"),
        ("quality/error", "loss by the scheme", "squared error / variance of outputs"),
        ("task", "exact answers", "of the model's tasks, on the device"),
    ):
        gate = _gate(report, name)
        if gate and gate.value is not None:
            shown = f"{gate.value:.1%}" if name == "task" else number(gate.value)
            found.append((label, shown, f"{how}; limit {number(gate.limit)}"))
    return found


def risk(report: Report) -> str:
    """What to look at first: what failed, what nobody has proven, or what is nearest to its limit."""
    failed = [gate for gate in report.gates if gate.status == "failed"]
    if failed:
        return f"{failed[0].name} failed: {failed[0].reason or failed[0].metric}"
    skipped = [gate.name for gate in report.gates if gate.status == "skipped"]
    if skipped:
        return f"not proven here, since they were skipped: {', '.join(skipped)}."
    return nearest(report)


def nearest(report: Report) -> str:
    """Of the gates that ran and passed, the one that is nearest to its limit."""
    near = max(report.gates, key=lambda gate: gate.used or 0.0, default=None)
    if near is None or not near.used:
        return "every gate that ran passed, and none comes near its limit."
    return (
        f"{near.name} comes nearest to its limit: {number(near.value)} of {number(near.limit)} ({near.metric}), "
        f"{near.used:.0%} of what it may lose."
    )


def _speed(report: Report) -> tuple[float | None, str, str]:
    """The figure that stands for speed, its unit, and how it was measured."""
    best = _longest(report)
    if "decode_tokens_per_s" in best:
        return best["decode_tokens_per_s"], "tokens/s", f"decoding after {best['context']} tokens, median"
    if "tokens_per_s" in best:
        return (
            best["tokens_per_s"],
            "tokens/s",
            f"batch of {best['batch']} × {best['context']} tokens, median",
        )
    return None, "", ""


def _longest(report: Report) -> Mapping[str, Any]:
    """The last row of what throughput was measured at: the longest context, the largest batch."""
    for key in ("contexts", "encodings", "runs"):
        if rows := report.throughput.get(key):
            return dict(rows[-1])
    return {}


def _gate(report: Report, name: str) -> GateResult | None:
    return next((gate for gate in report.gates if gate.name == name), None)


def _value(report: Report, name: str) -> float | None:
    gate = _gate(report, name)
    return gate.value if gate else None


def _used(report: Report, name: str) -> float | None:
    gate = _gate(report, name)
    return gate.used if gate else None


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def _shown(report: Report) -> dict[str, Any]:
    """What the template shows besides the report itself: figures in words, and charts."""
    found, speed = report.findings, report.throughput
    used = sorted(
        [(gate, gate.used) for gate in report.gates if gate.used is not None], key=lambda each: -each[1]
    )
    drawn: dict[str, Markup] = {}
    if used:
        drawn["limits"] = charts.bars(
            [
                (
                    gate.name,
                    min(share, 1.5),
                    f"{share_of(share)} of its limit",
                    "bad" if gate.status == "failed" else "good",
                )
                for gate, share in used
            ],
            "how much of its limit each gate uses",
            mark=1.0,
        )
    drawn |= speed_charts(speed)
    drawn |= page_parts.drawn(report)
    if layers := found.get("divergence", {}).get("layers"):
        drawn["layers"] = charts.bars(
            [
                (
                    layer["layer"],
                    log10(max(layer["grown"] or 0.0, 1e-8)) + 8,
                    "not a number" if layer["grown"] is None else f"{layer['grown']:.2g}",
                    "bad" if layer["parts"] else "good",
                )
                for layer in layers
            ],
            "difference over size after each layer",
        )
    spread = {
        gate: charts.columns(each["edges"], each["counts"], f"tokens by their KL, {gate}")
        for gate, each in found.get("comparisons", {}).items()
    }
    spread |= {
        gate: charts.columns(
            each["edges"], each["counts"], f"{each['of']} by their {each['measure']}, {gate}"
        )
        for gate, each in found.get("distances", {}).items()
    }
    return {
        "counts": counts(report),
        "headline": headline(report),
        "nearest": nearest(report),
        "charts": drawn,
        "steepest": page_parts.steepest(report),
        "alternatives": page_parts.alternatives(report),
        "spread": spread,
    }


@cache
def _template(name: str) -> Any:
    """A template of ``validate/data``, compiled once."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tapeout.validate", "data"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "seconds": seconds,
        "share": share_of,
        "quoted": quoted,
        "cell": cell_text,
        "thousandfold": lambda value: None if value is None else value * 1e3,
        "percentiles": percentile_lines,
        "scenarios": scenarios,
        "disturbances": disturbances,
        "limit_words": limit_words,
        "roof_words": roof_words,
    }
    return environment.get_template(name)
