"""What is installed of what tapeout wants: versions against ranges, copies, rivals for one module, and whether each can be imported."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

__all__ = ["Wanted", "broken_imports", "copies", "extras", "fits", "rivals", "unmet", "version", "wanted"]

# Prints a JSON line a module; what the modules print themselves goes to stderr.
_IMPORT = """\
import importlib, json, os, sys
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
path, names = json.loads(sys.argv[1])
sys.path[:] = path
for name in names:
    try:
        importlib.import_module(name)
        said = None
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said]), file=told, flush=True)
"""
_PATIENCE_S = 300.0  # for all imports together, on a cold and busy machine
# numpy 2 to what was compiled for numpy 1 (numpy/core/_multiarray_umath and its C API), and numpy 1 to what was compiled for 2.
_ABI = re.compile(
    r"compiled (using|against) NumPy|_ARRAY_API not found|numpy\.core\.multiarray failed|numpy\.dtype size changed|ABI version"
)


@dataclass(frozen=True)
class Wanted:
    """A distribution that tapeout wants.

    Attributes:
        name: as the index has it, normalized.
        range: of versions.
        extras: that ask for it; the empty name stands for tapeout itself.
    """

    name: str
    range: SpecifierSet
    extras: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}{self.range}"


def extras() -> list[str]:
    """The extras of the installed tapeout."""
    return metadata.metadata("tapeout").get_all("Provides-Extra") or []


def wanted() -> dict[str, Wanted]:
    """What the installed tapeout's own metadata asks for, by name; an extra that names another brings what that one does."""
    found: dict[str, Wanted] = {}
    for extra in ("", *extras()):
        for each in _of("tapeout", extra):
            before = found.get(name := canonicalize_name(each.name))
            both = each.specifier & before.range if before else each.specifier
            found[name] = Wanted(
                name, both, tuple(dict.fromkeys((*(before.extras if before else ()), extra)))
            )
    return found


def _of(distribution: str, extra: str = "") -> Iterator[Requirement]:
    """What a distribution asks for with an extra and not without it, or without any."""
    for text in metadata.requires(distribution) or ():
        each = Requirement(text)
        plain = each.marker is None or each.marker.evaluate({"extra": ""})
        if plain if not extra else not plain and each.marker and each.marker.evaluate({"extra": extra}):
            if canonicalize_name(each.name) == canonicalize_name(distribution):
                for inner in sorted(each.extras):
                    yield from _of(distribution, inner)
            else:
                yield each


def version(name: str) -> str | None:
    """The version that Python would import; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(found: str, wanted: SpecifierSet) -> bool:
    """Whether a version is in a range; one that follows no scheme is in none."""
    try:
        return wanted.contains(Version(found), prereleases=True)
    except InvalidVersion:
        return False


def copies(name: str) -> list[tuple[str, Path]]:
    """Version and folder of each copy of a distribution on ``sys.path``, in the order that Python looks."""
    found = {
        (each.version, Path(str(each.locate_file(""))).resolve()): None
        for each in metadata.distributions(name=name)
    }
    return list(found)


def rivals(names: Collection[str]) -> dict[str, list[str]]:
    """Modules of these distributions that another distribution brings too: whichever was installed last has overwritten the other."""
    found = {}
    for module, owners in metadata.packages_distributions().items():
        owners = sorted({canonicalize_name(each) for each in owners})
        if len(owners) > 1 and set(owners) & set(names):
            first = PurePosixPath(module, "__init__.py")  # a namespace that several share has none
            both = [each for each in owners if first in (metadata.distribution(each).files or ())]
            if len(both) > 1:
                found[module] = both
    return found


def unmet(names: Collection[str]) -> Iterator[tuple[str, Requirement, str]]:
    """Of these distributions who asks for what version of another, and which is here instead."""
    for name in names:
        if version(name) is None:
            continue
        for each in _of(name):
            found = version(each.name)
            if found is not None and not fits(found, each.specifier):
                yield name, each, found


def modules(name: str) -> list[str]:
    """What an installed distribution is imported as."""
    usual = name.replace("-", "_")
    parts = [
        path.parts[:-1] for path in metadata.distribution(name).files or () if path.name == "__init__.py"
    ]
    parts = [each for each in parts if all(part.isidentifier() and not part.startswith("_") for part in each)]
    if not parts or (usual,) in parts:
        return [usual]
    depth = min(map(len, parts))
    return sorted(
        ".".join(each) for each in parts if len(each) == depth and each[-1] not in ("test", "tests")
    )


def broken_imports(names: Collection[str]) -> dict[str, str]:
    """Import what these installed distributions bring, in other processes; what Python says of those that cannot be, by distribution.

    All are imported in one process, and what fails there once more in its own: only what fails alone is at fault itself.
    """
    owner = {module: name for name in names for module in modules(name)}
    found: dict[str, str] = {}
    for module in _failing(list(owner)):
        for said in _failing([module]).values():
            found[owner[module]] = said
    return found


def _failing(names: list[str]) -> Mapping[str, str]:
    """Which of these modules cannot be imported, and why."""
    found: dict[str, str] = {}
    while names:
        command = [sys.executable, "-P", "-c", _IMPORT, json.dumps([sys.path, names])]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                printed, late = process.communicate(timeout=_PATIENCE_S), False
            except subprocess.TimeoutExpired:
                process.kill()
                printed, late = process.communicate(), True
        out, err = (each.decode(errors="replace") for each in printed)
        told: dict[str, str | None] = dict(map(json.loads, out.splitlines()))
        for name, said in told.items():
            if said is not None:
                found[name] = _in_words(said, err if len(names) == 1 else "")
        names = names[len(told) :]
        if names:  # it died in the first of them
            found[names[0]] = _end(process.returncode, late=late)
            names = names[1:]
    return found


def _end(status: int, *, late: bool) -> str:
    if late:
        return f"importing it takes more than {_PATIENCE_S:g} s"
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"importing it ends the process ({how})"


def _in_words(said: str, stderr: str) -> str:
    lines = said.strip().splitlines() or [said]
    if _ABI.search(said) or _ABI.search(stderr):
        return f"it was compiled for another ABI of numpy ({lines[-1].strip()})"
    return f"it cannot be imported ({lines[0].strip()})"
