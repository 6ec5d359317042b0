"""Signatures of packages as OpenSSF's model-signing writes and reads them: over every file but the signature itself."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapeout.errors import MissingToolchain, PackageError, TapeoutError
from tapeout.files import file_sha256, writing
from tapeout.manifest import BESIDE, SIGNATURE, read_json, walk

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class Trust:
    """Whom a signature must be of: a public key, certificates that its certificate leads to, or an identity that a provider vouched for.

    Attributes:
        key: a public key on a NIST curve, PEM.
        certificates: roots, PEM.
        identity: as the provider names it (an address, a workflow's URL). provider: the URL of who vouched for it.
        sigstore: the trust configuration of the Sigstore that certified the identity, JSON; None: the public one.
    """

    key: Path | None = None
    certificates: tuple[Path, ...] = ()
    identity: str | None = None
    provider: str | None = None
    sigstore: Path | None = None

    def __post_init__(self) -> None:
        """TapeoutError for two of them at once, or half of the last."""
        if sum((self.key is not None, bool(self.certificates), self.identity is not None)) > 1:
            raise TapeoutError(
                "a signature is checked with --key, --certificate or --identity: give one of them."
            )
        if (self.identity is None) != (self.provider is None):
            raise TapeoutError(
                "--identity and --identity-provider go together: an identity is worth what vouches for it "
                "(https://accounts.google.com, https://token.actions.githubusercontent.com)."
            )
        if self.sigstore and self.identity is None:
            raise TapeoutError("--trust-config says who certifies identities: it goes with --identity.")

    @property
    def given(self) -> bool:
        """Whether there is anybody to trust."""
        return self.key is not None or bool(self.certificates) or self.identity is not None

    @property
    def words(self) -> str:
        """Who it is, for a sentence."""
        if self.key:
            return f"the key {self.key}"
        if self.certificates:
            return f"a certificate under {', '.join(map(str, self.certificates))}"
        by = f" and the Sigstore of {self.sigstore}" if self.sigstore else ""
        return f"{self.identity}, as {self.provider}{by} {'say' if by else 'says'}"


def sign(
    directory: Path,
    key: Path | None = None,
    *,
    password: str | None = None,
    certificates: Sequence[Path] = (),
    sigstore: Path | None = None,
) -> Path:
    """Sign every file of a package but what may stand beside it; the signature takes the place of an older one.

    Args:
        key: a private key on a NIST curve, PEM. None: keyless, through Sigstore, which needs a network, a browser or a CI's identity,
            and writes the identity and the digests into a public log.
        password: of the key, where it has one.
        certificates: the key's own, PEM, then those that lead to the root.
        sigstore: the trust configuration of the Sigstore that a keyless signature is made with, JSON; None: the public one.

    Returns:
        The signature's path.

    Raises:
        TapeoutError: the key or a certificate is none. MissingToolchain: model-signing is not installed, or there is no network.
        OutputError: the directory is not writable.
    """
    library = _library()
    config = library.signing.Config().set_hashing_config(_hashing(library))
    target = directory / SIGNATURE
    partial = directory / f".{SIGNATURE}.partial"
    with writing(target), contextlib.ExitStack() as stack:
        if key is None:
            _check_configuration(sigstore)
            with _networked(sigstore):
                config.use_sigstore_signer(use_ambient_credentials=True, trust_config=sigstore)
        else:
            loaded = _private_key(key, password)
            path = stack.enter_context(_unlocked(key, loaded, password))
            try:
                if certificates:
                    config.use_certificate_signer(
                        private_key=path,
                        signing_certificate=certificates[0],
                        certificate_chain=certificates[1:] or certificates[:1],
                    )
                else:
                    config.use_elliptic_key_signer(private_key=path)
            except (ValueError, OSError) as error:
                raise TapeoutError(
                    f"{_list(certificates)} cannot sign with {key}: {_short(error)}."
                ) from error
        try:
            with _networked(sigstore) if key is None else contextlib.nullcontext():
                config.sign(directory, partial)
            partial.chmod(0o644)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def check(directory: Path, trust: Trust, *, called: str = "") -> int:
    """Hold a package's files against its signature; the number of files that it covers.

    Args:
        called: what errors call the package. Default: its directory.

    Raises:
        PackageError: there is no signature, it is of somebody else, or a file is not as it was signed, which is named.
        TapeoutError: what is trusted cannot be read. MissingToolchain: model-signing is not installed, or there is no network.
    """
    path = directory / SIGNATURE
    called = called or str(directory)
    kind, signed = _read(path, called)
    wanted = "key" if trust.key else "certificate" if trust.certificates else "keyless"
    if kind != wanted:
        how = {
            "key": "with a key: give --key FILE",
            "certificate": "with a certificate: give --certificate FILE",
            "keyless": "keyless: give --identity and --identity-provider",
        }
        raise PackageError(f"{called} is signed {how[kind]}; {trust.words} cannot tell.")
    library = _library()
    config = library.verifying.Config().set_hashing_config(_hashing(library))
    try:
        if trust.key:
            config.use_elliptic_key_verifier(public_key=trust.key)
        elif trust.certificates:
            config.use_certificate_verifier(certificate_chain=trust.certificates)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        name = trust.key or _list(trust.certificates)
        kinds = "a public key on a NIST curve (P-256, P-384, P-521)" if trust.key else "certificates"
        raise TapeoutError(f"{name} cannot be read as {kinds} in PEM: {_short(error)}.") from error
    if trust.identity:
        _check_configuration(trust.sigstore)
        with _networked(trust.sigstore):
            config.use_sigstore_verifier(
                identity=trust.identity, oidc_issuer=str(trust.provider), trust_config=trust.sigstore
            )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the library prints its warnings
            config.verify(directory, path)
    except (
        Exception
    ) as error:  # of cryptography, OpenSSL, sigstore, protobuf, pydantic, and its own ValueErrors
        if changed := _changed(directory, signed):
            raise PackageError(f"{called} is not what was signed: {'; '.join(changed[:5])}.") from error
        raise PackageError(f"the signature of {called} is not by {trust.words}: {_short(error)}.") from error
    # What a signature leaves out, on purpose or not, is not signed.
    if left := sorted({*walk(directory)} - {name for name, _, _ in signed} - {*BESIDE}):
        raise PackageError(f"the signature of {called} leaves out {', '.join(map(ascii, left[:5]))}.")
    return len(signed)


def signed_with(directory: Path) -> str | None:
    """``key``, ``certificate`` or ``keyless``: what a signature says that it was made with, unchecked; None: there is none.

    Raises:
        PackageError: it is no signature.
    """
    return _read(directory / SIGNATURE, str(directory))[0] if (directory / SIGNATURE).exists() else None


def _read(path: Path, called: str) -> tuple[str, list[tuple[str, str, str]]]:
    """How a signature was made, and the name, algorithm and digest of each file that it says it covers."""
    try:
        bundle = read_json(path)
        material = bundle["verificationMaterial"]
        kind = (
            "key"
            if "publicKey" in material
            else "certificate"
            if "x509CertificateChain" in material
            else "keyless"
        )
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        signed = [
            (str(each["name"]), str(each["algorithm"]), str(each["digest"]))
            for each in payload["predicate"]["resources"]
        ]
    except FileNotFoundError:
        raise PackageError(f"{called} is not signed: it has no {SIGNATURE}.") from None
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error) as error:
        raise PackageError(
            f"{SIGNATURE} of {called} is no signature of model-signing: {_short(error)}."
        ) from error
    return kind, signed


def _changed(directory: Path, signed: Sequence[tuple[str, str, str]]) -> list[str]:
    """Which files are not as the signature says, a sentence each."""
    wanted = {name: (algorithm, digest) for name, algorithm, digest in signed}
    present = {*walk(directory)} - {*BESIDE}
    found = [f"{name} is missing" for name in sorted(wanted.keys() - present)]
    found += [f"{ascii(name)[1:-1]} was added" for name in sorted(present - wanted.keys())]
    return found + [
        f"{name} is another"
        for name in sorted(present & wanted.keys())
        if wanted[name][0] == "sha256" and file_sha256(directory / name) != wanted[name][1]
    ]


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise MissingToolchain(
            f"signatures need model-signing ({error}): pip install 'tapeout[sign]'."
        ) from error
    return model_signing


def _hashing(library: Any) -> Any:
    # Files of git are no part of a package, so that one is not left out either.
    return library.hashing.Config().set_ignored_paths(paths=BESIDE, ignore_git_paths=False)


@contextlib.contextmanager
def _networked(sigstore: Path | None) -> Iterator[None]:
    """Turn what Sigstore's client raises into one paragraph."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # of sigstore, tuf, requests and id
        servers = f"the servers that {sigstore} names" if sigstore else "Sigstore's servers"
        raise MissingToolchain(
            f"keyless signatures are made and checked with {servers}, and those cannot be reached or did not agree ({_short(error)}). Without a network: a key of your own, `openssl ecparam -name prime256v1 -genkey -noout -out "
            "key.pem`, and --key key.pem."
        ) from error


def _check_configuration(sigstore: Path | None) -> None:
    """TapeoutError for a trust configuration that is none."""
    if sigstore is None:
        return
    from sigstore.models import ClientTrustConfig

    try:
        config = ClientTrustConfig.from_json(sigstore.read_text(encoding="utf-8"))
        _ = config.trusted_root, config.signing_config
    except Exception as error:  # of pydantic, sigstore and the system
        raise TapeoutError(
            f"{sigstore} cannot be read as the trust configuration of a Sigstore (JSON of the kind "
            f"application/vnd.dev.sigstore.clienttrustconfig.v0.1+json): {_short(error)}."
        ) from error


def _private_key(path: Path, password: str | None) -> EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password.encode() if password else None)
    except OSError as error:
        raise TapeoutError(f"the key {path} cannot be read: {error.strerror}.") from error
    except TypeError as error:  # one without a password that was given one, or the other way round
        raise TapeoutError(
            f"the key {path}: {_short(error)}. TAPEOUT_KEY_PASSWORD holds its password."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        why = "its password is another, or it" if password else "it"
        raise TapeoutError(f"the key {path} cannot be used: {why} is no private key in PEM.") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        kind = getattr(getattr(key, "curve", None), "name", type(key).__name__.strip("_"))
        raise TapeoutError(
            f"the key {path} is of the kind {kind}; what fits: P-256, P-384 or P-521 (openssl ecparam -name prime256v1 -genkey -noout)."
        )
    return key


def needs_password(path: Path) -> bool:
    """Whether a private key in PEM is encrypted."""
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        load_pem_private_key(path.read_bytes(), None)
    except TypeError:
        return True
    except (ValueError, OSError):
        pass  # sign says what is wrong
    return False


@contextlib.contextmanager
def _unlocked(path: Path, key: EllipticCurvePrivateKey, password: str | None) -> Iterator[Path]:
    """The key for the library, which takes a password in neither of the ways that it offers: without one, in memory and on no disk."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if not password:
        yield path
        return
    if not hasattr(os, "memfd_create"):
        raise TapeoutError(
            f"the key {path} has a password, and a key that has one is unlocked in Linux's memory alone: sign there."
        )
    with os.fdopen(os.memfd_create("key", os.MFD_CLOEXEC), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _list(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return (said if len(said) <= 300 else f"{said[:300]}…").rstrip(".?")
