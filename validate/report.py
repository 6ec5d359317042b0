"""The report: what each gate found, how fast it ran, on which machine; as JSON, HTML, Markdown and JUnit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from xml.etree import ElementTree

import numpy.typing as npt

from tapeout.errors import NewerFormat, PackageError
from tapeout.files import canonical_json
from tapeout.manifest import read_json
from tapeout.validate.session import Logits

if TYPE_CHECKING:
    from rich.table import Table

FORMAT_VERSION = 1
# What XML 1.0 cannot hold: a runtime's last words may have a terminal's colours in them.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNIT = {"perplexity / original's": 1.0}
"""The value of a metric that loses nothing, where that is not zero."""
_RATE = "tokens a second"
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Attributes:
        name: ``gate`` or ``gate/check``.
        metric: what ``value`` and ``limit`` are, with their unit.
        value: what was measured; None when nothing was.
        limit: what it is held to; None when there is nothing to hold it to.
        reason: one or two sentences: what was compared and where the limit comes from, or why it failed or was skipped.
    """

    name: str
    status: Status
    metric: str = ""
    value: float | None = None
    limit: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> GateResult:
        """Of a report; what a later version has added is left out."""
        return cls(**{name: raw[name] for name in (each.name for each in fields(cls)) if name in raw})

    def to_json(self) -> dict[str, Any]:
        """The fields; JSON has no NaN and no infinity, which the reason tells of."""
        value = self.value if self.value is None or isfinite(self.value) else None
        return asdict(self) | {"value": value}

    @property
    def used(self) -> float | None:
        """The share of its limit that the value takes: 0 is no loss, 1 the limit, more has failed; None where that says nothing.

        A value that must be at least its limit is a share of something, and loses nothing at 1.
        """
        if self.value is None or self.limit is None or self.value != self.value:
            return None
        if self.metric == _RATE:  # nothing is lost by infinitely many
            return self.limit / self.value if self.value else None
        at_least = (self.value < self.limit) == (self.status == "failed") and self.value != self.limit
        best = 1.0 if at_least else _UNIT.get(self.metric, 0.0)
        if self.limit == best:
            return None
        return max(0.0, (self.value - best) / (self.limit - best))


