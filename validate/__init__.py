"""Files and a running session in, verdict out. Knows no device."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tapeout import CalledByItsName
from tapeout.errors import TapeoutError, nearest
from tapeout.exporters import Artifact
from tapeout.models import EncoderConfig, Model, Seq2SeqConfig, TracedConfig
from tapeout.quantize import Quantized
from tapeout.validate import gates
from tapeout.validate.encoder_evidence import EncoderEvidence
from tapeout.validate.evidence import Evidence
from tapeout.validate.gates import Limits
from tapeout.validate.module_evidence import ModuleEvidence
from tapeout.validate.report import GateResult, Report
from tapeout.validate.roofline import operations
from tapeout.validate.seq2seq import Seq2SeqEvidence
from tapeout.validate.session import Device, Logits
from tapeout.validate.speed_gates import emulated, speed_gates
from tapeout.validate.throughput import machine, measure_encoder, measure_module, measure_throughput
from tapeout.validate.watch import Watch

__all__ = [
    "ENCODER_GATES",
    "GATES",
    "MODULE_GATES",
    "GateResult",
    "Limits",
    "Options",
    "Report",
    "evidence_of",
    "validate",
]

MODULE_GATES = ("integrity", "codes", "lowering", "quality", "decode", "tokenizer", "task")
ENCODER_GATES = ("integrity", "codes", "lowering", "padding", "quality", "tokenizer", "task")
GATES = ("integrity", "codes", "lowering", "decode", "quality", "tokenizer", "task")
_NOT_OF_MODULES = {
    "decode": "a plain module has no cache, and nothing is decoded with it.",
    "tokenizer": "a plain module takes arrays: there is no tokenizer.",
    "task": "a plain module takes arrays: there are no prompts with answers.",
}
_SPEED = "throughput"  # gates that exist where speed or memory was demanded
_NO_LIMIT = "required, but nothing was demanded: give --min-tokens-per-s, --max-ttft-ms or --max-memory."
_NOT_ASKED = "speed was not measured: it was not asked for."
_GOLDEN_PROMPTS = 3


@dataclass(frozen=True)
class Options:
    """How to validate.

    Attributes:
        limits: of the quality, task and throughput gates.
        text: evaluation text, UTF-8; None: the model's tasks, its ``heldout.txt``, or the text that ships with tapeout.
        tokens: most tokens that are evaluated.
        require: gates that count as failed when they are skipped.
        progress: called with (stage, done, total).
        throughput: whether it is measured too.
        files: digests that a package's manifest promises, by path below ``root``; None: the artifact's files must stay as they
            are while the gates run.
        watch: takes down stages and memory; None: one of its own.
    """

    limits: Limits = field(default_factory=Limits)
    text: Path | None = None
    tokens: int = 4096
    require: frozenset[str] = frozenset()
    progress: Callable[[str, int, int], None] | None = None
    throughput: bool = True
    files: Mapping[str, str] | None = None
    root: Path | None = None
    watch: Watch | None = None


def validate(
    artifact: Artifact, model: Model, quant: Quantized, device: Device, options: Options | None = None
) -> Report:
    """Run every gate on an artifact, and measure its throughput.

    Args:
        artifact: what the target's ``export`` gave.
        model: the original. quant: its canonical codes. device: the target.

    Raises:
        TapeoutError: ``options.require`` names no gate.
    """
    options = options or Options()
    check_names(options.require)
    root, files = options.root or artifact.directory, options.files
    if files is None:
        files = gates.digests(artifact)
    watch = options.watch or Watch()
    with watch, tempfile.TemporaryDirectory(prefix="tapeout-") as scratch:
        evidence = evidence_of(model)(
            artifact, model, quant, device, Path(scratch), options.text, options.tokens, options.progress
        )
        evidence.watch = watch
        try:
            found = [
                *_gate("codes", gates.codes, evidence),
                *_gate("lowering", gates.lowering, evidence),
                *_own_gates(evidence, options.limits),
            ]
            with evidence.stage("throughput"):
                throughput, why = _throughput(evidence) if options.throughput else ({}, _NOT_ASKED)
            found += speed_gates(throughput, **options.limits.speed, absent=why)
            evidence.compare_layers()
            with contextlib.suppress(TapeoutError):  # a gate has said why
                evidence.findings["evaluated"] = evidence.evaluated
            golden = _golden(evidence)
            arrays = _golden_arrays(evidence)
        finally:
            evidence.close()
    results = require([*gates.integrity(root, files), *found], options.require)
    return Report(
        model=model.name,
        target=device.name,
        scheme=quant.scheme.name,
        gates=tuple(results),
        throughput=throughput,
        machine=machine(),
        notes=(*artifact.notes, *_notes(quant)),
        golden=golden,
        golden_arrays=arrays,
        graph=model.graph,
        findings={**evidence.findings, **watch.findings()},
    )


def evidence_of(model: Model) -> type[Evidence]:
    """What validation gathers of a model of that kind."""
    if isinstance(model.config, EncoderConfig):
        return EncoderEvidence
    if isinstance(model.config, Seq2SeqConfig):
        return Seq2SeqEvidence
    return ModuleEvidence if isinstance(model.config, TracedConfig) and model.config.is_module else Evidence


def _own_gates(evidence: Evidence, limits: Limits) -> list[GateResult]:
    """The gates between lowering and throughput, which differ by the kind of model."""
    if isinstance(evidence, ModuleEvidence):
        return [
            *_gate("quality", lambda e: gates.module_quality(e, limits), evidence),
            *gates.absent(_NOT_OF_MODULES),
        ]
    of_text = [
        *_gate("tokenizer", gates.tokenizer, evidence),
        *_gate("task", lambda e: gates.task(e, limits), evidence),
    ]
    if isinstance(evidence, EncoderEvidence):
        return [
            *_gate("padding", gates.padding, evidence),
            *_gate("quality", lambda e: gates.encoder_quality(e, limits), evidence),
            *of_text,
        ]
    return [
        *_gate("decode", gates.decode, evidence),
        *_gate("quality", lambda e: gates.quality(e, limits), evidence),
        *_gate("quality/cache", lambda e: gates.cache(e, limits), evidence),
        *of_text,
    ]


def _gate(name: str, gate: gates.Gate[gates.E], evidence: gates.E) -> list[GateResult]:
    """Run a gate, and keep what it took."""
    with evidence.stage(name):
        return gates.guarded(name, gate, evidence)


def check_names(required: frozenset[str]) -> None:
    """TapeoutError for a required gate that does not exist."""
    for name in required:
        if name not in (known := list(dict.fromkeys([*GATES, *ENCODER_GATES, _SPEED]))):
            raise TapeoutError(f"'{name}' is not a gate{nearest(name, known)}.")


def require(results: list[GateResult], required: frozenset[str]) -> list[GateResult]:
    """Turn the skips of required gates into failures, and the lack of one too: an encoder has no decode gate."""
    ran = {gate.name.split("/")[0] for gate in results}
    absent = [
        GateResult(
            name,
            "failed",
            reason=_NO_LIMIT if name == _SPEED else "required, but a model of this kind has no such gate.",
        )
        for name in sorted(required - ran)
    ]
    return absent + [
        replace(gate, status="failed", reason=f"required, but skipped: {gate.reason}")
        if gate.status == "skipped" and gate.name.split("/")[0] in required
        else gate
        for gate in results
    ]


def _throughput(evidence: Evidence) -> tuple[Mapping[str, Any], str]:
    """What was measured, and why nothing was where it is empty."""
    try:
        facts = evidence.deployed.facts
        if facts.emulated:
            return {}, emulated(facts.runtime)
        if isinstance(evidence, ModuleEvidence):
            return measure_module(evidence.deployed, evidence.artifact, len(evidence.samples)), ""
        if isinstance(evidence, EncoderEvidence):
            return measure_encoder(evidence.deployed, evidence.artifact), ""
        found = measure_throughput(evidence.deployed, evidence.artifact)
        known = operations(evidence.quant.model)
        return found | ({"operations_per_token": known} if known else {}), ""
    except TapeoutError as error:
        return {}, f"speed was not measured: {error}"


def _golden(evidence: Evidence) -> tuple[tuple[tuple[int, ...], Logits], ...]:
    """Prompts, and the logits after each of the reference with the dequantized weights and the chosen cache; of encoders its first row."""
    if isinstance(evidence, ModuleEvidence):
        return ()
    try:
        pairs = list(zip(evidence.sequences, evidence.cached, strict=True))[:_GOLDEN_PROMPTS]
    except TapeoutError:
        return ()
    return tuple(evidence.golden(ids, rows) for ids, rows in pairs)


def _golden_arrays(evidence: Evidence) -> Mapping[str, npt.NDArray[Any]]:
    """The same of a module, which has no prompts."""
    try:
        return evidence.golden_arrays() if isinstance(evidence, ModuleEvidence) else {}
    except TapeoutError:  # a gate has said why
        return {}


def _notes(quant: Quantized) -> list[str]:
    notes = [*quant.notes, *(f"{name}: {reason}" for name, reason in quant.fallbacks.items())]
    if raised := sum(quant.clamped.values()):
        notes.append(
            f"{raised} groups of {len(quant.clamped)} tensors have weights too small for a float16 scale; theirs was raised to "
            "the smallest normal one (an error of at most 3e-5 a weight)"
        )
    return notes


sys.modules[__name__].__class__ = CalledByItsName
