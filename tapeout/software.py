"""The software that a package is made with and runs on: versions, licences and their texts, as installed distributions tell them."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packageurl import PackageURL

# What a wheel calls the texts of its own licence.
_TEXT = re.compile(r"(licen[cs]e|copying|notice)([.\-_].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Software:
    """A distribution by its name on PyPI.

    Attributes:
        version: None: it is not installed here.
        licence: an SPDX expression or id, or what its author wrote in its place.
    """

    name: str
    version: str | None = None
    licence: str | None = None

    @cached_property
    def texts(self) -> dict[str, Path]:
        """The texts of its licence by the names of their files; empty where its wheel has none, or it is not here."""
        found = {}
        for each in (distribution(self.name).files or ()) if self.version else ():
            beside = len(each.parts) == 2  # of the metadata, or of the import package
            below = (
                len(each.parts) == 3 and each.parts[0].endswith(".dist-info") and each.parts[1] == "licenses"
            )
            if (beside or below) and _TEXT.fullmatch(each.name) and each.suffix not in (".py", ".pyc"):
                found[each.name] = Path(str(each.locate()))
        return found

    @property
    def purl(self) -> PackageURL:
        """``pkg:pypi/onnxruntime@1.32.0``."""
        return PackageURL("pypi", name=self.name, version=self.version)


@cache
def software(name: str) -> Software:
    """What is installed here under that name."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return Software(_normal(name))
    fields = [field for field in ("License-Expression", "License") if field in found.metadata]
    told = found.metadata[fields[0]] if fields else ""
    # Some write the whole text there.
    licence = told.strip() if 0 < len(told.strip()) <= 100 and "\n" not in told.strip() else None
    return Software(_normal(name), found.version, licence)


def libraries(runtimes: Iterable[str]) -> list[Software]:
    """What is installed here of tapeout's own requirements, of those of the reference, and of the extras that bring these runtimes."""
    own, extras = _requirements()
    running = {_normal(each) for each in runtimes}
    wanted = {"reference", *(name for name, brought in extras.items() if brought & running)}
    names = {*own, *(each for extra in wanted for each in extras.get(extra, ()))}
    return [found for name in sorted(names) if (found := software(name)).version]


def python() -> str:
    """The version of the interpreter."""
    return platform.python_version()


def _requirements() -> tuple[set[str], dict[str, set[str]]]:
    """Names of what tapeout requires by itself, and for each extra but the developers'."""
    own: set[str] = set()
    extras: dict[str, set[str]] = {}
    for line in distribution("tapeout").requires or ():
        name = _normal(re.split(r"[^\w.-]", line, maxsplit=1)[0])
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if name == "tapeout" or (extra and extra[1] == "dev"):
            continue
        (extras.setdefault(extra[1], set()) if extra else own).add(name)
    return own, extras


def _normal(name: str) -> str:
    """As PyPI writes it: https://packaging.python.org/specifications/name-normalization."""
    return re.sub(r"[-_.]+", "-", name).lower()
