"""Verbs of a package on its way: verify."""

from __future__ import annotations

from pathlib import Path

from tapeout.commands.terminal import Json, print_json, stderr
from tapeout.errors import PackageError


def verify(package: Path, *, json: Json = False) -> int:
    """Compare every byte of a package with its manifest.

    Example: tapeout verify build/demo

    Args:
        package: The package's directory.
        json: Print the findings to stdout.
    """
    from tapeout.pack import Package

    opened = Package.open(package)
    damage = opened.damage()
    if json:
        print_json({"package": str(package), "root_sha256": opened.manifest["root_sha256"], "damage": damage})
    if damage:
        raise PackageError(f"{package} is not what its manifest says: {'; '.join(damage[:5])}.")
    stderr.print(
        f"{package} is whole: {len(opened.files())} files, root digest {opened.manifest['root_sha256']}",
        soft_wrap=True,
    )
    return 0
