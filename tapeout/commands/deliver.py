"""Verbs of a package on its way: verify, push, pull, delta, patch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from tapeout.commands.terminal import Flag, Json, print_json, progress_bars, stderr
from tapeout.errors import PackageError

if TYPE_CHECKING:
    from tapeout.registry import Shipped


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


def push(package: Path, reference: str, *, mount_from: str | None = None, json: Json = False) -> int:
    """Bring a package into an OCI registry, as a CNCF ModelPack artifact; what the registry has is not sent.

    Example: tapeout push build/demo localhost:5000/team/arithmetic:cpu

    Args:
        package: The package's directory.
        reference: host[:port]/repository[:tag]; the tag is latest by default. Logins are those of `docker login`.
        mount_from: Another repository of the same registry, which may take files from there.
        json: Print what was done to stdout.
    """
    from tapeout.oci import Reference
    from tapeout.registry import push

    where = Reference.parse(reference)
    with progress_bars() as progress:
        shipped = push(package, where, mount_from=mount_from, progress=progress)
    return _tell(f"{package} is {where}", shipped, json)


def pull(reference: str, *, out: Path, force: Annotated[bool, Flag] = False, json: Json = False) -> int:
    """Fetch a package from an OCI registry and check every byte; what was fetched before a stop is not fetched again.

    Example: tapeout pull localhost:5000/team/arithmetic:cpu --out build/pulled

    Args:
        reference: host[:port]/repository[:tag][@sha256:digest]; with a digest these bytes and no others.
        out: The directory to write.
        force: Replace it if it is a tapeout output.
        json: Print what was done to stdout.
    """
    from tapeout.oci import Reference
    from tapeout.registry import pull

    where = Reference.parse(reference)
    with progress_bars() as progress:
        shipped = pull(where, out, force=force, progress=progress)
    return _tell(f"{out} is {where}", shipped, json)


def delta(
    old: Path, new: Path, *, out: Path, force: Annotated[bool, Flag] = False, json: Json = False
) -> int:
    """Write what a package has over an older one to a file: only changed tensors travel.

    Example: tapeout delta build/v1 build/v2 --out build/v1-v2.delta

    Args:
        old: The package that is there already.
        new: The package that it should become.
        out: The file to write.
        force: Replace it.
        json: Print what the delta holds to stdout.
    """
    from tapeout.delta import make

    with progress_bars() as progress:
        made = make(old, new, out, force=force, progress=progress)
    if json:
        print_json(asdict(made))
    tensors = (
        f"{len(made.changed)} of {made.tensors} tensors travel" if made.tensors else "no tensors are seen"
    )
    few = "".join(f"\n  {name}" for name in made.changed[:10])
    more = f"\n  and {len(made.changed) - 10} more" if len(made.changed) > 10 else ""
    stderr.print(
        Text(
            f"{out}: {made.size_bytes} bytes, {made.size_bytes / made.package_bytes:.1%} of the package; {tensors}{few}{more}\n"
            f"root digest {made.old_root_sha256} becomes {made.new_root_sha256}"
        ),
        soft_wrap=True,
    )
    return 0


def patch(
    old: Path, delta: Path, *, out: Path, force: Annotated[bool, Flag] = False, json: Json = False
) -> int:
    """Make the new package of an old one and a delta, and check every byte of it.

    Example: tapeout patch build/v1 build/v1-v2.delta --out build/patched

    Args:
        old: The package that the delta was made from.
        delta: A file of `tapeout delta`.
        out: The directory to write.
        force: Replace it if it is a tapeout output.
        json: Print the new root digest to stdout.
    """
    from tapeout.delta import apply

    with progress_bars() as progress:
        package = apply(old, delta, out, force=force, progress=progress)
    if json:
        print_json({"package": str(out), "root_sha256": package.manifest["root_sha256"]})
    stderr.print(
        f"{out} is whole: {len(package.files())} files, root digest {package.manifest['root_sha256']}",
        soft_wrap=True,
    )
    return 0


def _tell(what: str, shipped: Shipped, json: bool) -> int:
    if json:
        print_json(asdict(shipped))
    there = f"{shipped.present} there already" + (f", {shipped.mounted} mounted" if shipped.mounted else "")
    stderr.print(
        Text(
            f"{what}: {shipped.files} files of {shipped.size_bytes} bytes, root digest {shipped.root_sha256}\n"
            f"{shipped.sent_bytes} bytes travelled; of {shipped.blobs} blobs {there}\n{shipped.reference}"
        ),
        soft_wrap=True,
    )
    return 0
