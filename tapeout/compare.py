"""Several packages side by side, by what their reports say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tapeout.errors import TapeoutError
from tapeout.pack import Package
from tapeout.validate.report import Report

__all__ = ["reports"]


def reports(directories: Sequence[Path]) -> dict[str, Report]:
    """The report of each package, by the name of its directory, or its path where two have one name.

    Raises:
        PackageError: one is no package, its report is of a newer format, or is not the one that its manifest has the digest of.
        TapeoutError: one is given twice.
    """
    names = [each.resolve().name for each in directories]
    if len(set(names)) < len(names):
        names = [str(each) for each in directories]
    if len({each.resolve() for each in directories}) < len(directories):
        raise TapeoutError(f"compare takes packages that differ; one of {', '.join(names)} is given twice.")
    return {
        name: Package.open(directory).report() for name, directory in zip(names, directories, strict=True)
    }
