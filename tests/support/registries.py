"""A real registry on loopback, and a way to it that breaks."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

REGISTRY = shutil.which("docker-registry") or shutil.which("registry")
WHY_NOT = "no docker-registry (Debian: apt-get install docker-registry)"


@dataclass(frozen=True)
class Running:
    """A registry and the folder that it keeps things in."""

    port: int
    root: Path

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def blobs(self) -> dict[str, int]:
        """Digest and size of everything that is kept, manifests too."""
        kept = (self.root / "docker/registry/v2/blobs").glob("sha256/*/*/data")
        return {f"sha256:{path.parent.name}": path.stat().st_size for path in kept}


@contextmanager
def registry(
    directory: Path, htpasswd: Path | None = None, tls: tuple[Path, Path] | None = None
) -> Iterator[Running]:
    """The registry of the CNCF's Distribution, on a free port; ``tls``: certificate and key that it shows."""
    assert REGISTRY
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "config.yml"
    auth = f"auth: {{htpasswd: {{realm: tests, path: {htpasswd}}}}}\n" if htpasswd else ""
    shown = f", tls: {{certificate: {tls[0]}, key: {tls[1]}}}" if tls else ""
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'kept'}}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: tests{shown}}}\n{auth}"
    )
    with (directory / "log").open("wb") as log:
        child = subprocess.Popen([REGISTRY, "serve", config], stdout=log, stderr=log)
    try:
        _wait(port, child, directory / "log")
        yield Running(port, directory / "kept")
    finally:
        child.kill()
        child.wait()


def _wait(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5):
                return
        except urllib.error.HTTPError:  # it asks for a login, or to be spoken to by TLS
            return
        except OSError:
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)


class Cutting:
    """A way to a server on loopback that closes connections after so many bytes.

    Attributes:
        cuts: bytes after which to cut, in turn, of those that go ``up`` to the server or ``down`` from it; then none is cut.
        passed: bytes that went each way.
    """

    def __init__(self, port: int) -> None:
        self._behind, self._lock = port, threading.Lock()
        self.cuts: dict[str, list[int]] = {"up": [], "down": []}
        self.passed = {"up": 0, "down": 0}
        self._since = {"up": 0, "down": 0}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._behind))
                for way, source, sink in (("up", near, far), ("down", far, near)):
                    threading.Thread(target=self._pass, args=(way, source, sink), daemon=True).start()

    def _pass(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 16):
                with self._lock:
                    self.passed[way] += len(block)
                    self._since[way] += len(block)
                    cut = self.cuts[way] and self._since[way] >= self.cuts[way][0]
                    if cut:
                        self.cuts[way].pop(0)
                        self._since[way] = 0
                if cut:  # what is in hand is lost, as on a real wire
                    break
                sink.sendall(block)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Spec(ThreadingHTTPServer):
    """The spec's blobs and manifests in memory, for what no registry does on demand.

    It keeps what came of a chunk when the connection breaks, and says so when asked, as Distribution does since 3.0.

    Attributes:
        script: answers ``(method, beginning of the path)`` before anything else does.
        seen: method and path of every request.
        token: what a request must show, as ``/token`` gives it to who sends one of ``logins``.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.script: dict[tuple[str, str], Callable[[Handler], None]] = {}
        self.seen: list[tuple[str, str]] = []
        self.token: str | None = None
        self.logins: set[str] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A connection that breaks is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Spec

    def log_message(self, *_: object) -> None:
        pass

    def say(self, status: int, body: bytes = b"", **headers: object) -> None:
        """Answer; underscores in the names of headers become hyphens."""
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        spec, (path, _, query) = self.server, self.path.partition("?")
        spec.seen.append((self.command, path))
        for (method, start), said in spec.script.items():
            if self.command == method and path.startswith(start):
                return said(self)
        if path == "/token":
            known = self.headers.get("Authorization") in spec.logins
            return self.say(200 if known else 401, b'{"token": "%s"}' % str(spec.token).encode())
        if spec.token and self.headers.get("Authorization") != f"Bearer {spec.token}":
            realm = f'Bearer realm="http://{spec.host}/token",service="tests"'
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return self.say(401, WWW_Authenticate=realm)
        kind, _, name = path.removeprefix("/v2/a/b/").partition("/")
        if kind == "blobs" and name.startswith("uploads/"):
            return self._upload(name.removeprefix("uploads/"), parse_qs(query))
        if kind == "manifests" and self.command == "PUT":
            spec.manifests[name] = self.rfile.read(int(self.headers["Content-Length"]))
            return self.say(201)
        held = spec.manifests.get(name) if kind == "manifests" else spec.blobs.get(name)
        if held is None:
            return self.say(404, b'{"errors": [{"code": "UNKNOWN", "message": "no \\u001b[31msuch"}]}')
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not first:
            return self.say(200, held)
        begin = int(first[1])
        return self.say(206, held[begin:], Content_Range=f"bytes {begin}-{len(held) - 1}/{len(held)}")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

    def _upload(self, name: str, query: dict[str, list[str]]) -> None:
        spec = self.server
        if self.command == "POST":
            name = str(len(spec.uploads))
            spec.uploads[name] = bytearray()
            return self.say(202, Location=f"/v2/a/b/blobs/uploads/{name}")
        if name not in spec.uploads:
            return self.say(404)
        came, missing = spec.uploads[name], int(self.headers.get("Content-Length") or 0)
        first = self.headers.get("Content-Range", "").partition("-")[0]
        if first and int(first) != len(came):
            self.rfile.read(missing)
            return self.say(416, Location=self.path, Range=f"0-{len(came) - 1}")
        while missing and (block := self.rfile.read1(min(missing, 1 << 14))):
            came += block
            missing -= len(block)
        if missing:
            self.close_connection = True
            return None
        if self.command != "PUT":
            status = 204 if self.command == "GET" else 202
            return self.say(status, Location=self.path, Range=f"0-{max(len(came) - 1, 0)}")
        digest = f"sha256:{hashlib.sha256(came).hexdigest()}"
        if [digest] != query["digest"]:
            return self.say(400, b'{"errors": [{"code": "DIGEST_INVALID", "message": "other bytes"}]}')
        spec.blobs[digest] = bytes(came)
        del spec.uploads[name]
        return self.say(201)
