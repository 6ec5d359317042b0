"""Whom a pull believes: a signature travels with its package, what was altered on the way does not pass, and TLS is by authorities that one names."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registries
from commands import tapeout
from packages import names, rewritten, same
from registries import Running

from tapeout.errors import PackageError, RegistryError
from tapeout.modelpack import FILEPATH, layers_of
from tapeout.oci import Reference, Repository
from tapeout.pack import Package
from tapeout.registry import pull, push
from tapeout.signing import Trust, sign
from tapeout.verify import verify

pytest.importorskip("model_signing")

from certificates import authority, written
from cryptography.hazmat.primitives.asymmetric import ec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]

PROGRAM = Path(sys.executable).with_name("model_signing")


@pytest.fixture
def signed(bare: Path, tmp_path: Path) -> Path:
    """A package that ``mine.pem`` signed; ``mine.pub`` and ``other.pub`` lie beside it."""
    package = Path(shutil.copytree(bare, tmp_path / "package"))
    for name in ("mine", "other"):
        written(tmp_path / f"{name}.pem", ec.generate_private_key(ec.SECP256R1()))
    sign(package, tmp_path / "mine.pem")
    return package


def named(running: Running) -> Reference:
    return Reference.parse(f"{running.host}/team/small:v1")


def test_a_signature_travels_and_says_the_same(running: Running, signed: Path, tmp_path: Path) -> None:
    push(signed, named(running))
    out, key = tmp_path / "out", tmp_path / "mine.pub"
    done = tapeout("pull", str(named(running)), "--out", out, "--key", key, status=0)
    assert str(named(running)) in done.stderr
    assert same(out, signed)
    said = [tapeout("verify", each, "--key", key, "--json", status=0).stdout for each in (signed, out)]
    assert json.loads(said[0]) | {"package": ""} == json.loads(said[1]) | {"package": ""}
    assert f"by the key {key}, over" in json.loads(said[1])["signature"]
    with Repository(named(running)) as repository:  # a layer as any other file
        layers = json.loads(repository.manifest()[0])["layers"]
    (layer,) = [each for each in layers if each["annotations"][FILEPATH] == "model.sig"]
    assert layer["digest"] == layers_of(Package.open(signed))["model.sig"].digest
    command = [PROGRAM, "verify", "key", out, "--signature", out / "model.sig", "--public_key", key]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_who_signs_later_sends_the_signature_alone(running: Running, signed: Path, tmp_path: Path) -> None:
    signature = (signed / "model.sig").read_bytes()
    (signed / "model.sig").unlink()
    first = push(signed, named(running))
    with pytest.raises(PackageError, match=r"team/small:v1 is not signed: it has no model\.sig"):
        pull(named(running), tmp_path / "out", trust=Trust(tmp_path / "mine.pub"))
    assert names(tmp_path).isdisjoint({"out", ".out.pull"})
    (signed / "model.sig").write_bytes(signature)
    second = push(signed, named(running))
    assert second.reference != first.reference
    assert second.root_sha256 == first.root_sha256
    # The signature, and the artifact's configuration, which lists it.
    assert second.present == first.blobs - 1
    assert len(signature) < second.sent_bytes < len(signature) + 10_000
    pull(named(running), tmp_path / "out", trust=Trust(tmp_path / "mine.pub"))


def test_another_key_leaves_nothing(running: Running, signed: Path, tmp_path: Path) -> None:
    push(signed, named(running))
    key = tmp_path / "other.pub"
    done = tapeout("pull", str(named(running)), "--out", tmp_path / "out", "--key", key, status=2)
    assert f"the signature of {named(running)} is not by the key {key}" in " ".join(done.stderr.split())
    assert names(tmp_path).isdisjoint({"out", ".out.pull", ".out.partial"})


@pytest.mark.parametrize("path", ["artifact/lm_head.weight.safetensors", "model.sig", "tapeout.json"])
def test_a_byte_that_changed_in_the_registry(
    running: Running, signed: Path, tmp_path: Path, path: str
) -> None:
    """On its disk, by whoever has that: the digest that names it is another's then."""
    push(signed, named(running))
    digest = layers_of(Package.open(signed))[path].digest.removeprefix("sha256:")
    (kept,) = running.root.glob(f"docker/registry/v2/blobs/sha256/*/{digest}/data")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    with pytest.raises(RegistryError, match=f"gave other bytes than those of sha256:{digest}"):
        pull(named(running), tmp_path / "out")
    assert "out" not in names(tmp_path)


