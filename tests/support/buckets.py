"""An S3 on loopback: moto's server, which the clients of Amazon's own take for it."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHY_NOT = next(
    (
        f"no {name} (pip install s3fs 'moto[s3]' flask flask-cors)"
        for name in ("s3fs", "moto", "flask", "flask_cors")
        if not importlib.util.find_spec(name)
    ),
    None,
)


class Buckets:
    """The server. Who asks must not be known to it, until ``close_to_strangers``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        kind = {"Content-Type": "text/plain"}
        request = urllib.request.Request(self.url + path, body or None, kind, method=method)
        with urllib.request.urlopen(request, timeout=20) as reply:
            return bytes(reply.read())

    def close_to_strangers(self, closed: bool) -> None:
        """Answer 403 to keys that it has not given out, which are all."""
        self.ask("POST", "/moto-api/reset-auth", b"0" if closed else b"inf")


@contextmanager
def buckets(directory: Path) -> Iterator[Buckets]:
    """The server on a free port, with an empty bucket ``shared``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = directory / "moto.log"
    with log.open("wb") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said)
    found, until = Buckets(f"http://127.0.0.1:{port}"), time.monotonic() + 60
    try:
        while True:
            try:
                found.ask("PUT", "/shared")
                break
            except OSError:
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
        yield found
    finally:
        child.kill()
        child.wait()
