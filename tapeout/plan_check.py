"""What a plan says of a target, beside what was measured of it on this machine: the benchmark and the tests ask the same functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from tapeout.devices import table
from tapeout.exporters import Artifact
from tapeout.models import Model
from tapeout.plan import plan
from tapeout.targets import Target
from tapeout.validate.throughput import bandwidth, machine
from tapeout.validate.timing import Timing
from tapeout.validate.worker import WorkerSession, open_session

__all__ = ["LIMITS", "compared", "files_bytes", "filled", "lines", "measured", "planned"]

LIMITS = {"size": 0.01, "memory": 0.10, "speed": 0.25}
"""How far a plan may be off, as a share of what was measured."""

NEW = 16
"""Tokens that are decoded at the end of the context."""


def planned(
    source: Path | Model,
    way: str,
    scheme: str,
    context: int,
    bandwidth_bytes_per_s: float,
    here: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """What a plan says of a machine's CPU: ``size`` and ``memory`` in bytes, ``speed`` in tokens/s where it estimates one.

    Args:
        source: a model, or a directory with ``config.json``.
        way: a target and a format of it, as ``targets.variants`` names them.
        scheme: what it is quantized as.
        context: tokens of the sequence.
        bandwidth_bytes_per_s: of the machine, as it was measured.
        here: the machine, as ``throughput.machine`` describes it; None: this one.
    """
    here, (name, *_) = here or machine(), way.split()
    cpu = replace(
        table()["cpu"],
        targets=(name,),
        gb_per_s=bandwidth_bytes_per_s / 1e9,
        cores=here["cores"],
        memory_gb=here["memory_bytes"] / 1e9,
    )
    found = plan(source, [cpu], [name], [scheme], context=context)
    (row,) = [row for row in found.rows if row.target == way]
    (fit,) = row.fits
    told: dict[str, float] = {"size": row.artifact_bytes, "memory": fit.resident}
    return told | ({"speed": fit.tokens_per_s[0]} if fit.tokens_per_s else {})


def measured(target: Target, artifact: Artifact, context: int, repeats: int) -> dict[str, float]:
    """What a target takes here: bytes by which its runtime's process has grown once a context is full, tokens/s at its end.

    Returns:
        size, memory (bytes), speed (tokens/s; of the median token), bandwidth (bytes/s, the better of before and after).
    """
    before = bandwidth()
    with open_session(target.session(artifact)) as session:
        memory, timing = filled(session, context, repeats)
    token_s = statistics.median(second for repeat in timing.decode_s for second in repeat)
    return {
        "size": files_bytes(artifact),
        "memory": memory,
        "speed": 1 / token_s,
        "bandwidth": max(before, bandwidth()),
    }


def filled(session: WorkerSession, context: int, repeats: int) -> tuple[int, Timing]:
    """Bytes by which a session's process has grown since it was empty, once its context was full, and the times of filling it."""
    process = psutil.Process(session.pid)
    empty = process.memory_info().rss - session.facts.resident_bytes
    timing = session.time(context - NEW, NEW, repeats)
    return process.memory_info().rss - empty, timing


def lines(row: Mapping[str, Any]) -> list[str]:
    """A row of ``compared`` in words: planned, measured, how far apart, and MISSES where that is beyond the limit."""
    told = []
    for key, value in row["planned"].items():
        off = value / row["measured"][key] - 1
        verdict = "within" if abs(off) <= LIMITS[key] else "MISSES"
        told.append(f"{key} {value:.6g} for {row['measured'][key]:.6g}, {off:+.1%} {verdict}")
    return told


def compared(
    model: Model,
    way: str,
    scheme: str,
    target: Target,
    artifact: Artifact,
    context: int,
    repeats: int | None,
) -> dict[str, Any]:
    """A row of what was planned and what was measured, each by ``size``, ``memory`` and ``speed``, and the bandwidth that was planned with.

    Args:
        model, way, scheme, context: see ``planned``.
        target, artifact: the target with its options, and what it exported for this context.
        repeats: see ``measured``; None: this machine is no device of the target, and sizes alone are compared.
    """
    row: dict[str, Any] = {"target": way, "scheme": scheme, "context": context}
    if repeats is None:
        found: dict[str, float] = {"size": files_bytes(artifact)}
    else:
        found = measured(target, artifact, context, repeats)
        row["bandwidth_bytes_per_s"] = found.pop("bandwidth")
    told = planned(model, way, scheme, context, row.get("bandwidth_bytes_per_s", 1e9))
    return row | {"planned": {key: told[key] for key in found if key in told}, "measured": found}


def files_bytes(artifact: Artifact) -> int:
    """Bytes of the files that the runtime loads."""
    return sum((artifact.directory / file).stat().st_size for file in artifact.files)
