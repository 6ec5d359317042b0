"""The few figures of a report that a matrix shows and compares with an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeout.validate.report import Report

_QUALITY = ("quality/kl", "quality/cosine", "quality/error")
"""What a scheme costs, by the kind of model: a decoder, an encoder, a module."""


def of(report: Report) -> dict[str, Any]:
    """What is compared, as JSON; a key is missing where nothing was measured.

    Returns:
        quality: value, metric and gate of what the scheme costs. artifact_bytes. speed: tokens (of a module: runs) a second, its
        ``unit``, ``p50_s`` and ``p90_s``. gates: how many of each status. skipped: names of the gates that did not run. format,
        processor.
    """
    found: dict[str, Any] = {
        "gates": {
            status: sum(gate.status == status for gate in report.gates)
            for status in ("passed", "failed", "skipped")
        },
        "skipped": [gate.name for gate in report.gates if gate.status == "skipped"],
        "artifact_bytes": report.provenance.get("artifact_bytes"),
        "format": report.provenance.get("format"),
        "processor": report.machine.get("processor"),
        "task": next((gate.value for gate in report.gates if gate.name == "task"), None),
    }
    for gate in report.gates:
        if gate.name in _QUALITY and gate.value is not None:
            found["quality"] = {"gate": gate.name, "metric": gate.metric, "value": gate.value}
            break
    found["speed"] = speed(report.throughput)
    return {key: value for key, value in found.items() if value not in (None, {})}


def speed(throughput: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rate that stands for speed, at the longest context or the largest batch; None: none was measured."""
    for rows, rate, unit in (
        ("contexts", "decode_tokens_per_s", "tokens/s"),
        ("encodings", "tokens_per_s", "tokens/s"),
    ):
        if found := throughput.get(rows):
            return {"value": found[-1][rate], "unit": unit}
    if runs := throughput.get("runs"):
        return {"value": 1 / runs[-1]["run_p50_s"], "unit": "runs/s"}
    return None
