"""How fast a package is on this machine, in the scenarios that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tapeout.errors import MemoryShort, MissingToolchain, TapeoutError
from tapeout.pack import Package
from tapeout.replay import demanded, measured, session_of
from tapeout.validate import GateResult, Report
from tapeout.validate.machine_state import memory_at_hand
from tapeout.validate.measuring import Asked, Place
from tapeout.validate.memory_watch import room_for, watched
from tapeout.validate.roofline import peaks, roofline
from tapeout.validate.scenarios import run
from tapeout.validate.session import Facts
from tapeout.validate.speed_gates import emulated, speed_gates
from tapeout.validate.throughput import READ_BY, cores, machine
from tapeout.validate.worker import borrowed

__all__ = ["Bench", "bench"]


@dataclass(frozen=True)
class Bench:
    """What was measured of a package.

    Attributes:
        figures: see ``measure_throughput`` and ``scenarios.run``; ``roofline`` besides.
        gates: a verdict for each limit of speed or memory that was given.
    """

    package: Package
    figures: Mapping[str, Any]
    gates: Sequence[GateResult] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether no limit was missed."""
        return all(gate.status != "failed" for gate in self.gates)

    def report(self) -> Report:
        """The package's report with these figures of this machine in place of its own; PackageError: it has none."""
        own = Report.read(self.package.directory / "report.json")
        gates = [gate for gate in own.gates if not gate.name.startswith("throughput/")]
        return replace(own, gates=(*gates, *self.gates), throughput=self.figures, machine=machine())


def bench(
    directory: Path,
    contexts: Sequence[int] = (),
    progress: Callable[[str, int, int], None] | None = None,
    *,
    asked: Asked | None = None,
    speed: Mapping[str, Any] | None = None,
) -> Bench:
    """Measure a package: the short measurement that every report has, then the scenarios that are asked for.

    Args:
        directory: the package.
        contexts: of the short measurement, in tokens; default: see ``measure_throughput``.
        progress: called with (stage, done, total).
        asked: scenarios, and how many samples; None: no scenario.
        speed: limits over the package's own, see ``Limits.speed``.

    Raises:
        MemoryShort: the weights and the shortest context do not fit the memory at hand. MissingToolchain: nothing of the target runs here.
        TapeoutError: a context that there is none of; too few samples or seconds.
    """
    package, asked = Package.open(directory), asked or Asked()
    known = package.operations
    limits = demanded(package, speed=speed)
    _check_kind(package, contexts, asked)
    _check_memory(package, contexts, asked)
    with session_of(package) as session, watched(session, "bench", asked.root):
        facts = session.facts
        if facts.emulated:
            raise MissingToolchain(
                f"{directory} is for {package.manifest['needs']['runtime']}: {emulated(facts.runtime)}"
            )
        most = facts.context - (package.encoder_output is None)
        if wrong := [context for context in contexts if not 1 <= context <= most]:
            raise TapeoutError(
                f"a context of {wrong[0]} tokens cannot be measured; this package takes 1 … {most}."
            )
        if progress:
            progress("bench", 0, 1)
        figures = measured(package, session, contexts)
        lengths = [row["context"] for row in figures.get("contexts", ())]
        roof = (session.roof() or _processor(package, facts)) if known else None
        caches = {length: session.cache_bytes(length) for length in lengths} if known else {}
    if asked.scenarios:
        limited = replace(asked, max_ttft_ms=limits.speed.get("max_ttft_ms"))
        figures |= run(_place(package, facts.context, progress), limited)
    own = _cache_bytes(package)
    for row in figures.get("contexts", ()):
        row["cache_bytes"] = caches.get(row["context"]) or own(row["context"])
    if known and roof:
        rows = [
            {**row, "prefill_s": row.get("prefill_s") or row["first_token_s"], "token_s": row["token_p50_s"]}
            for row in figures.get("context_sweep") or figures["contexts"]
        ]
        read = package.artifact.bytes_per_token, figures["bandwidth_bytes_per_s"]
        drawn = roofline(known, *read, roof["peaks"], rows, roof["chunk"])
        figures["roofline"] = drawn | {
            "device": facts.device,
            "bandwidth_measured_with": roof["bandwidth_measured_with"],
        }
    return Bench(package, figures, speed_gates(figures, **limits.speed))


def _processor(package: Package, facts: Facts) -> dict[str, Any] | None:
    """What this machine's processor computes, as ``device_peaks.roof`` tells it of a GPU; None: the session runs elsewhere."""
    if facts.bandwidth is not None or not facts.device.startswith("cpu"):
        return None
    chunk = getattr(package.target(), "prefill_chunk", 512)
    return {"peaks": peaks(cores()), "bandwidth_measured_with": READ_BY, "chunk": chunk}


def _place(package: Package, context: int, progress: Callable[[str, int, int], None] | None) -> Place:
    target, artifact = package.target(), package.artifact
    batched = getattr(target, "batched", None)
    return Place(
        spec=target.session(artifact),
        opened=borrowed,
        batched=batched and (lambda sequences, tokens: batched(artifact, sequences, tokens)),
        context=context,
        full=artifact.context,
        cores=cores(),
        cache_bytes=_cache_bytes(package),
        progress=progress,
    )


def _cache_bytes(package: Package) -> Callable[[int], int]:
    """Bytes of keys and values of that many tokens: their share of a full context's, which is too much where there are windows."""
    whole = package.manifest["needs"]["key_value_cache_bytes"]
    context = max(1, package.artifact.context)
    return lambda tokens: -(-whole * min(tokens, context) // context)


def _check_kind(package: Package, contexts: Sequence[int], asked: Asked) -> None:
    """TapeoutError for what a package of this kind has nothing of."""
    if package.is_module and contexts:
        raise TapeoutError(
            f"{package.directory} holds a plain module, which is measured on its own samples: leave out --contexts."
        )
    if asked.scenarios and (package.is_module or package.encoder_output):
        kind = "a plain module" if package.is_module else "an encoder"
        raise TapeoutError(
            f"{package.directory} holds {kind}: the scenarios are of models that generate. Leave out --scenario."
        )


def _check_memory(package: Package, contexts: Sequence[int], asked: Asked) -> None:
    """MemoryShort before anything is loaded, when weights, work and the shortest context's cache are more than there is."""
    needs = package.manifest["needs"]
    shortest = min([*contexts, 16])
    least = needs["memory_bytes"] - needs["key_value_cache_bytes"] + _cache_bytes(package)(shortest)
    if room_for(least, asked.root):
        raise MemoryShort(
            f"{package.directory} needs {least / 1e9:.3g} GB for weights, work and a context of {shortest} tokens "
            f"({needs['memory_bytes'] / 1e9:.3g} GB at {package.artifact.context}); {memory_at_hand(asked.root) / 1e9:.3g} GB of memory are "
            "at hand. Nothing was loaded. What fits: fewer bits, a smaller model, or a machine with more."
        )
