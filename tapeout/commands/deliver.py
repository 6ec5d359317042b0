"""Verbs of a package on its way: verify, sign."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated

from rich.text import Text

from tapeout.commands.terminal import Flag, Json, Many, print_json, stderr
from tapeout.errors import PackageError, TapeoutError


def verify(
    package: Path,
    *,
    key: Path | None = None,
    certificate: Annotated[list[Path] | None, Many] = None,
    identity: str | None = None,
    identity_provider: str | None = None,
    json: Json = False,
) -> int:
    """Compare every byte of a package with its manifest, and its signature, bill of materials and provenance with both.

    With a key, a certificate or an identity the package must be signed by it. Without one a signature is told and not checked.

    Example: tapeout verify build/demo
    Example: tapeout verify build/demo --key key.pub

    Args:
        package: The package's directory.
        key: The public key of who must have signed it (PEM).
        certificate: A certificate that the signer's must lead to (PEM). May be given several times.
        identity: Of a keyless signature: who must have made it, an address or a workflow's URL. Needs a network.
        identity_provider: Of a keyless signature: the URL of who vouched for the identity.
        json: Print the findings to stdout.
    """
    from tapeout.verify import Trust
    from tapeout.verify import verify as run

    found = run(package, Trust(key, tuple(certificate or ()), identity, identity_provider))
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
    json: Json = False,
) -> int:
    """Sign a whole package with OpenSSF's model-signing; the signature is model.sig, which `model_signing verify` reads too.

    Example: tapeout sign build/demo --key key.pem

    Args:
        package: The package's directory.
        key: Your private key on a NIST curve (PEM). Its password, if it has one, comes from TAPEOUT_KEY_PASSWORD or is asked for.
        certificate: The key's certificate (PEM), then those that lead to the root. May be given several times.
        keyless: Sign with an identity instead, through Sigstore: needs a network, and tells a public log who signed what.
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
    opened = Package.open(package)
    if damage := opened.damage():
        raise PackageError(
            f"{package} is not what its manifest says, and is not signed: {'; '.join(damage[:5])}."
        )
    path = run(package, key, password=_password(key) if key else None, certificates=certificate or ())
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
