"""Parts of a report's page that are drawn from its findings: where error builds up, alternatives, distances, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from tapeout.validate import charts
from tapeout.validate.report import Report, number

__all__ = ["alternatives", "called", "drawn", "seconds", "size", "stages", "steepest"]

_MANY = 12  # layers that have a row each


def size(count: float | None) -> str:
    """Bytes for people, in units of a thousand."""
    if count is None:
        return ""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:.0f} bytes"


def seconds(value: float) -> str:
    """A duration for people."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def drawn(report: Report) -> dict[str, Markup]:
    """Charts of what was found."""
    found = report.findings
    charted: dict[str, Markup] = {}
    if layers := found.get("layers", {}).get("layers"):
        rows = [
            (
                layer["layer"],
                layer["error"] or 0.0,
                "not a number" if layer["error"] is None else f"{layer['error']:.2%}",
                "bad" if layer["error"] is None else "",
            )
            for layer in layers
        ]
        draw = charts.bars if len(rows) <= _MANY else charts.heights
        charted["rounding"] = draw(rows, "difference from the original after each layer")
    if taken := stages(report):
        charted["stages"] = charts.bars(taken, "seconds of each stage, and its peak of memory")
    if (points := found.get("memory", {}).get("points")) and len(points) > 1:
        spans = [
            (stage["name"], stage["begin_s"], stage["begin_s"] + stage["seconds"])
            for stage in found.get("stages", [])
            if "begin_s" in stage
        ]
        charted["memory"] = charts.curve(
            points, spans, "resident memory over the run, by stage", (seconds, size)
        )
    if len(placed := [row for row in alternatives(report) if row["loss"] > 0]) > 1:
        charted["alternatives"] = charts.points(
            [(called(row), row["bytes"], row["loss"]) for row in placed],
            "size and loss of this package and of its alternatives",
            (("size", size), (found["alternatives"]["measure"], number)),
            next((at for at, row in enumerate(placed) if row["this"]), None),
        )
    return charted


def stages(report: Report) -> list[tuple[str, float, str, str]]:
    """The stages as rows of bars: seconds, and the most memory that was seen in each."""
    return [
        (
            stage["name"],
            stage["seconds"],
            seconds(stage["seconds"]) + (f", {size(stage['peak_bytes'])}" if stage.get("peak_bytes") else ""),
            "",
        )
        for stage in report.findings.get("stages", [])
    ]


def alternatives(report: Report) -> list[dict[str, Any]]:
    """This package and the others, those that can be drawn first, by size; ``best``: no other is as small and loses less, or the other way round."""
    rows: Sequence[Mapping[str, Any]] = report.findings.get("alternatives", {}).get("rows", [])
    return [
        {**row, "best": not any(_beats(other, row) for other in rows)}
        for row in sorted(rows, key=lambda row: row["loss"] <= 0)
    ]


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is no larger and loses no more, and is better in one of both."""
    mine, theirs = (one["bytes"], one["loss"]), (other["bytes"], other["loss"])
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def called(row: Mapping[str, Any]) -> str:
    """An alternative in words."""
    mixed = " mixed" if row["mixed"] else ""
    return f"{row['scheme']}{mixed}, {row['rounding']}, {row['target']}, {row['format']}"


def steepest(report: Report) -> str:
    """Between which two layers the difference from the original grows most, in words; nothing where it is not known."""
    layers = report.findings.get("layers", {}).get("layers", [])
    if any(layer["error"] is None for layer in layers):
        first = next(layer["layer"] for layer in layers if layer["error"] is None)
        return f"{first} is the first that has NaN or infinity."
    # What the network gives is no layer; what a plain module is given has no error.
    given = [{"layer": "inputs", "error": 0.0}] if "samples" in report.findings.get("layers", {}) else []
    steps = list(pairwise([*given, *layers[:-1]]))
    if not steps:
        return ""
    before, after = max(steps, key=lambda step: float(step[1]["error"] - step[0]["error"]))
    if after["error"] <= before["error"]:
        return ""
    return f"It grows most in {after['layer']}: from {before['error']:.2%} to {after['error']:.2%}."
