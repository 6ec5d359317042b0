"""A real registry on loopback, and a way to it that breaks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
def registry(directory: Path, htpasswd: Path | None = None) -> Iterator[Running]:
    """The registry of the CNCF's Distribution, on a free port."""
    assert REGISTRY
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "config.yml"
    auth = f"auth: {{htpasswd: {{realm: tests, path: {htpasswd}}}}}\n" if htpasswd else ""
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'kept'}}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: tests}}\n{auth}"
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
        except urllib.error.HTTPError:  # it asks for a login
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
