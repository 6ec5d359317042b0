"""The client of registries: what names an artifact, logins, and transfers that break, resume, or are lied to."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import registries
from registries import Cutting, Handler, Running, Spec

from tapeout.errors import PackageError, RegistryError
from tapeout.oci import Reference, Repository, repository, session, sha256
from tapeout.oci.authorize import Authorizer
from tapeout.oci.credentials import Login, login

CHUNK = 1 << 16
DATA = bytes(range(256)) * 4099  # more than 16 chunks, the last one short
DIGEST = sha256(DATA)
# `htpasswd -nbB ada opensesame`
HTPASSWD = "ada:$2b$05$abcdefghijklmnopqrstuuQbLfdQZSxZ9gjhA5V9o8Tyc6aQRO0Qi\n"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chunks of 64 KiB, waits of milliseconds, and no login of who runs the tests."""
    monkeypatch.setattr(repository, "_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(session, "_FIRST_WAIT_S", 0.002)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def spec() -> Iterator[Spec]:
    server = Spec()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not registries.REGISTRY:
        pytest.skip(registries.WHY_NOT)
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def at(host: str, name: str = "a/b", *, push: bool = True, mount_from: str | None = None) -> Repository:
    return Repository(Reference.parse(f"{host}/{name}"), push=push, mount_from=mount_from)


def send(where: Repository, data: bytes = DATA) -> str:
    with where:
        return where.upload(sha256(data), len(data), io.BytesIO(data), lambda _: None)


def fetch(host: str, path: Path, size: int = len(DATA), digest: str = DIGEST) -> bytes:
    with at(host, push=False) as where:
        where.download(digest, size, path, lambda _: None)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ghcr.io/team/model:v1", ("ghcr.io", "team/model", "v1", None)),
        ("localhost:5000/model", ("localhost:5000", "model", "latest", None)),
        ("localhost/a", ("localhost", "a", "latest", None)),
        (f"[::1]:5000/a@{DIGEST}", ("[::1]:5000", "a", None, DIGEST)),
        (f"r.example/a__b/c.d:x@{DIGEST}", ("r.example", "a__b/c.d", "x", DIGEST)),
    ],
)
def test_references(text: str, parts: tuple[str, str, str | None, str | None]) -> None:
    found = Reference.parse(text)
    assert (found.host, found.repository, found.tag, found.digest) == parts
    assert Reference.parse(str(found)) == found
    assert Reference.parse(found.pinned(DIGEST)).digest == DIGEST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("team/model:v1", "names no registry"),
        ("model", "names no registry"),
        ("https://ghcr.io/team/model", "'https:' in .* is no host"),
        ("ghcr.io/Team/model", "'Team/model' is no repository"),
        ("ghcr.io/team//model", "is no repository"),
        ("ghcr.io/../model", "is no repository"),
        ("ghcr.io/" + "a" * 256, "is no repository"),
        ("ghcr.io/team/model:", "'' in .* is no tag"),
        ("ghcr.io/team/model:-v", "'-v' in .* is no tag"),
        ("ghcr.io/team/model@sha256:12", "'sha256:12' in .* is no digest"),
        ("ghcr.io/team/model@", "'' in .* is no digest"),
        ("user@ghcr.io/team/model", "names no registry"),
    ],
)
def test_references_that_are_none(text: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:5000", True),
        ("127.8.0.1", True),
        ("[::1]:80", True),
        ("registry.localhost", True),
        ("10.0.0.1:5000", False),
        ("localhost.example.org", False),
        ("[::2]:80", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_only_this_machine_is_spoken_to_in_the_clear(host: str, *, expected: bool) -> None:
    with at(host) as where:
        assert where._session.base == f"{'http' if expected else 'https'}://{host}"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, len(DATA)])
def test_a_blob_goes_there_and_back(real: Running, tmp_path: Path, size: int) -> None:
    data = DATA[:size]
    assert send(at(real.host), data) == "sent"
    assert send(at(real.host), data) == "present"
    assert real.blobs()[sha256(data)] == size
    assert fetch(real.host, tmp_path / "blob", size, sha256(data)) == data


