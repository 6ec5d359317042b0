"""Keys and certificates that tests make."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

Key = ec.EllipticCurvePrivateKey


def written(path: Path, key: Any, password: str | None = None) -> Path:
    """A private key in PEM, and its public one beside it."""
    lock: KeySerializationEncryption = (
        BestAvailableEncryption(password.encode()) if password else NoEncryption()
    )
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


def certificate(
    name: str, key: Key, issuer: x509.Certificate | None, by: Key, hosts: Sequence[str] = ()
) -> x509.Certificate:
    """A certificate of ``key``, by itself without an issuer: an authority's, or that of ``signer``, or of a server of these ``hosts``."""
    leaf = name == "signer" or bool(hosts)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=not leaf, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(leaf, *[False] * 4, not leaf, *[False] * 3), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName(map(x509.DNSName, hosts))
        builder = builder.add_extension(names, critical=False)
    return builder.sign(by, hashes.SHA256())


def authority(directory: Path, *hosts: str) -> tuple[Path, Path, Path]:
    """An authority of one's own, and what it vouches for: its certificate, that of a server of these hosts, and the server's key."""
    directory.mkdir(parents=True)
    top, mine = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("an authority of our own", top, None, top)
    server = certificate("a server", mine, root, top, hosts)
    for name, each in (("root.pem", root), ("server.pem", server)):
        (directory / name).write_bytes(each.public_bytes(Encoding.PEM))
    return directory / "root.pem", directory / "server.pem", written(directory / "server.key", mine)