@dataclass(frozen=True)
class Report:
    """The verdict on one artifact.

    Attributes:
        model: its name. target: the target's name. scheme: of its linear layers.
        throughput: see ``throughput.measure_throughput``; empty when it was not measured.
        notes: what a user has to know of the artifact.
        golden: prompts and the float32 [vocab] logits that must follow them; not part of ``report.json``.
        golden_arrays: the same of a module, inputs and outputs by name.
        graph: which road the model's graph took: ``built``, ``torch.export`` or ``optimum``.
        device: the machine of a report that was merged (see ``tapeout.device_report``), its runtime, and throughput of its ``units``.
        provenance: what it was made from and of, by digests, and its size; see ``Package.provenance``.
        findings: what the gates saw on the way: see ``validate.findings``; ``stages`` and ``memory`` of ``validate.watch``.
    """

    model: str
    target: str
    scheme: str
    gates: tuple[GateResult, ...]
    throughput: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    golden: tuple[tuple[tuple[int, ...], Logits], ...] = ()
    golden_arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    graph: str = "built"
    device: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    findings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no gate failed and at least one passed."""
        statuses = {gate.status for gate in self.gates}
        return "failed" not in statuses and "passed" in statuses

    def to_json(self) -> dict[str, Any]:
        """The document that ``data/report.schema.json`` describes."""
        return {
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "model": self.model,
            "target": self.target,
            "scheme": self.scheme,
            "graph": self.graph,
            "gates": [gate.to_json() for gate in self.gates],
            "throughput": dict(self.throughput),
            "machine": dict(self.machine),
            "notes": list(self.notes),
            **{
                key: dict(value)
                for key, value in {
                    "device": self.device,
                    "provenance": self.provenance,
                    "findings": self.findings,
                }.items()
                if value
            },
        }

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read ``report.json``; PackageError when it is none, or of a newer format."""
        try:
            raw = read_json(path)
            if raw["format_version"] > FORMAT_VERSION:
                raise NewerFormat(
                    f"{path} has format_version {raw['format_version']}; this tapeout reads up to {FORMAT_VERSION}: upgrade it."
                )
            gates = tuple(GateResult.of(gate) for gate in raw["gates"])
            for gate in gates:
                _check(gate)
            return cls(
                raw["model"],
                raw["target"],
                raw["scheme"],
                gates,
                raw["throughput"],
                raw["machine"],
                tuple(map(str, raw["notes"])),
                graph=raw.get("graph", "built"),
                device=raw.get("device", {}),
                provenance=raw.get("provenance", {}),
                findings=raw.get("findings", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{path} is not a report: {error!r}.") from error

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from tapeout.validate.page import fragment

        return fragment(self)

    def write(self, directory: Path) -> None:
        """Write ``report.json``, and from it ``report.html``, ``report.md`` and ``report.xml`` (JUnit)."""
        from tapeout.validate.page import markdown, page

        forms = {
            "json": canonical_json(self.to_json()),
            "html": page(self),
            "md": markdown(self),
            "xml": self._junit(),
        }
        for ending, text in forms.items():
            (directory / f"report.{ending}").write_text(text, encoding="utf-8")

    def _junit(self) -> str:
        """One suite, a test a gate, in the form that GitHub's actions, GitLab, Jenkins and Azure read alike."""
        counts = {
            "tests": str(len(self.gates)),
            "failures": str(sum(gate.status == "failed" for gate in self.gates)),
            "errors": "0",
            "skipped": str(sum(gate.status == "skipped" for gate in self.gates)),
        }
        suites = ElementTree.Element("testsuites", {"name": "tapeout", **counts})
        name = f"{self.model} {self.scheme} {self.target}"
        suite = ElementTree.SubElement(suites, "testsuite", {"name": name, **counts})
        for gate in self.gates:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"tapeout.{self.target}", name=gate.name
            )
            reason = _NO_XML.sub("\ufffd", gate.reason)
            if gate.status == "failed":
                failure = ElementTree.SubElement(case, "failure", message=reason, type="GateFailed")
                failure.text = f"{_measured(gate)} {reason}".strip()
            elif gate.status == "skipped":
                ElementTree.SubElement(case, "skipped", message=reason)
            else:
                ElementTree.SubElement(case, "system-out").text = f"{_measured(gate)} {reason}"
        ElementTree.indent(suites)
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            + ElementTree.tostring(suites, encoding="unicode")
            + "\n"
        )


def number(value: float | None) -> str:
    """A figure for people: three significant digits, and no fraction from a thousand on."""
    if value is None:
        return ""
    if (float(value).is_integer() or abs(value) >= 1000) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _measured(gate: GateResult) -> str:
    limit = "" if gate.limit is None else f" (limit {number(gate.limit)})"
    return "" if gate.value is None else f"{gate.metric} {number(gate.value)}{limit}."


def _check(gate: GateResult) -> None:
    """ValueError for a gate of types that none has."""
    words = (gate.name, gate.status, gate.metric, gate.reason)
    numbers = (gate.value, gate.limit)
    if (
        not all(isinstance(word, str) for word in words)
        or gate.status not in get_args(Status)
        or not all(number is None or type(number) in (int, float) for number in numbers)
    ):
        raise ValueError(f"{gate} is no gate")


