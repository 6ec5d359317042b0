"""A Sigstore of the tests' own on loopback, all of it in one server: who vouches for identities, the authority that certifies them (Fulcio)
with its certificates' log, and the transparency log (Rekor). The keys are made for it; its formats are those of the public one.

https://github.com/sigstore/fulcio/blob/main/docs/certificate-specification.md, RFC 6962, https://github.com/sigstore/rekor (entries of kind dsse 0.0.1),
https://github.com/transparency-dev/formats/blob/main/log/README.md (checkpoints).
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from certificates import Key, certificate
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

_ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # who vouched for the identity, as Fulcio has it
_SCTS = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
TYPES = "application/vnd.dev.sigstore."


def public(key: Key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def signed(key: Key, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def canonical(value: Any) -> bytes:
    """JSON of RFC 8785, of what has neither fractions nor letters beyond ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Sigstore(ThreadingHTTPServer):
    """The servers, and the identity that asks them.

    Attributes:
        identity: whom tokens are for. url: of everything, and of who vouches.
        leaves: what the transparency log holds.
    """

    daemon_threads = True

    def __init__(self, identity: str) -> None:
        self.identity, self.leaves = identity, list[bytes]()
        self.authority, self.certificates_log, self.log, self.provider = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(4)
        )
        self.root = certificate("a sigstore of the tests", self.authority, None, self.authority)
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What GitHub gives to a job that may ask for an identity."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of the job",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/token?",
        }

    def write(self, path: Path) -> Path:
        """The trust configuration: keys to trust, and where the servers are."""
        since = {"start": "2020-01-01T00:00:00Z"}

        def log(key: Key) -> dict[str, Any]:
            kind = {"rawBytes": b64(public(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            identifier = {"keyId": b64(hashlib.sha256(public(key)).digest())}
            return {"baseUrl": self.url, "hashAlgorithm": "SHA2_256", "publicKey": kind, "logId": identifier}

        service = {"url": self.url, "majorApiVersion": 1, "validFor": since, "operator": "tests"}
        authority = {
            "subject": {"organization": "tests", "commonName": "a sigstore of the tests"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": b64(self.root.public_bytes(Encoding.DER))}]},
            "validFor": since,
        }
        config = {
            "mediaType": f"{TYPES}clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": f"{TYPES}trustedroot+json;version=0.1",
                "tlogs": [log(self.log)],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self.certificates_log)],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": f"{TYPES}signingconfig.v0.2+json",
                "caUrls": [service],
                "oidcUrls": [service],
                "rekorTlogUrls": [service],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaUrls": [],
                "tsaConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(config))
        return path

    def token(self) -> str:
        """Who asks, as the provider says it."""
        now = int(time.time())
        claims = {"iss": self.url, "sub": self.identity, "aud": "sigstore", "iat": now, "exp": now + 300}
        return jwt.encode(claims, self.provider, algorithm="ES256")

    def certify(self, token: str, request: x509.CertificateSigningRequest) -> list[str]:
        """A certificate of ten minutes for the key that asks, with the promise of the certificates' log in it."""
        claims = jwt.decode(token, self.provider.public_key(), algorithms=["ES256"], audience="sigstore")
        assert request.is_signature_valid
        now, key = datetime.now(UTC), request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        names = x509.SubjectAlternativeName([x509.RFC822Name(claims["sub"])])
        builder = (
            x509.CertificateBuilder(subject_name=x509.Name([]), issuer_name=self.root.subject, public_key=key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(seconds=5))
            .not_valid_after(now + timedelta(minutes=10))
            .add_extension(x509.KeyUsage(True, *[False] * 8), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(names, critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key()),
                critical=False,
            )
            .add_extension(x509.UnrecognizedExtension(_ISSUER, claims["iss"].encode()), critical=False)
        )
        before = builder.sign(self.authority, hashes.SHA256()).tbs_certificate_bytes
        scts = x509.UnrecognizedExtension(_SCTS, self._promise(before))
        leaf = builder.add_extension(scts, critical=False).sign(self.authority, hashes.SHA256())
        return [each.public_bytes(Encoding.PEM).decode() for each in (leaf, self.root)]

    def _promise(self, before: bytes) -> bytes:
        """A list of one timestamp of a certificate that is to be (RFC 6962, 3.2 and 3.3), as an extension holds it."""
        stamp, issuer = int(time.time() * 1000), hashlib.sha256(public(self.authority)).digest()
        entry = issuer + len(before).to_bytes(3, "big") + before
        said = signed(self.certificates_log, struct.pack("!BBQH", 0, 0, stamp, 1) + entry + b"\0\0")
        name = hashlib.sha256(public(self.certificates_log)).digest()
        # Version, log, time, no extensions; SHA-256 and ECDSA; the signature.
        sct = b"\0" + name + struct.pack("!QHBBH", stamp, 0, 4, 3, len(said)) + said
        inner = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        assert len(inner) < 256
        return b"\x04" + (bytes([len(inner)]) if len(inner) < 128 else bytes([0x81, len(inner)])) + inner

    def add(self, proposed: dict[str, Any]) -> dict[str, Any]:
        """Put a signature into the log: what Rekor answers, with the proof that it is there."""
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        spec = {
            "envelopeHash": _digest(content["envelope"].encode()),
            "payloadHash": _digest(base64.b64decode(envelope["payload"])),
            "signatures": [
                {"signature": each["sig"], "verifier": content["verifiers"][0]}
                for each in envelope["signatures"]
            ],
        }
        body = canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        self.leaves.append(body)
        index, name = len(self.leaves) - 1, hashlib.sha256(public(self.log)).digest()
        root, path = _proof([hashlib.sha256(b"\0" + each).digest() for each in self.leaves], index)
        note = f"tests - 1\n{len(self.leaves)}\n{b64(root)}\n"
        entry = {
            "body": b64(body),
            "integratedTime": int(time.time()),
            "logID": name.hex(),
            "logIndex": index,
        }
        proof = {
            "logIndex": index,
            "rootHash": root.hex(),
            "treeSize": len(self.leaves),
            "hashes": [each.hex() for each in path],
            "checkpoint": f"{note}\n— tests {b64(name[:4] + signed(self.log, note.encode()))}\n",
        }
        promise = b64(signed(self.log, canonical(entry)))
        verification = {"inclusionProof": proof, "signedEntryTimestamp": promise}
        return {hashlib.sha256(b"\0" + body).hexdigest(): entry | {"verification": verification}}


def _digest(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _proof(hashed: list[bytes], index: int) -> tuple[bytes, list[bytes]]:
    """The root of a Merkle tree and the hashes from a leaf up to it (RFC 6962, 2.1)."""
    if len(hashed) == 1:
        return hashed[0], []
    split = 1 << (len(hashed) - 1).bit_length() - 1
    (left, before), (right, after) = _proof(hashed[:split], index), _proof(hashed[split:], index - split)
    root = hashlib.sha256(b"\1" + left + right).digest()
    return root, [*before, right] if index < split else [*after, left]


class _Handler(BaseHTTPRequestHandler):
    server: Sigstore

    def log_message(self, *_: object) -> None:
        pass

    def say(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        url = self.server.url
        if self.path == "/.well-known/openid-configuration":
            return self.say({"authorization_endpoint": f"{url}/auth", "token_endpoint": f"{url}/token"})
        assert self.path.startswith("/token?")
        assert self.headers["Authorization"] == "bearer of the job"
        return self.say({"value": self.server.token()})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/v1/log/entries":
            return self.say(self.server.add(asked), 201)
        assert self.path == "/api/v2/signingCert"
        request = x509.load_pem_x509_csr(base64.b64decode(asked["certificateSigningRequest"]))
        chain = self.server.certify(self.headers["Authorization"].removeprefix("Bearer "), request)
        return self.say({"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}, 201)
