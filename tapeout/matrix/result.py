"""What a matrix came to, and its documents: a page, Markdown for a comment, JUnit for CI systems, JSON for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tapeout import __version__
from tapeout.files import canonical_json, write_whole, writing
from tapeout.matrix.baseline import Change
from tapeout.matrix.cells import Cell
from tapeout.matrix.tasks import FORMAT_VERSION, Outcome, Status, worst
from tapeout.validate.page_parts import seconds, size
from tapeout.validate.report import number

MARKS: Mapping[Status, str] = {
    "passed": "✓",
    "failed": "✗",
    "error": "✗",
    "not run": "…",
    "refused": "–",
    "skipped": "○",
}
_EMOJI: Mapping[Status, str] = {
    "passed": "✅",
    "failed": "❌",
    "error": "💥",
    "not run": "⏹️",
    "refused": "➖",
    "skipped": "⏭️",
}
_LONGEST = 60_000  # letters that a comment of a pull request has room for
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Result:
    """A matrix that was run.

    Attributes:
        cells: every cell of the file with what came of it. chosen: names of those that this run was about.
        changes: what was compared with a baseline.
    """

    title: str
    cells: tuple[tuple[Cell, Outcome], ...]
    chosen: frozenset[str]
    changes: tuple[Change, ...] = ()

    @property
    def regressions(self) -> list[Change]:
        """What got worse than its margin allows."""
        return [change for change in self.changes if change.worse]

    @property
    def passed(self) -> bool:
        """Whether no cell that this run was about failed, and nothing got worse than a baseline allows."""
        return not self.regressions and not any(o.red for _, o in self.cells if o.name in self.chosen)

    @property
    def counts(self) -> dict[Status, int]:
        """How many cells there are of each status."""
        return worst(outcome for _, outcome in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "tapeout": __version__,
            "passed": self.passed,
            "counts": self.counts,
            "cells": [_cell(cell) | outcome.to_json() for cell, outcome in self.cells],
            "changes": [change.to_json() for change in self.changes],
        }

    def write(self, out: Path) -> None:
        """Write ``matrix.json``, ``index.html``, ``index.md`` and ``index.xml``, each whole."""
        forms = {
            "matrix.json": canonical_json(self.to_json()),
            "index.html": self.page(out),
            "index.md": self.markdown(),
            "index.xml": self.junit(),
        }
        with writing(out):
            for name, text in forms.items():
                write_whole(out / name, text)

    def page(self, out: Path) -> str:
        """One file that asks for no other, with links to each cell's report and log below ``out``."""
        rows = [_row(cell, outcome, out) for cell, outcome in self.cells]
        columns = list(dict.fromkeys(cell.target for cell, _ in self.cells))
        places = {(_line(cell), cell.target): row for (cell, _), row in zip(self.cells, rows, strict=True)}
        said = _template().render(
            result=self,
            rows=rows,
            broken=[row for row in rows if row["outcome"].status in ("failed", "error")],
            columns=columns,
            lines=[(line, [places.get((line, column)) for column in columns]) for line in self._lines()],
            several=len({cell.rounding for cell, _ in self.cells}) > 1,
            marks=MARKS,
        )
        return str(said)

    def _lines(self) -> list[tuple[str, str, str]]:
        """The grid's lines: what a model has in common stands together, whatever was included last."""
        models = list(dict.fromkeys(cell.called for cell, _ in self.cells))
        return sorted(
            dict.fromkeys(_line(cell) for cell, _ in self.cells), key=lambda line: models.index(line[0])
        )

    def markdown(self) -> str:
        """Verdict, the grid, what failed and what got worse, as a comment of a pull request has room for."""
        verdict = "✅ **PASSED**" if self.passed else "❌ **FAILED**"
        told = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        columns = list(dict.fromkeys(cell.target for cell, _ in self.cells))
        parts = [f"{verdict} `{self.title}`: {len(self.cells)} cells: {told}", ""]
        if self.regressions:
            parts += [_markdown(["cell", "got worse", "before", "now", "allowed"]), _markdown(["---"] * 5)]
            parts += [
                _markdown([f"`{c.cell}`", c.what, *both(c), "" if c.allowed is None else f"{c.allowed:.0%}"])
                for c in self.regressions
            ]
            parts.append("")
        if red := [outcome for _, outcome in self.cells if outcome.red]:
            parts += [
                f"- {_EMOJI[each.status]} `{each.name}` {each.status}: {_cut(each.reason)}" for each in red
            ] + [""]
        marks = {(_line(cell), cell.target): _EMOJI[outcome.status] for cell, outcome in self.cells}
        parts += [_markdown(["", *columns]), _markdown(["---", *[":-:"] * len(columns)])]
        for line in self._lines():
            parts.append(
                _markdown([f"`{' '.join(line)}`", *(marks.get((line, column), "") for column in columns)])
            )
        legend = " ".join(f"{_EMOJI[status]} {status}" for status in _EMOJI if status in self.counts)
        text = "\n".join([*parts, "", legend]) + "\n"
        return (
            text
            if len(text) <= _LONGEST
            else text[:_LONGEST].rpartition("\n")[0] + "\n\n… index.html has the rest.\n"
        )

    def junit(self) -> str:
        """A test a cell, and one a figure that was compared with a baseline."""
        suites = ElementTree.Element("testsuites", {"name": "tapeout matrix"})
        cells = [
            (outcome.name, f"tapeout.{cell.target}", outcome.status, outcome.reason, outcome.seconds)
            for cell, outcome in self.cells
        ]
        _suite(suites, self.title, cells)
        figures: list[tuple[str, str, Status, str, float]] = []
        for change in self.changes:
            before, now = both(change)
            said = f"before {before}, now {now}; {change.reason}"
            status: Status = (
                "failed"
                if change.worse
                else "skipped"
                if change.reason.startswith("not compared")
                else "passed"
            )
            figures.append((f"{change.cell} {change.what}", "tapeout.baseline", status, said, 0.0))
        if figures:
            _suite(suites, f"{self.title}: baseline", figures)
        ElementTree.indent(suites)
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            + ElementTree.tostring(suites, encoding="unicode")
            + "\n"
        )