def test_a_blob_of_another_repository_is_mounted(real: Running) -> None:
    data = b"mounted" * 100
    assert send(at(real.host), data) == "sent"
    assert send(at(real.host, "c/d"), data[::-1]) == "sent"
    assert send(at(real.host, "c/d", mount_from="a/b"), data) == "mounted"
    assert send(at(real.host, "c/d", mount_from="a/b"), data + b"more") == "sent"
    with pytest.raises(RegistryError, match="'A' is no repository"):
        at(real.host, mount_from="A")


def test_an_upload_goes_on_where_it_broke(spec: Spec) -> None:
    way = Cutting(spec.server_port)
    way.cuts["up"] = [5 * CHUNK + 999, 3 * CHUNK, 2 * CHUNK + 5]
    assert send(at(way.host)) == "sent"
    assert spec.blobs == {DIGEST: DATA}
    assert not way.cuts["up"]
    # Every cut loses at most what was in flight: a chunk and what the kernel and the proxy hold (64 KiB each).
    assert way.passed["up"] < len(DATA) + 3 * 3 * CHUNK
    assert ("GET", "/v2/a/b/blobs/uploads/0") in spec.seen


def test_an_upload_that_the_registry_forgot_begins_again(real: Running) -> None:
    """Distribution 2.8 drops an upload whose chunk broke; the blob arrives all the same."""
    way, data = Cutting(real.port), DATA[1:]
    way.cuts["up"] = [5 * CHUNK + 999, 3 * CHUNK]
    assert send(at(way.host, "broken/up"), data) == "sent"
    assert not way.cuts["up"]
    assert real.blobs()[sha256(data)] == len(data)


def test_a_download_goes_on_where_it_broke(real: Running, tmp_path: Path) -> None:
    send(at(real.host))
    way = Cutting(real.port)
    way.cuts["down"] = [5 * CHUNK, 4 * CHUNK + 1, 2 * CHUNK]
    assert fetch(way.host, tmp_path / "blob") == DATA
    assert not way.cuts["down"]
    assert way.passed["down"] < len(DATA) + 3 * 2 * CHUNK  # what the proxy held when it cut, and headers