def verdict_table(report: Report) -> Table:
    """The gates as a table for the terminal, the verdict in its title."""
    from rich.table import Table
    from rich.text import Text

    verdict = Text("PASSED", "bold green") if report.passed else Text("FAILED", "bold red")
    title = Text.assemble(verdict, f"  {report.model} → {report.scheme} → {report.target}")
    table = Table(
        "gate",
        "verdict",
        "measured",
        "limit",
        "what",
        title=title,
        title_justify="left",
        title_style="",
        caption_justify="left",
    )
    styles = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    for gate in report.gates:
        reason = gate.reason if gate.status != "passed" else gate.metric
        measured = number(gate.value)
        table.add_row(
            Text(gate.name),
            Text(gate.status, styles[gate.status]),
            measured,
            number(gate.limit),
            Text(reason),
        )
    if report.notes:
        table.caption = Text("\n".join(report.notes))  # no markup, whatever stands in a note
    return table


def device_table(device: Mapping[str, Any]) -> Table:
    """What a device measured, as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "unit", "size", "p50 / p90 / p99", "prefill", "decode", "load", "peak", title_justify="left"
    )
    table.title = Text(f"{device['runtime']} on {device['chip']}, {device['system']}")
    for unit, figures in device["units"].items():
        peak = figures["peak_resident_bytes"]
        beside = f"{figures['load_s']:.2f} s", "" if peak is None else f"{peak / 1e6:.0f} MB"
        for row in figures["contexts"]:
            rates = (f"{row[f'{what}_tokens_per_s']:.1f} tokens/s" for what in ("prefill", "decode"))
            table.add_row(unit, str(row["context"]), _times(row, "token"), *rates, *beside)
        for row in figures["encodings"]:
            size, rate = f"{row['batch']} × {row['context']}", f"{row['tokens_per_s']:.0f} tokens/s"
            table.add_row(unit, size, _times(row, "run"), rate, "", *beside)
    return table


def _times(row: Mapping[str, float | None], what: str) -> str:
    """Percentiles in milliseconds; a dash for one that the samples do not carry."""
    values = [row[f"{what}_{q}_s"] for q in ("p50", "p90", "p99")]
    return " / ".join("–" if value is None else f"{value * 1e3:.2f}" for value in values) + " ms"


def throughput_table(figures: Mapping[str, Any]) -> Table:
    """Throughput as a table for the terminal."""
    from rich.table import Table

    if "runs" in figures:
        return _runs_table(figures)
    if "encodings" in figures:
        return _encodings_table(figures)
    table = Table(
        "context",
        "first token",
        "token p50 / p90 / p99",
        "prefill",
        "decode",
        "roofline",
        title_justify="left",
    )
    table.title = (
        f"{figures['runtime']} on {figures['device']}, resident {figures['resident_bytes'] / 1e6:.0f} MB"
    )
    for row in figures["contexts"]:
        table.add_row(
            str(row["context"]),
            f"{row['first_token_s'] * 1e3:.1f} ms",
            _times(row, "token"),
            f"{row['prefill_tokens_per_s']:.1f} tokens/s",
            f"{row['decode_tokens_per_s']:.1f} tokens/s",
            f"{row['roofline_fraction']:.0%} of {figures['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
        )
    return table


def _encodings_table(figures: Mapping[str, Any]) -> Table:
    """The same of an encoder."""
    from rich.table import Table

    table = Table("batch", "tokens", "run p50 / p90 / p99", "sequences", "tokens", title_justify="left")
    table.title = (
        f"{figures['runtime']} on {figures['device']}, resident {figures['resident_bytes'] / 1e6:.0f} MB"
    )
    for row in figures["encodings"]:
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            _times(row, "run"),
            f"{row['sequences_per_s']:.1f} / s",
            f"{row['tokens_per_s']:.0f} / s",
        )
    return table


def _runs_table(figures: Mapping[str, Any]) -> Table:
    """The same of a module."""
    from rich.table import Table

    table = Table("run p50 / p90 / p99", "weights read", title_justify="left")
    table.title = (
        f"{figures['runtime']} on {figures['device']}, resident {figures['resident_bytes'] / 1e6:.0f} MB"
    )
    for row in figures["runs"]:
        table.add_row(_times(row, "run"), f"{figures['bytes_per_token'] / 1e6:.2f} MB")
    return table
