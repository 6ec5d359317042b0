"""What a device found of a package, and how it is put into the package's report.

The script that a package brings along (``check.py``, and ``check.cpp`` of GGUF) writes ``device_report.json`` on the device, where there is
no tapeout. This is the one place that says what stands in it, whatever the target.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tapeout.errors import PackageError
from tapeout.pack import Package
from tapeout.validate.report import GateResult, Report, Status

FORMAT_VERSION = 1
FILES = "files"
"""The unit whose gates look at the package and run nothing."""

# Artifacts whose session is emulated have a note with these words; it is not true any more once a device has run them.
_NOT_RUN = re.compile(r"\bnot run on .+ hardware\b")

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+$")]
"""Of a unit or a gate: a part of ``device/<unit>/<gate>``."""
Words = Annotated[str, StringConstraints(max_length=4000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]
"""What a terminal and a page can show: a report comes from elsewhere."""
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DeviceGate(_Part):
    """A gate that ran on the device; its fields are those of ``GateResult``."""

    name: Name
    status: Status
    metric: Words
    value: float | None
    limit: float | None
    reason: Words

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status == "passed" and (self.value is None or self.limit is None):
            raise ValueError("a gate that passed has a value and a limit")
        if self.status == "passed" and not self.value <= self.limit:  # type: ignore[operator]
            raise ValueError(f"it says passed, and {self.value:g} is above its limit of {self.limit:g}")
        if self.status != "passed" and not self.reason:
            raise ValueError("a gate that did not pass says why")
        return self


class Context(_Part):
    """Speed of a decoder after a prompt of ``context`` tokens, as ``measure_throughput`` has it."""

    context: Count
    first_token_s: Seconds
    token_p50_s: Seconds
    token_p90_s: Seconds
    token_p99_s: Seconds
    samples: Count
    prefill_tokens_per_s: Seconds
    decode_tokens_per_s: Seconds


class Encoding(_Part):
    """Speed of an encoder on a batch, as ``measure_encoder`` has it."""

    batch: Count
    context: Count
    run_p50_s: Seconds
    run_p90_s: Seconds
    run_p99_s: Seconds
    samples: Count
    sequences_per_s: Seconds
    tokens_per_s: Seconds


class DeviceThroughput(_Part):
    """Of one unit.

    Attributes:
        load_s: seconds until its functions were loaded, compilation included where the runtime compiles then.
        first_run_s: of the first call of each function.
        peak_resident_bytes: of the process; None where the system does not tell.
    """

    load_s: Seconds
    first_run_s: Seconds
    peak_resident_bytes: Count | None
    contexts: tuple[Context, ...] = ()
    encodings: tuple[Encoding, ...] = ()


class Unit(_Part):
    """What one part of the device found: a compute unit, a processor.

    Attributes:
        throughput: None where it could not be measured.
    """

    gates: Annotated[tuple[DeviceGate, ...], Field(min_length=1)]
    throughput: DeviceThroughput | None


class Device(_Part):
    """The machine, without its name.

    Attributes:
        machine: its model (``Mac14,6``).
        system: with its version (``macOS 15.1``).
        chip: (``Apple M2 Max``).
    """

    machine: Words
    system: Words
    chip: Words
    memory_bytes: Count | None


class DeviceReport(_Part):
    """``device_report.json``.

    Attributes:
        root_sha256: of the package that was run.
        runtime: name and version of what ran it.
        units: by name.
    """

    format_version: Literal[1]
    root_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    device: Device
    runtime: Words
    units: Annotated[dict[Name, Unit], Field(min_length=1, max_length=64)]

    @classmethod
    def read(cls, path: Path, package: Package) -> DeviceReport:
        """Read one.

        Raises:
            PackageError: it is none, was cut short or edited, is of a newer format, or of another package.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PackageError(f"the device report {path} cannot be read: {error.strerror}.") from error
        return cls.parse(data, str(path), package)

    @classmethod
    def parse(cls, data: bytes, path: str, package: Package) -> DeviceReport:
        """The same of its bytes; ``path`` is what errors call it."""
        try:
            raw = json.loads(data.decode("utf-8"))
            if not isinstance(raw, dict):
                raise TypeError("it is no JSON object")
            version = int(raw["format_version"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise PackageError(
                f"{path} is not a device report: {why}. It was cut short, or is of something else: run the script on the device again."
            ) from error
        if version > FORMAT_VERSION:
            raise PackageError(
                f"{path} has format_version {version}; this tapeout reads up to {FORMAT_VERSION}: upgrade it."
            )
        try:
            found = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise PackageError(
                f"{path} is not a whole device report: {key}: {first['msg']}. Run the script on the device again."
            ) from None
        if found.root_sha256 != (root := package.manifest["root_sha256"]):
            raise PackageError(
                f"{path} is of another package: it was made of the root digest {found.root_sha256[:16]}…, {package.directory} has "
                f"{root[:16]}…. Run the script of this package on the device."
            )
        return found

    @property
    def gates(self) -> tuple[GateResult, ...]:
        """All of them, as ``device/<unit>/<gate>``."""
        return tuple(
            GateResult(**{**gate.model_dump(), "name": f"device/{unit}/{gate.name}"})
            for unit, found in self.units.items()
            for gate in found.gates
        )

    def merged(self, report: Report) -> Report:
        """A package's report with what the device found: gates, throughput by unit, and a note of where it ran."""
        ran = [
            name
            for name, unit in self.units.items()
            if name != FILES and any(gate.status == "passed" for gate in unit.gates)
        ]
        # A processor may run what is for a GPU, or its twin, which says nothing of that.
        there = any(name != "cpu" for name in ran)
        notes = [note for note in report.notes if not (there and _NOT_RUN.search(note))]
        where = f"{self.device.chip}, {self.device.system}"
        note = f"run on {where} ({', '.join(ran)})" if ran else f"nothing of it ran on {where}"
        facts: dict[str, Any] = {**self.device.model_dump(), "runtime": self.runtime}
        speed = {name: unit.throughput.model_dump() for name, unit in self.units.items() if unit.throughput}
        return replace(
            report,
            gates=(*report.gates, *self.gates),
            notes=(*notes, f"{note}: device_report.json"),
            device=facts | {"units": speed},
        )