def test_the_next_run_goes_on_too(real: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(at(real.host))
    way, blob = Cutting(real.port), tmp_path / "blob"
    way.cuts["down"] = [8 * CHUNK]
    monkeypatch.setattr(session, "_FAILURES", 1)
    with pytest.raises(RegistryError, match=r"failed 1 times in a row .*the same command goes on"):
        fetch(way.host, blob)
    have = (tmp_path / "blob.partial").stat().st_size
    assert 0 < have < len(DATA)
    assert not blob.exists()
    before = way.passed["down"]
    assert fetch(way.host, blob) == DATA
    assert way.passed["down"] - before < len(DATA) - have + CHUNK


@pytest.mark.parametrize("damaged", [b"wrong", DATA[:-1] + b"?", DATA + b"more"])
def test_what_a_former_run_left_may_be_damaged(spec: Spec, tmp_path: Path, damaged: bytes) -> None:
    spec.blobs[DIGEST] = DATA
    (tmp_path / "blob.partial").write_bytes(damaged)
    assert fetch(spec.host, tmp_path / "blob") == DATA


def test_a_registry_that_knows_no_ranges(spec: Spec, tmp_path: Path) -> None:
    spec.script["GET", "/v2/a/b/blobs"] = lambda handler: handler.say(200, DATA)
    (tmp_path / "blob.partial").write_bytes(DATA[:1000])
    assert fetch(spec.host, tmp_path / "blob") == DATA


def _short(handler: Handler) -> None:
    handler.say(200, DATA[:999], Content_Length=len(DATA))
    handler.close_connection = True


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda handler: handler.say(200, DATA + b"!"), f"gives more than the {len(DATA)} bytes"),
        (lambda handler: handler.say(200, DATA[::-1]), "gave other bytes than those of sha256"),
        (lambda handler: handler.say(206, DATA, Content_Range="bytes 7-9/9"), "gave another range"),
        (lambda handler: handler.say(206, DATA), "gave another range"),
        (lambda handler: handler.say(404, b"no \x1b[31m"), r"does not give .*: status 404, no \[31m\."),
        (lambda handler: handler.say(503), "failed 6 times in a row .status 503"),
        (lambda handler: handler.say(302, Location="/v2/a/b/blobs/x"), "astray"),
        (_short, "failed 6 times in a row"),
    ],
)
def test_a_registry_that_lies_is_not_believed(
    spec: Spec, tmp_path: Path, lie: Callable[[Handler], None], message: str
) -> None:
    spec.script["GET", "/v2/a/b/blobs"] = lie
    with pytest.raises(RegistryError, match=message):
        fetch(spec.host, tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


def test_a_registry_that_is_busy_is_asked_again(spec: Spec, tmp_path: Path) -> None:
    spec.blobs[DIGEST] = DATA

    def busy(handler: Handler) -> None:
        del spec.script["GET", "/v2/a/b/blobs"]
        handler.say(429)

    spec.script["GET", "/v2/a/b/blobs"] = busy
    assert fetch(spec.host, tmp_path / "blob") == DATA


def test_a_manifest_is_what_its_digest_says(spec: Spec) -> None:
    spec.manifests |= {"latest": b"{}", DIGEST: b"{}", "large": b" " * ((4 << 20) + 1)}

    def get(tail: str) -> tuple[bytes, str]:
        with Repository(Reference.parse(f"{spec.host}/a/b{tail}")) as where:
            return where.manifest()

    assert get("") == (b"{}", sha256(b"{}"))
    with pytest.raises(RegistryError, match=f"digest is {sha256(b'{}')} instead of {DIGEST}"):
        get(f"@{DIGEST}")
    with pytest.raises(RegistryError, match="more than 4194304 bytes"):
        get(":large")
    with pytest.raises(RegistryError, match=r"a/b:none does not exist: status 404, UNKNOWN: no \[31msuch"):
        get(":none")
    spec.script["GET", "/v2/a/b/manifests"] = lambda handler: handler.say(
        200, b"{}", Docker_Content_Digest=DIGEST
    )
    with pytest.raises(RegistryError, match="instead of"):
        get("")


def test_nobody_is_there(spec: Spec) -> None:
    spec.shutdown()
    spec.server_close()
    with pytest.raises(RegistryError, match=f"{spec.host} cannot be reached"):
        send(at(spec.host))


def test_a_file_that_shrinks(spec: Spec) -> None:
    with pytest.raises(PackageError, match="became shorter while it was sent"), at(spec.host) as where:
        where.upload(DIGEST, len(DATA), io.BytesIO(DATA[:-1]), lambda _: None)
    with pytest.raises(RegistryError, match="DIGEST_INVALID: other bytes"), at(spec.host) as where:
        where.upload(DIGEST, len(DATA), io.BytesIO(DATA[::-1]), lambda _: None)


def write_config(content: object) -> None:
    directory = Path(os.environ["DOCKER_CONFIG"])
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"auths": {"r.example": {"auth": encoded("ada:o:s")}}}, Login("ada", "o:s")),
        ({"auths": {"https://r.example/v2/": {"auth": encoded("ada:x")}}}, Login("ada", "x")),
        ({"auths": {"r.example": {"username": "ada", "password": "x"}}}, Login("ada", "x")),
        ({"auths": {"r.example": {"auth": encoded(":"), "identitytoken": "t"}}}, Login("", "", "t")),
        ({"auths": {"r.example:5000": {"auth": encoded("ada:x")}}}, None),
        ({"auths": {"r.example": {}}}, None),
        ({}, None),
    ],
)
def test_logins_of_a_file(config: object, expected: Login | None) -> None:
    write_config(config)
    assert login("r.example") == expected


def test_docker_hub_has_a_name_of_its_own() -> None:
    write_config({"auths": {"https://index.docker.io/v1/": {"auth": encoded("ada:x")}}})
    assert login("docker.io") == Login("ada", "x")
    assert login("example.docker.io") is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read as docker's configuration"),
        ("[]", "cannot be read as docker's configuration"),
        ({"auths": {"r.example": {"auth": "%%"}}}, "has no readable login of r.example"),
        ({"auths": {"r.example": "ada"}}, "has no readable login of r.example"),
        ({"credsStore": "../../bin/sh"}, "is no credential helper"),
        ({"credHelpers": {"r.example": "absent"}}, "docker-credential-absent, .* does not work"),
    ],
)
def test_logins_that_cannot_be_read(config: object, message: str) -> None:
    write_config(config)
    with pytest.raises(RegistryError, match=message):
        login("r.example")


