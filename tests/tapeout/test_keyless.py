"""Keyless signatures, made and checked through a Sigstore on loopback: who signed is an identity, and what was forged on the way is refused."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import tapeout
from packages import rewritten

from tapeout.errors import MissingToolchain, PackageError, TapeoutError
from tapeout.signing import Trust, check, sign, signed_with
from tapeout.verify import verify

pytest.importorskip("model_signing")

from sigstores import Sigstore

ME = "maker@example.org"


@pytest.fixture(scope="module")
def server() -> Iterator[Sigstore]:
    with Sigstore(ME) as found:
        yield found
        found.shutdown()


@pytest.fixture
def config(server: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.write(tmp_path / "trust.json")


@pytest.fixture
def package(bare: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "package"))


def test_an_identity_signs_and_is_verified(server: Sigstore, config: Path, package: Path) -> None:
    done = tapeout("sign", package, "--keyless", "--trust-config", config, status=0)
    assert f"{package / 'model.sig'} signs" in done.stderr
    assert signed_with(package) == "keyless"
    who = ["--identity", ME, "--identity-provider", server.url, "--trust-config", config]
    done = tapeout("verify", package, *who, status=0)
    assert f"signature: by {ME}, as {server.url} and the Sigstore of {config} say, over" in done.stderr
    done = tapeout("verify", package, "--identity", "other@example.org", *who[2:], status=2)
    assert f"the signature of {package} is not by other@example.org" in " ".join(done.stderr.split())
    with pytest.raises(PackageError, match=r"is not by maker@example\.org, as https://accounts\.google\.com"):
        check(package, Trust(identity=ME, provider="https://accounts.google.com", sigstore=config))


def test_later_entries_of_the_log_are_proven_too(server: Sigstore, config: Path, package: Path) -> None:
    trust = Trust(identity=ME, provider=server.url, sigstore=config)
    for _ in range(3):  # trees that are and are not full
        sign(package, sigstore=config)
        assert check(package, trust) > 10


def test_verification_asks_nobody(config: Path, package: Path, tmp_path: Path) -> None:
    """The configuration has the keys; the servers may be gone."""
    with Sigstore(ME) as other:
        theirs = other.write(tmp_path / "other.json")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in other.environment.items():
                patch.setenv(name, value)
            sign(package, sigstore=theirs)
        other.shutdown()
    trust = Trust(identity=ME, provider=other.url, sigstore=theirs)
    assert verify(package, trust).damage == ()
    # Another Sigstore vouches for nothing of it.
    with pytest.raises(PackageError, match=r"is not by maker@example\.org"):
        check(package, Trust(identity=ME, provider=other.url, sigstore=config))
    with pytest.raises(
        MissingToolchain, match=r"the servers that .*other\.json names, and those cannot be reached"
    ):
        sign(package, sigstore=theirs)
    assert check(package, trust) > 10  # the signature from before stands


def material(bundle: dict[str, Any]) -> Any:
    return bundle["verificationMaterial"]["tlogEntries"][0]


def earlier(bundle: dict[str, Any]) -> None:
    """As if the log had it at another time."""
    entry = material(bundle)
    entry["integratedTime"] = str(int(entry["integratedTime"]) + 60)


def unproven(bundle: dict[str, Any]) -> None:
    proof = material(bundle)["inclusionProof"]
    proof["rootHash"] = base64.b64encode(bytes(32)).decode()


def unlogged(bundle: dict[str, Any]) -> None:
    body = json.loads(base64.b64decode(material(bundle)["canonicalizedBody"]))
    body["spec"]["payloadHash"]["value"] = "0" * 64
    material(bundle)["canonicalizedBody"] = base64.b64encode(json.dumps(body).encode()).decode()


def another_certificate(bundle: dict[str, Any]) -> None:
    data = bytearray(base64.b64decode(bundle["verificationMaterial"]["certificate"]["rawBytes"]))
    data[-1] ^= 1
    bundle["verificationMaterial"]["certificate"]["rawBytes"] = base64.b64encode(data).decode()


def no_entry(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["tlogEntries"] = []


@pytest.mark.parametrize("forge", [earlier, unproven, unlogged, another_certificate, no_entry])
def test_what_is_forged(
    server: Sigstore, config: Path, package: Path, forge: Callable[[dict[str, Any]], None]
) -> None:
    path, trust = sign(package, sigstore=config), Trust(identity=ME, provider=server.url, sigstore=config)
    assert check(package, trust) > 10
    bundle = json.loads(path.read_text())
    forge(bundle)
    path.write_text(json.dumps(bundle))
    with pytest.raises(PackageError, match=f"is not by {ME}"):
        check(package, trust)


def test_a_file_that_changed_is_named(server: Sigstore, config: Path, package: Path) -> None:
    sign(package, sigstore=config)
    (package / "README.md").write_text("another")
    rewritten(package, lambda manifest: None)
    with pytest.raises(PackageError, match=r"is not what was signed: README\.md is another"):
        check(package, Trust(identity=ME, provider=server.url, sigstore=config))


def test_flags_that_do_not_go_together(config: Path, package: Path, tmp_path: Path) -> None:
    with pytest.raises(TapeoutError, match="--trust-config says who certifies identities"):
        Trust(key=tmp_path / "k", sigstore=config)
    assert (
        "--trust-config is of --keyless"
        in tapeout("sign", package, "--key", "k.pem", "--trust-config", config, status=2).stderr
    )
    for text, why in (("{}", "mediaType"), ("no JSON", "cannot be read as the trust configuration")):
        config.write_text(text)
        done = tapeout("sign", package, "--keyless", "--trust-config", config, status=2)
        assert f"{config} cannot be read as the trust configuration of a Sigstore" in " ".join(
            done.stderr.split()
        )
        assert why in " ".join(done.stderr.split()) or why == "mediaType"
    assert not (package / "model.sig").exists()
