"""Everything that can be checked of a package without running it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapeout import attestation, bill, signing
from tapeout.files import file_sha256
from tapeout.manifest import MANIFEST
from tapeout.pack import Package
from tapeout.signing import Trust

__all__ = ["Trust", "Verified", "verify"]


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        root_sha256: of the artifact, tokenizer and facts: the same for the same inputs.
        manifest_sha256: of ``tapeout.json``, which has a digest of every other file: with it at hand a package needs no signature.
        files: that the manifest lists.
        damage: what is not as it should be, a sentence each.
        signature: what is known of it. bill: of the bill of materials. provenance: of where it comes from.
        licences: whose texts are carried along.
    """

    root_sha256: str
    manifest_sha256: str
    files: int
    damage: tuple[str, ...]
    signature: str
    bill: str
    provenance: str
    licences: str

    def to_json(self, package: Path) -> dict[str, Any]:
        """One document."""
        return {
            "package": str(package),
            "root_sha256": self.root_sha256,
            "manifest_sha256": self.manifest_sha256,
            "damage": list(self.damage),
            "signature": self.signature,
            "bill": self.bill,
            "provenance": self.provenance,
            "licences": self.licences,
        }


def verify(directory: Path, trust: Trust | None = None) -> Verified:
    """Compare every byte of a package with its manifest, the manifest with the root digest, and look at what vouches for it.

    Args:
        trust: whom the signature must be of; with it a package without a signature is refused. None: a signature is told, not checked.

    Raises:
        PackageError: the manifest cannot be trusted (see ``manifest.read``), or the signature is not as it must be.
        TapeoutError: what is trusted cannot be read. MissingToolchain: model-signing is not installed, or there is no network.
    """
    package = Package.open(directory)
    damage = package.damage()
    if trust is None or not trust.given:
        found = signing.signed_with(directory)
        signature = (
            f"made with a {found}, not checked: give --key FILE or --certificate FILE" if found else "none"
        )
        if found == "keyless":
            signature = "keyless, not checked: give --identity and --identity-provider"
    else:
        signature = "not checked, since files are not as the manifest says"
        if not damage:
            signature = f"by {trust.words}, over {signing.check(directory, trust)} files"
    materials, wrong = _bill(package)
    damage += wrong
    origin, wrong = _provenance(package)
    damage += wrong
    return Verified(
        package.manifest["root_sha256"],
        file_sha256(directory / MANIFEST),
        len(package.files()),
        tuple(damage),
        signature,
        materials,
        origin,
        _licences(package),
    )


def _bill(package: Package) -> tuple[str, list[str]]:
    if bill.BILL not in package.files():
        return "none", []
    try:
        wrong, skipped = bill.check(package.directory / bill.BILL, package.manifest)
    except FileNotFoundError:
        return "missing", []  # which is damage already
    if wrong:
        return "wrong", wrong
    return f"its digests are the manifest's; {skipped or 'valid CycloneDX 1.6'}", []


def _provenance(package: Package) -> tuple[str, list[str]]:
    if attestation.PROVENANCE not in package.files():
        return "none: a tapeout that wrote none yet made it", []
    try:
        wrong = attestation.check(package.directory / attestation.PROVENANCE, package.manifest)
    except FileNotFoundError:
        return "missing", []
    builder = f"tapeout {package.manifest['tapeout']}"
    return (
        ("wrong", wrong)
        if wrong
        else (f"SLSA 1.0, says that {builder} made it; its subjects are the manifest's", [])
    )


def _licences(package: Package) -> str:
    """Whose texts there are, and which are missing."""
    model = package.manifest["model"]["licence"] or "of no stated licence"
    texts = [path.removeprefix("licences/") for path in package.files() if path.startswith("licences/")]
    of_model = [path for path in texts if path.startswith("model/")]
    others = [path for path in texts if not path.startswith("model/")]
    return (
        f"the model is {model}, {', '.join(of_model) if of_model else 'without a text'}; "
        f"{', '.join(others) if others else 'no text of tapeout or a runtime'}"
    )