def test_logins_of_a_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker-credential-tests"
    program.write_text(
        '#!/bin/sh\nread host\ncase "$host" in\n'
        'r.example) echo \'{"ServerURL": "r.example", "Username": "ada", "Secret": "x"}\';;\n'
        't.example) echo \'{"Username": "<token>", "Secret": "t"}\';;\n'
        "odd.example) echo odd;;\n"
        "locked.example) echo 'it is locked' >&2; exit 1;;\n"
        "*) echo 'credentials not found in native keychain'; exit 1;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    write_config({"credsStore": "tests"})
    assert login("r.example") == Login("ada", "x")
    assert login("t.example") == Login("", "", "t")
    assert login("other.example") is None
    with pytest.raises(RegistryError, match="something that is no login"):
        login("odd.example")
    with pytest.raises(RegistryError, match="it is locked"):
        login("locked.example")


def test_a_registry_with_passwords(tmp_path: Path) -> None:
    if not registries.REGISTRY:
        pytest.skip(registries.WHY_NOT)
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    with registries.registry(tmp_path / "registry", tmp_path / "htpasswd") as running:
        with pytest.raises(RegistryError, match=f"without a login: `docker login {running.host}`"):
            send(at(running.host))
        write_config({"auths": {running.host: {"auth": encoded("ada:wrong")}}})
        with pytest.raises(RegistryError, match="for 'ada': the login is wrong"):
            send(at(running.host))
        write_config({"auths": {running.host: {"auth": encoded("ada:opensesame")}}})
        assert send(at(running.host)) == "sent"
        assert fetch(running.host, tmp_path / "blob") == DATA


def test_a_token_server(spec: Spec) -> None:
    spec.token = "of the token server"
    with pytest.raises(RegistryError, match="without a login"):
        send(at(spec.host))
    login_ = Login("ada", "opensesame")
    spec.logins.add(login_.basic)
    write_config({"auths": {spec.host: {"auth": encoded("ada:opensesame")}}})
    assert send(at(spec.host)) == "sent"
    assert spec.seen.count(("GET", "/token")) == 2


def test_an_identity_token_is_exchanged(spec: Spec) -> None:
    spec.token = "fresh"
    asked = []

    def token(handler: Handler) -> None:
        asked.append(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
        handler.say(200, b'{"access_token": "fresh"}')

    spec.script["POST", "/token"] = token
    write_config({"auths": {spec.host: {"identitytoken": "kept"}}})
    assert send(at(spec.host), DATA[:10]) == "sent"
    (form,) = asked
    assert "grant_type=refresh_token" in form
    assert "refresh_token=kept" in form
    assert "scope=repository%3Aa%2Fb%3Apull%2Cpush" in form


def test_no_login_goes_in_the_clear(spec: Spec) -> None:
    write_config({"auths": {"r.example": {"auth": encoded("ada:x")}}})
    with httpx2.Client() as http:
        authorizer = Authorizer(http, "r.example", "https://r.example", ["repository:a:pull"])
        with pytest.raises(RegistryError, match="would have a login go in the clear"):
            authorizer.answer(f'Bearer realm="http://{spec.host}/token"', None)
    assert not spec.seen


def test_a_login_is_shown_to_the_registry_alone(spec: Spec, tmp_path: Path) -> None:
    """A blob's redirect leads to another host, as at many registries: the token does not go there."""
    spec.token = "secret"
    spec.logins.add(Login("ada", "x").basic)
    write_config({"auths": {spec.host: {"auth": encoded("ada:x")}}})
    other, shown = Spec(), []

    def blob(handler: Handler) -> None:
        shown.append(handler.headers.get("Authorization"))
        handler.say(200, DATA)

    other.script["GET", "/elsewhere"] = blob
    spec.script["GET", "/v2/a/b/blobs"] = lambda handler: handler.say(
        307, Location=f"http://{other.host}/elsewhere"
    )
    assert fetch(spec.host, tmp_path / "blob") == DATA
    assert shown == [None]
    other.shutdown()
    other.server_close()


def test_stopping_ends_a_transfer(spec: Spec, tmp_path: Path) -> None:
    spec.blobs[DIGEST] = DATA
    with at(spec.host) as where:
        where.stop()
        with pytest.raises(RegistryError, match="was stopped"):
            where.download(DIGEST, len(DATA), tmp_path / "blob", lambda _: None)
        with pytest.raises(RegistryError, match="was stopped"):
            where.upload(sha256(DATA[1:]), len(DATA) - 1, io.BytesIO(DATA[1:]), lambda _: None)
