"""Where a package stands by size and loss among what this machine has measured of the same model: records that every export leaves.

    CACHE/positions/SOURCE/KEY.json     format_version, evaluated, measure, scheme, mixed, rounding, target, format, bytes, loss

SOURCE is the digest of the model's tensors, KEY that of what was chosen and of what the loss was measured on: a later export of
the same choice takes the earlier one's place. Losses are compared on the same tokens only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Exact
from tapeout.files import cache_directory, canonical_json
from tapeout.quantize import SCHEMES, Quantized, Scheme, planned
from tapeout.targets import Target
from tapeout.validate.report import Report

__all__ = ["FORMAT_VERSION", "placed"]

FORMAT_VERSION = 1
_LOSSES = ("quality/kl", "quality/cosine", "quality/error")
_SHOWN = 40
_FIELDS = {"scheme": str, "mixed": bool, "rounding": str, "target": str, "format": str, "bytes": int, "loss": float}  # fmt: skip


def placed(report: Report, artifact: Artifact, quant: Quantized, target: Target) -> Report:
    """Leave a record of an export, and add to its report what was measured of the same model before: ``findings.alternatives``.

    The report comes back as it is where no gate measured a loss. A cache that cannot be written is no reason to lose an export.
    """
    gate = next((gate for gate in report.gates if gate.name in _LOSSES and gate.value is not None), None)
    evaluated = report.findings.get("evaluated")
    if gate is None or evaluated is None or not math.isfinite(gate.value or 0.0):
        return report
    schemes = {
        name: scheme.name for name, scheme in quant.schemes.items() if quant.model.specs[name].role.is_matrix
    }
    usual = planned(quant.model, None if quant.model.quantization else quant.scheme, quant.rounding, {})
    files = (path for path in artifact.directory.rglob("*") if path.is_file())
    own = {
        "scheme": quant.scheme.name,
        "mixed": any(scheme != usual.schemes[name].name for name, scheme in schemes.items()),
        "rounding": quant.rounding,
        "target": target.name,
        "format": artifact.format,
        "bytes": sum(path.stat().st_size for path in files),
        "loss": gate.value,
    }
    about = {"format_version": FORMAT_VERSION, "measure": gate.metric, "evaluated": evaluated["sha256"]}
    chosen = {key: own[key] for key in ("scheme", "rounding", "target", "format")}
    chosen |= {"schemes": schemes, "calibration": quant.calibration_sha256}
    key = hashlib.sha256(canonical_json(about | chosen).encode()).hexdigest()[:32]
    place = cache_directory() / "positions" / quant.source_sha256
    others = list(_others(place, about, key))
    with contextlib.suppress(OSError):
        _write(place / f"{key}.json", about | own)
    # Those of the same target first, where there is no room for all.
    others.sort(key=lambda row: (row["target"] != target.name, row["bytes"], row["loss"]))
    rows = [*({**row, "this": False} for row in others[: _SHOWN - 1]), {**own, "this": True}]
    rows.sort(key=lambda row: (row["bytes"], row["loss"]))
    found = {"measure": gate.metric, "rows": rows, "unmeasured": _unmeasured(quant, target, rows)}
    return replace(report, findings={**report.findings, "alternatives": found})


def _others(place: Path, about: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Records of the same model that are compared on the same, but for that under ``key``; what is no record is passed over."""
    for path in sorted(place.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads(path.read_text(encoding="utf-8"))
            if path.stem != key and all(raw[name] == value for name, value in about.items()):
                row = {name: raw[name] for name in _FIELDS}
                if all(isinstance(row[name], kind) for name, kind in _FIELDS.items()):
                    yield row


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(canonical_json(record))
    Path(partial).replace(path)


def _unmeasured(quant: Quantized, target: Target, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Schemes that the target carries exactly and no row has: name, and bits a weight over all matrices, codes and scales."""
    if quant.model.quantization is not None:
        return []
    measured = {row["scheme"] for row in rows if row["target"] == target.name and not row["mixed"]}
    matrices = {name: spec.shape for name, spec in quant.model.specs.items() if spec.role.is_matrix}
    found = []
    for scheme in SCHEMES.values():
        if scheme.kind == "none" or scheme.name in measured:
            continue
        with contextlib.suppress(TapeoutError):  # its groups divide no rows of this model
            schemes = planned(quant.model, scheme, "rtn", {}).schemes
            bits = {name: _bits(target, schemes[name], shape[1]) for name, shape in matrices.items()}
            if matrices and None not in bits.values():
                total = sum((bits[name] or 0.0) * math.prod(shape) for name, shape in matrices.items())
                mean = total / sum(map(math.prod, matrices.values()))
                found.append({"scheme": scheme.name, "bits": round(mean, 3)})
    return sorted(found, key=lambda each: each["bits"])


def _bits(target: Target, scheme: Scheme, in_features: int) -> float | None:
    """Bits a weight of a scheme, or those that the target says it holds it in; None: it does not carry it exactly."""
    carry = target.carries(scheme)
    return (carry.bits or scheme.bits_per_weight(in_features)) if isinstance(carry, Exact) else None
