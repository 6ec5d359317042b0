"""Verbs of a package on its way: verify, sign, push, pull, delta, patch."""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from tapeout.commands.terminal import Flag, Json, Many, print_json, progress_bars, stderr
from tapeout.errors import PackageError, TapeoutError

if TYPE_CHECKING:
    from tapeout.registry import Shipped
    from tapeout.signing import Trust


@Parameter(name="*")
@dataclass(frozen=True)
class Signer:
    """Flags that say who must have signed a package; one way of them."""

    key: Annotated[
        Path | None, Parameter(help="The public key of who must have signed the package (PEM).")
    ] = None
    certificate: Annotated[
        list[Path] | None,
        Many,
        Parameter(help="A certificate that the signer's must lead to (PEM). May be given several times."),
    ] = None
    identity: Annotated[
        str | None,
        Parameter(
            help="Of a keyless signature: who must have made it, an address or a workflow's URL. Needs a network."
        ),
    ] = None
    identity_provider: Annotated[
        str | None,
        Parameter(help="Of a keyless signature: the URL of who vouched for the identity."),
    ] = None
    trust_config: Annotated[
        Path | None,
        Parameter(
            help="Of a keyless signature: the trust configuration (JSON) of a Sigstore of your own; then no network is needed."
        ),
    ] = None

    @property
    def trust(self) -> Trust:
        """The same, checked."""
        from tapeout.signing import Trust

        certificates = tuple(self.certificate or ())
        return Trust(self.key, certificates, self.identity, self.identity_provider, self.trust_config)


def verify(package: Path, *, signer: Signer | None = None, json: Json = False) -> int:
    """Compare every byte of a package with its manifest, and its signature, bill of materials and provenance with both.

    With a key, a certificate or an identity the package must be signed by it. Without one a signature is told and not checked.

    Example: tapeout verify build/demo
    Example: tapeout verify build/demo --key key.pub

    Args:
        package: The package's directory.
        json: Print the findings to stdout.
    """
    from tapeout.verify import verify as run

    found = run(package, signer.trust if signer else None)
    if json:
        print_json(found.to_json(package))
    if found.damage:
        raise PackageError(f"{package} is not what its manifest says: {'; '.join(found.damage[:5])}.")
    lines = (
        f"{package} is whole: {found.files} files, root digest {found.root_sha256}",
        f"signature: {found.signature}",
        f"bill of materials: {found.bill}",
        f"provenance: {found.provenance}",
        f"licences: {found.licences}",
    )
    stderr.print(Text("\n".join(lines)), soft_wrap=True)
    return 0


def sign(
    package: Path,
    *,
    key: Path | None = None,
    certificate: Annotated[list[Path] | None, Many] = None,
    keyless: Annotated[bool, Flag] = False,
    trust_config: Path | None = None,
    json: Json = False,
) -> int:
    """Sign a whole package with OpenSSF's model-signing; the signature is model.sig, which `model_signing verify` reads too.

    Example: tapeout sign build/demo --key key.pem

    Args:
        package: The package's directory.
        key: Your private key on a NIST curve (PEM). Its password, if it has one, comes from TAPEOUT_KEY_PASSWORD or is asked for.
        certificate: The key's certificate (PEM), then those that lead to the root. May be given several times.
        keyless: Sign with an identity instead, through Sigstore: needs a network, and tells a public log who signed what.
        trust_config: With --keyless: the trust configuration (JSON) of a Sigstore of your own, in place of the public one.
        json: Print what was signed to stdout.
    """
    from tapeout.pack import Package
    from tapeout.signing import sign as run

    if keyless == (key is not None):
        raise TapeoutError(
            "a package is signed with --key FILE, or --keyless through Sigstore: give one of them."
        )
    if certificate and key is None:
        raise TapeoutError("--certificate is of a key: give --key FILE too.")
    if trust_config and not keyless:
        raise TapeoutError("--trust-config is of --keyless: give that too.")
    opened = Package.open(package)
    if damage := opened.damage():
        raise PackageError(
            f"{package} is not what its manifest says, and is not signed: {'; '.join(damage[:5])}."
        )
    path = run(
        package,
        key,
        password=_password(key) if key else None,
        certificates=certificate or (),
        sigstore=trust_config,
    )
    if not opened.passed:
        stderr.print(
            Text(f"note: {package} failed its gates; the signature says who made it, not that it is good.")
        )
    files = len(opened.files()) + 1  # and the manifest
    if json:
        print_json({"package": str(package), "signature": str(path), "files": files})
    stderr.print(Text(f"{path} signs {files} files"), soft_wrap=True)
    return 0


def _password(key: Path) -> str | None:
    """Of a private key that has one: from the environment, or from the terminal."""
    from tapeout.signing import needs_password

    if not needs_password(key):
        return None
    if word := os.environ.get("TAPEOUT_KEY_PASSWORD"):
        return word
    if not sys.stdin.isatty():
        raise TapeoutError(f"the key {key} has a password: put it into TAPEOUT_KEY_PASSWORD.")
    return getpass.getpass(f"password of {key}: ")


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


def pull(
    reference: str,
    *,
    out: Path,
    signer: Signer | None = None,
    force: Annotated[bool, Flag] = False,
    json: Json = False,
) -> int:
    """Fetch a package from an OCI registry and check every byte; what was fetched before a stop is not fetched again.

    With a key, a certificate or an identity the package must be signed by it, or nothing is left of it.

    Example: tapeout pull localhost:5000/team/arithmetic:cpu --out build/pulled
    Example: tapeout pull localhost:5000/team/arithmetic:cpu --out build/pulled --key signer.pub

    Args:
        reference: host[:port]/repository[:tag][@sha256:digest]; with a digest these bytes and no others.
        out: The directory to write.
        force: Replace it if it is a tapeout output.
        json: Print what was done to stdout.
    """
    from tapeout.oci import Reference
    from tapeout.registry import pull

    where = Reference.parse(reference)
    trust = signer.trust if signer else None
    with progress_bars() as progress:
        shipped = pull(where, out, trust=trust, force=force, progress=progress)
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
