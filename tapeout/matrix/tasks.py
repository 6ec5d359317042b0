"""What is to be done and what came of it: tasks, outcomes, and the digests by which a finished one is known again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from tapeout import __version__
from tapeout.errors import PackageError
from tapeout.files import canonical_json, file_sha256, write_whole
from tapeout.models import Model
from tapeout.pack import Package
from tapeout.recipe import Recipe

FORMAT_VERSION = 1
Kind = Literal["codes", "cell", "speed"]
Status = Literal["passed", "failed", "error", "refused", "skipped", "not run"]
"""``failed``: a gate did. ``error``: something broke, and nothing is proven. ``refused``: the target cannot carry it, or the machine cannot
hold it. ``skipped``: a toolchain is missing."""
RED: tuple[Status, ...] = ("failed", "error", "not run")


@dataclass(frozen=True)
class Task:
    """A piece of work for a process of its own; everything in it is JSON.

    Attributes:
        name: of a cell the cell's; of the codes that cells share ``codes MODEL.SCHEME.ROUNDING``; of a measurement ``speed CELL``.
        model: what ``load`` takes. recipe: what ``Recipe.of`` takes. target, options: of a cell.
        out: the package's directory. log: what the process says.
        inputs: digest of all that decides the result. codes: of all that decides the codes.
        memory_bytes: most that its processes are predicted to take.
        needs: tasks that must have passed before.
        cache: where finished work is shared; None: nowhere.
        alone: whether nothing may run beside it.
    """

    name: str
    kind: Kind
    model: str
    recipe: Mapping[str, Any]
    inputs: str
    codes: str
    log: str
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    out: str = ""
    memory_bytes: int = 0
    needs: tuple[str, ...] = ()
    cache: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        reason: one paragraph where it did not pass.
        seconds: that it took. peak_bytes: most memory that its processes held at once, as far as it was seen; 0: it was not looked at.
        figures: see ``figures.of``. notes: what a user has to know of how it went.
    """

    name: str
    status: Status
    reason: str = ""
    inputs: str = ""
    root_sha256: str | None = None
    codes_sha256: str | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def red(self) -> bool:
        """Whether it makes the matrix fail."""
        return self.status in RED

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "notes": list(self.notes)}

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Outcome:
        """What ``to_json`` gave; PackageError for what is none."""
        try:
            if raw["format_version"] > FORMAT_VERSION:
                raise PackageError(
                    f"{raw.get('name')} has format_version {raw['format_version']}; this tapeout reads up to {FORMAT_VERSION}: upgrade it."
                )
            known = {key: raw[key] for key in cls.__dataclass_fields__ if key in raw}
            return cls(**known | {"notes": tuple(raw["notes"])})
        except (KeyError, TypeError) as error:
            raise PackageError(f"this is no outcome of a cell: {error!r}.") from error


class Told(Protocol):
    """Called with what a task is at: a stage, how much of it is done, and how much there is."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


class Executor(Protocol):
    """Does tasks: here, or on other machines. Called from threads, as many at once as there are jobs."""

    def __call__(self, task: Task, told: Told) -> Outcome:
        """Do a task and give what came of it; never raises for what the task itself met."""

    def used(self) -> Mapping[str, int]:
        """Bytes of memory that each running task holds now, by name; a task that is missing holds none yet."""

    def stop(self) -> None:
        """End what runs, so that nothing half-written stays; calls that wait return."""


class States:
    """Outcomes on disk, a file a cell, each written whole: ``cells/NAME.json`` below the matrix's output."""

    def __init__(self, out: Path) -> None:
        self._directory = out / "cells"

    def read(self, name: str) -> Outcome | None:
        """What came of a cell; None: nothing is known."""
        try:
            return Outcome.of(json.loads((self._directory / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, PackageError):  # it is made again
            return None

    def write(self, outcome: Outcome) -> None:
        """Keep what came of a cell."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._directory / f"{outcome.name}.json", canonical_json(outcome.to_json()))


def finished(task: Task, known: Outcome | None) -> Outcome | None:
    """What is known of a task, if nothing needs to be done: it passed or was refused from the same inputs, and its package is whole."""
    if known is None or known.inputs != task.inputs or known.status not in ("passed", "refused"):
        return None
    if known.status == "passed":
        try:
            package = Package.open(Path(task.out))
        except PackageError:
            return None
        if package.manifest["root_sha256"] != known.root_sha256 or package.damage():
            return None
    return known


def codes_digest(model: Model, recipe: Recipe, source: str) -> str:
    """Digest of all that decides a model's codes; ``source`` is that of its files."""
    calibration = recipe.calibration and {
        **asdict(recipe.calibration),
        "text": recipe.calibration.text_sha256(model),
    }
    return _digest(
        {
            "format_version": FORMAT_VERSION,
            "tapeout": __version__,
            "source": source,
            "scheme": recipe.scheme_given,
            "rounding": recipe.rounding,
            "tensors": dict(recipe.tensors),
            "calibration": calibration,
        }
    )


def cell_digest(codes: str, recipe: Recipe, target: str, options: Mapping[str, Any]) -> str:
    """Digest of all that decides a package and its verdict: the codes, the target, the limits, and what runs the gates."""
    return _digest(
        {
            "codes": codes,
            "target": target,
            "options": dict(options),
            "limits": asdict(recipe.limits),
            "text": file_sha256(recipe.text) if recipe.text else None,
            "tokens": recipe.tokens,
            "versions": _versions(),
        }
    )


class Sources:
    """Digests of models' files, remembered by size and time so that a second run reads none of them.

    Args:
        memory: where. write: whether they are kept there.
    """

    def __init__(self, memory: Path, write: bool = True) -> None:
        self._memory, self._write = memory, write
        try:
            self._known: dict[str, list[Any]] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def digest(self, model: Model) -> str:
        """Digest of every file of a model's directory, and of the file that its tensors lie in."""
        files = {
            path
            for path in model.directory.rglob("*")
            if path.is_file() and not _hidden(path, model.directory)
        }
        files |= {tensor.file for tensor in model.checkpoint.values()}
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(self._file, sorted(files)))
        if self._write:
            self._memory.write_text(json.dumps(self._known), encoding="utf-8")
        names = [
            path.relative_to(model.directory).as_posix()
            if path.is_relative_to(model.directory)
            else path.name
            for path in sorted(files)
        ]
        return _digest(dict(zip(names, digests, strict=True)))

    def _file(self, path: Path) -> str:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:2] != stamp:
            known = self._known[str(path)] = [*stamp, file_sha256(path)]
        return str(known[2])


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(directory).parts)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    """What tapeout may run, of what is installed: a gate's verdict is that of these versions."""
    found = {}
    for said in importlib.metadata.requires("tapeout") or ():
        if "extra == 'dev'" in said.replace('"', "'"):
            continue
        match = re.match(r"[A-Za-z0-9._-]+", said)
        name = match[0] if match else ""
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def after(outcome: Outcome, task: Task) -> Outcome:
    """What becomes of a task that needed another one, which did not pass."""
    return replace(
        outcome,
        name=task.name,
        inputs=task.inputs,
        seconds=0.0,
        peak_bytes=0,
        reason=f"its codes: {outcome.reason}",
        notes=(),
        figures={},
    )


def worst(outcomes: Iterable[Outcome]) -> dict[Status, int]:
    """How many outcomes there are of each status, the worst first."""
    order: tuple[Status, ...] = ("failed", "error", "not run", "skipped", "refused", "passed")
    counted = [outcome.status for outcome in outcomes]
    return {status: counted.count(status) for status in order if status in counted}