def both(change: Change) -> tuple[str, str]:
    """The two figures of a change, for people."""
    shown: Callable[[Any], str] = (
        size if change.what == "size" else number if change.what != "verdict" else str
    )
    unit = f" {change.unit.split(',')[-1].strip()}" if change.what in ("quality", "speed") else ""
    if change.what == "size" and shown(change.before) == shown(change.now):
        return f"{change.before:,} bytes", f"{change.now:,} bytes"
    return f"{shown(change.before)}{unit}", f"{shown(change.now)}{unit}"


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "model": cell.model,
        "scheme": cell.scheme,
        "rounding": cell.rounding,
        "target": cell.target,
        "target_name": cell.kind,
        "options": dict(cell.options),
    }


def _line(cell: Cell) -> tuple[str, str, str]:
    return cell.called, cell.scheme, cell.rounding


def _row(cell: Cell, outcome: Outcome, out: Path) -> dict[str, Any]:
    """What the page shows of a cell."""
    figures, quality = outcome.figures, outcome.figures.get("quality", {})
    speed, gates = figures.get("speed", {}), figures.get("gates", {})
    report, log = f"{outcome.name}/report.html", f"logs/{outcome.name}.log"
    return {
        "cell": cell,
        "outcome": outcome,
        "report": report if (out / report).exists() else None,
        "log": log if (out / log).exists() else None,
        "bytes": figures.get("artifact_bytes"),
        "quality": quality.get("value"),
        "metric": quality.get("metric", ""),
        "speed": speed.get("value"),
        "unit": speed.get("unit", ""),
        "gates": gates,
        "skipped": figures.get("skipped", []),
    }


def _suite(
    suites: ElementTree.Element, name: str, cases: Sequence[tuple[str, str, Status, str, float]]
) -> None:
    statuses = [status for _, _, status, _, _ in cases]
    counts = {
        "tests": len(cases),
        "failures": statuses.count("failed"),
        "errors": statuses.count("error") + statuses.count("not run"),
        "skipped": statuses.count("skipped") + statuses.count("refused"),
    }
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": name, **{key: str(n) for key, n in counts.items()}}
    )
    for case, group, status, reason, taken in cases:
        one = ElementTree.SubElement(suite, "testcase", name=case, classname=group, time=f"{taken:.3f}")
        message = _NO_XML.sub("\ufffd", reason)
        if status == "failed":
            ElementTree.SubElement(one, "failure", message=message, type="GateFailed")
        elif status in ("error", "not run"):
            ElementTree.SubElement(one, "error", message=message, type=status)
        elif status != "passed":
            ElementTree.SubElement(one, "skipped", message=f"{status}: {message}")
        elif message:
            ElementTree.SubElement(one, "system-out").text = message


def _markdown(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _cut(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= 300 else words[:299] + "…"


@cache
def _template() -> Any:
    """The page's template, which extends that of reports, compiled once."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("tapeout.matrix", "data"), jinja2.PackageLoader("tapeout.validate", "data")]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "size": size, "seconds": seconds, "both": both}
    return environment.get_template("matrix.html.j2")
