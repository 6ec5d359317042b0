"""Signatures: made and checked here, by model-signing's own program, and what does not pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import tapeout
from packages import rewritten

from tapeout.errors import MissingToolchain, PackageError, TapeoutError
from tapeout.signing import Trust, check, sign, signed_with
from tapeout.verify import verify

pytest.importorskip("model_signing")

from certificates import Key, certificate, written
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

PROGRAM = Path(sys.executable).with_name("model_signing")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mine.pem`` and ``other.pem`` with ``.pub`` beside them, and ``locked.pem``, which is ``mine.pem`` with a password."""
    place = tmp_path_factory.mktemp("keys")
    mine = ec.generate_private_key(ec.SECP256R1())
    written(place / "mine.pem", mine)
    written(place / "locked.pem", mine, "open sesame")
    written(place / "other.pem", ec.generate_private_key(ec.SECP384R1()))
    written(place / "rsa.pem", rsa.generate_private_key(65537, 2048))
    written(place / "bitcoin.pem", ec.generate_private_key(ec.SECP256K1()))
    return place


@pytest.fixture(scope="module")
def chain(keys: Path) -> Path:
    """``root.pem`` → ``between.pem`` → ``signer.pem``, the certificate of mine.pem; ``stranger.pem`` is another root."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    mine = load_pem_private_key((keys / "mine.pem").read_bytes(), None)
    assert isinstance(mine, Key)
    top, middle, strange = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = certificate("root", top, None, top)
    between = certificate("between", middle, root, top)
    found = {
        "root": root,
        "between": between,
        "signer": certificate("signer", mine, between, middle),
        "stranger": certificate("stranger", strange, None, strange),
    }
    for name, each in found.items():
        (keys / f"{name}.crt").write_bytes(each.public_bytes(Encoding.PEM))
    return keys


@pytest.fixture
def package(bare: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "package"))


def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_what_is_signed_here_is_what_the_library_s_own_program_verifies(package: Path, keys: Path) -> None:
    before = json.loads((package / "tapeout.json").read_text())
    assert signed_with(package) is None
    path = sign(package, keys / "mine.pem")
    assert path == package / "model.sig"
    assert signed_with(package) == "key"
    trust = Trust(keys / "mine.pub")
    files = sum(each.is_file() for each in package.rglob("*")) - 1
    assert check(package, trust) == files
    found = verify(package, trust)
    assert found.damage == ()
    assert found.signature == f"by the key {keys / 'mine.pub'}, over {files} files"
    assert found.root_sha256 == before["root_sha256"]
    done = program("verify", "key", package, "--signature", path, "--public_key", keys / "mine.pub")
    assert done.returncode == 0, done.stderr
    done = program("verify", "key", package, "--signature", path, "--public_key", keys / "other.pub")
    assert done.returncode == 1


def test_what_the_library_s_own_program_signs_is_verified_here(package: Path, keys: Path) -> None:
    signature = package / "model.sig"
    done = program("sign", "key", package, "--signature", signature, "--private_key", keys / "other.pem")
    assert done.returncode == 0, done.stderr
    trust = Trust(keys / "other.pub")
    assert check(package, trust) == sum(each.is_file() for each in package.rglob("*")) - 1
    assert verify(package, trust).damage == ()


def test_what_a_device_wrote_is_not_signed(package: Path, keys: Path) -> None:
    sign(package, keys / "mine.pem")
    (package / "device_report.json").write_text("{}")
    assert verify(package, Trust(keys / "mine.pub")).damage == ()
    done = program(
        *("verify", "key", package, "--signature", package / "model.sig"), "--public_key", keys / "mine.pub"
    )
    assert done.returncode == 0, done.stderr


def test_without_a_key_a_signature_is_told(package: Path, keys: Path) -> None:
    assert verify(package).signature == "none"
    sign(package, keys / "mine.pem")
    assert "made with a key, not checked: give --key" in verify(package).signature


def test_with_a_key_an_unsigned_package_is_refused(package: Path, keys: Path) -> None:
    with pytest.raises(PackageError, match=r"is not signed: it has no model\.sig"):
        verify(package, Trust(keys / "mine.pub"))


def test_another_key_is_refused(package: Path, keys: Path) -> None:
    sign(package, keys / "mine.pem")
    with pytest.raises(PackageError, match=r"is not by the key .*other\.pub"):
        check(package, Trust(keys / "other.pub"))


def edit_the_report(package: Path) -> str:
    """A gate that failed, passes."""
    path = package / "report.json"
    path.write_text(path.read_text().replace('"status": "skipped"', '"status": "passed"', 1) + " ")
    rewritten(package, lambda manifest: None)
    return "report.json is another"


def one_byte(package: Path) -> str:
    path = package / "artifact" / "lm_head.weight.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rewritten(package, lambda manifest: None)
    return "artifact/lm_head.weight.safetensors is another"


def add_a_file(package: Path) -> str:
    (package / "artifact" / "more.py").write_text("print()")
    entry = {"sha256": "0" * 64, "size": 0}
    rewritten(package, lambda manifest: manifest["files"].update({"artifact/more.py": entry}))
    return "artifact/more.py was added"


def remove_a_file(package: Path) -> str:
    (package / "golden.safetensors").unlink()
    rewritten(package, lambda manifest: None)
    return "golden.safetensors is missing"


@pytest.mark.parametrize("change", [edit_the_report, one_byte, add_a_file, remove_a_file])
def test_what_digests_that_were_made_right_again_hide_is_named(
    package: Path, keys: Path, change: Callable[[Path], str]
) -> None:
    sign(package, keys / "mine.pem")
    expected = change(package)
    from tapeout.pack import Package

    assert Package.open(package).damage() == []
    with pytest.raises(PackageError, match=f"is not what was signed: .*{expected}"):
        check(package, Trust(keys / "mine.pub"))


def test_the_signature_of_another_package(package: Path, keys: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(package, tmp_path / "other"))
    (other / "README.md").write_text("another")
    rewritten(other, lambda manifest: None)
    sign(other, keys / "mine.pem")
    shutil.copyfile(other / "model.sig", package / "model.sig")
    with pytest.raises(PackageError, match=r"not what was signed: README.md is another"):
        check(package, Trust(keys / "mine.pub"))


def test_a_signature_that_leaves_something_out_does_not_pass(package: Path, keys: Path) -> None:
    """What its maker told the library to ignore is not signed, and is said."""
    done = program(
        *("sign", "key", package, "--signature", package / "model.sig", "--private_key", keys / "mine.pem"),
        *("--ignore-paths", package / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(PackageError, match=r"report\.json"):
        check(package, Trust(keys / "mine.pub"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{}", "no signature of model-signing"),
        ('{"verificationMaterial": {}, "dsseEnvelope": {"payload": "!"}}', "no signature of model-signing"),
        ("[" * 200_000, "nested too deep"),
        ('{"a": 1, "a": 2}', "stands twice"),
    ],
)
def test_what_is_no_signature(package: Path, keys: Path, text: str, why: str) -> None:
    (package / "model.sig").write_text(text)
    for run in (lambda: verify(package), lambda: check(package, Trust(keys / "mine.pub"))):
        with pytest.raises(PackageError, match=why):
            run()


def test_certificates(package: Path, chain: Path) -> None:
    sign(package, chain / "mine.pem", certificates=[chain / "signer.crt", chain / "between.crt"])
    assert signed_with(package) == "certificate"
    assert check(package, Trust(certificates=(chain / "root.crt",))) > 10
    done = program(
        *("verify", "certificate", package, "--signature", package / "model.sig"),
        *("--certificate_chain", chain / "root.crt"),
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(PackageError, match=r"is not by a certificate under .*stranger"):
        check(package, Trust(certificates=(chain / "stranger.crt",)))
    with pytest.raises(PackageError, match="signed with a certificate: give --certificate"):
        check(package, Trust(chain / "mine.pub"))
    one_byte(package)
    with pytest.raises(PackageError, match=r"lm_head.weight.safetensors is another"):
        check(package, Trust(certificates=(chain / "root.crt",)))


def test_a_certificate_of_another_key(package: Path, chain: Path) -> None:
    with pytest.raises(TapeoutError, match="cannot sign with"):
        sign(package, chain / "other.pem", certificates=[chain / "signer.crt"])
    assert not (package / "model.sig").exists()


def test_a_key_with_a_password(package: Path, chain: Path) -> None:
    path = sign(package, chain / "locked.pem", password="open sesame")
    assert check(package, Trust(chain / "mine.pub")) > 10
    sign(package, chain / "locked.pem", password="open sesame", certificates=[chain / "signer.crt"])
    assert check(package, Trust(certificates=(chain / "root.crt", chain / "between.crt"))) > 10
    before = path.read_bytes()
    with pytest.raises(TapeoutError, match="its password is another"):
        sign(package, chain / "locked.pem", password="open barley")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rsa.pem", "of the kind RSAPrivateKey; what fits: P-256"),
        ("bitcoin.pem", "of the kind secp256k1; what fits: P-256"),
        ("mine.pub", "no private key in PEM"),
        ("none.pem", "cannot be read: No such file"),
        ("locked.pem", "TAPEOUT_KEY_PASSWORD"),
    ],
)
def test_keys_that_do_not_sign(package: Path, keys: Path, name: str, why: str) -> None:
    with pytest.raises(TapeoutError, match=why):
        sign(package, keys / name)
    assert not (package / "model.sig").exists()


@pytest.mark.parametrize("name", ["mine.pem", "rsa.pub", "bitcoin.pub", "none.pub"])
def test_keys_that_do_not_verify(package: Path, keys: Path, name: str) -> None:
    sign(package, keys / "mine.pem")
    with pytest.raises(TapeoutError, match="cannot be read as a public key on a NIST curve"):
        check(package, Trust(keys / name))


def test_keyless_without_a_network(package: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sigstore.errors import TUFError
    from sigstore.models import ClientTrustConfig

    def unreachable() -> None:
        raise TUFError("Failed to refresh TUF metadata")

    monkeypatch.setattr(ClientTrustConfig, "production", unreachable)  # whether or not there is one here
    with pytest.raises(MissingToolchain, match=r"Sigstore's servers.*Without a network: a key of your own"):
        sign(package)
    assert not list(package.glob("*model.sig*"))
    bundle = {
        "verificationMaterial": {"certificate": {}},
        "dsseEnvelope": {"payload": "eyJwcmVkaWNhdGUiOnsicmVzb3VyY2VzIjpbXX19"},
    }
    (package / "model.sig").write_text(json.dumps(bundle))
    assert verify(package).signature.startswith("keyless, not checked")
    with pytest.raises(MissingToolchain, match="Sigstore's servers"):
        check(package, Trust(identity="somebody@example.org", provider="https://accounts.google.com"))


def test_without_the_library(package: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(package, keys / "mine.pem")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for arguments in (("sign", "--key", keys / "mine.pem"), ("verify", "--key", keys / "mine.pub")):
        done = tapeout(arguments[0], package, *arguments[1:], status=3)
        assert "pip install 'tapeout[sign]'" in done.stderr
    assert "made with a key, not checked" in tapeout("verify", package, status=0).stderr


def test_trust_is_one_thing(keys: Path) -> None:
    with pytest.raises(TapeoutError, match="give one of them"):
        Trust(keys / "mine.pub", (keys / "mine.pub",))
    with pytest.raises(TapeoutError, match="go together"):
        Trust(identity="somebody@example.org")


def test_the_verbs(package: Path, keys: Path) -> None:
    locked = {"TAPEOUT_KEY_PASSWORD": "open sesame"}
    done = tapeout("sign", package, "--key", keys / "locked.pem", status=0, **locked)
    assert f"{package / 'model.sig'} signs " in done.stderr
    done = tapeout("verify", package, "--key", keys / "mine.pub", "--json", status=0)
    assert json.loads(done.stdout)["signature"].startswith("by the key ")
    assert "is not by the key" in tapeout("verify", package, "--key", keys / "other.pub", status=2).stderr
    assert "give one of them" in tapeout("sign", package, status=2).stderr
    one_byte(package)
    assert "is not what was signed" in tapeout("verify", package, "--key", keys / "mine.pub", status=2).stderr
    (package / "README.md").write_text("edited")
    assert (
        "and is not signed: README.md"
        in tapeout("sign", package, "--key", keys / "mine.pem", status=2).stderr
    )
    assert os.environ.get("TAPEOUT_KEY_PASSWORD") is None