def weights(package: Path) -> None:
    path = package / "artifact" / "lm_head.weight.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    rewritten(package, lambda manifest: None)


def verdict(package: Path) -> None:
    path = package / "report.json"
    path.write_text(path.read_text().replace('"status": "skipped"', '"status": "passed"', 1) + " ")
    rewritten(package, lambda manifest: None)


def more(package: Path) -> None:
    (package / "artifact" / "more.py").write_text("print()")
    entry = {"sha256": "0" * 64, "size": 0}
    rewritten(package, lambda manifest: manifest["files"].update({"artifact/more.py": entry}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (weights, "artifact/lm_head.weight.safetensors is another"),
        (verdict, "report.json is another"),
        (more, "artifact/more.py was added"),
    ],
)
def test_who_may_push_and_makes_every_digest_right_again(
    running: Running, signed: Path, tmp_path: Path, change: Callable[[Path], Any], expected: str
) -> None:
    """The tag is then another package, whole by itself, with the signature of the first one."""
    push(signed, named(running))
    change(signed)
    push(signed, named(running))
    out, trust = tmp_path / "out", Trust(tmp_path / "mine.pub")
    with pytest.raises(PackageError, match=f"team/small:v1 is not what was signed: .*{expected}"):
        pull(named(running), out, trust=trust)
    assert names(tmp_path).isdisjoint({"out", ".out.pull"})
    pull(named(running), out)  # without a key only accidents are found
    assert Package.open(out).damage() == []
    with pytest.raises(PackageError, match=f"is not what was signed: .*{expected}"):
        verify(out, trust)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of this machine that is none of loopback's, as a line of /etc/hosts gives."""
    real = socket.getaddrinfo

    def found(host: Any, *arguments: Any, **keywords: Any) -> Any:
        return real("127.0.0.1" if host == "registry.test" else host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return "registry.test"


def test_tls(called: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not registries.REGISTRY:
        pytest.skip(registries.WHY_NOT)
    root, certificate, key = authority(tmp_path / "ours", called)
    stranger, *other = authority(tmp_path / "theirs", "elsewhere.test")
    out = tmp_path / "out"
    with registries.registry(tmp_path / "registry", tls=(certificate, key)) as running:
        where = f"{called}:{running.port}/team/small:v1"
        done = tapeout("push", bare, where, status=2)
        said = " ".join(done.stderr.split())
        assert f"{called}:{running.port} shows a certificate that cannot be trusted (" in said
        assert "none that this machine trusts: set SSL_CERT_FILE to its certificate (PEM)" in said
        monkeypatch.setenv("SSL_CERT_FILE", str(stranger))
        said = " ".join(tapeout("push", bare, where, status=2).stderr.split())
        assert f"none that SSL_CERT_FILE={stranger} has" in said
        assert running.blobs() == {}
        monkeypatch.setenv("SSL_CERT_FILE", str(root))
        tapeout("push", bare, where, status=0)
        tapeout("pull", where, "--out", out, status=0)
        assert same(out, bare)
        # In the clear it does not answer, which is told in its own words.
        with pytest.raises(RegistryError, match="HTTP request to an HTTPS server"):
            pull(Reference.parse(f"127.0.0.1:{running.port}/team/small"), tmp_path / "x")
    with registries.registry(tmp_path / "another", tls=(other[0], other[1])) as running:
        monkeypatch.setenv("SSL_CERT_FILE", str(stranger))
        with pytest.raises(RegistryError, match=r"cannot be trusted \(Hostname mismatch"):
            pull(Reference.parse(f"{called}:{running.port}/team/small"), tmp_path / "x")


def test_a_registry_elsewhere_that_speaks_no_tls(called: str, running: Running, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="does not speak TLS, and only a registry on this machine"):
        pull(Reference.parse(f"{called}:{running.port}/team/small"), tmp_path / "x")


def test_authorities_that_cannot_be_read(
    called: str, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"{called}:{running.port}/team/small"
    for path in (tmp_path / "none.pem", Path(__file__)):
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        with pytest.raises(RegistryError, match=f"^SSL_CERT_FILE={path} cannot be read: [^.]+\\.$"):
            pull(Reference.parse(where), tmp_path / "x")
    assert not (tmp_path / "x").exists()
