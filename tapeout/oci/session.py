"""Requests to one registry: with a login where it asks for one, and again where it could not be heard."""

from __future__ import annotations

import json
import os
import random
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2

from tapeout import __version__
from tapeout.errors import RegistryError
from tapeout.oci.authorize import Authorizer
from tapeout.oci.credentials import DOCKER_HUB
from tapeout.oci.reference import Reference

_MOST_BODY_BYTES = 4 << 20  # the size of a manifest that registries must take, by the spec
_TIMEOUT_S = 30
_FAILURES = 6  # in a row without a byte of progress; with the waits about 15 s
_FIRST_WAIT_S, _MOST_WAIT_S = 0.5, 15.0
AGAIN = {408, 429, 500, 502, 503, 504}


class AgainError(Exception):
    """The registry, or the way to it, failed in a manner that may pass."""


class NobodyError(AgainError):
    """Nobody listens at that address."""


@dataclass(frozen=True)
class Reply:
    """A response whose body is small."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def why(self) -> str:
        """What the registry says is wrong, on one line without control characters."""
        try:
            first = json.loads(self.body)["errors"][0]
            said = f"{first.get('code', '')}: {first.get('message', '')}"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            said = self.body[:200].decode(errors="replace")
        said = "".join(each for each in said if each.isprintable()).strip()[:200]
        return f"status {self.status}" + (f", {said}" if said else "")


@dataclass
class Patience:
    """Waits longer after each failure in a row, and gives up after some that had no progress between them."""

    what: str
    stop: threading.Event
    _reached: int = field(default=-1, init=False)
    _failures: int = field(default=0, init=False)

    def failed(self, error: Exception, reached: int = -1) -> None:
        """Wait; RegistryError where it is no use. ``reached`` is the furthest byte so far."""
        if reached > self._reached:
            self._failures, self._reached = 0, reached
        self._failures += 1
        if self._failures >= _FAILURES:
            raise RegistryError(
                f"{self.what} failed {self._failures} times in a row ({error or type(error).__name__}); "
                "the same command goes on where it stopped."
            ) from error
        wait = min(_FIRST_WAIT_S * 2 ** (self._failures - 1), _MOST_WAIT_S)
        if self.stop.wait(wait * random.uniform(0.75, 1.25)):
            raise RegistryError(f"{self.what} was stopped.") from error


class Session:
    """A connection to a registry. Threads may share it.

    Attributes:
        base: ``https://host``; ``http://`` for this machine itself, as other clients have it: nowhere else goes anything in the clear.
        stop: once set, whoever waits for another try waits no longer.
    """

    def __init__(self, reference: Reference, scopes: Sequence[str]) -> None:
        self._host = reference.host
        name = "registry-1.docker.io" if reference.host == DOCKER_HUB else reference.host
        self.base = f"{'http' if reference.is_loopback else 'https'}://{name}"
        self.stop = threading.Event()
        try:
            self._http = httpx2.Client(
                timeout=_TIMEOUT_S,
                follow_redirects=True,
                trust_env=not reference.is_loopback,
                headers={"User-Agent": f"tapeout/{__version__}", "Accept-Encoding": "identity"},
            )
        except OSError as error:  # ssl's are some
            given = _authorities() or "the list of authorities that this machine trusts"
            why = "it holds no certificate (PEM)" if isinstance(error, ssl.SSLError) else error.strerror
            raise RegistryError(f"{given} cannot be read: {why}.") from error
        self._authorizer = Authorizer(self._http, reference.host, self.base, scopes)
        self._reached = False

    def close(self) -> None:
        self._http.close()

    def patiently(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Reply:
        """Ask until it is answered; for what may be asked twice."""
        patience = Patience(f"{method} {url}", self.stop)
        while True:
            try:
                return self.once(method, url, headers, content)
            except AgainError as error:
                if isinstance(error, NobodyError) and not self._reached:
                    raise RegistryError(f"{self._host} cannot be reached: {error}.") from error
                patience.failed(error)

    def once(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Reply:
        """Ask; AgainError where asking again may help."""
        with self.open(method, url, headers, content) as response:
            return whole(response)

    @contextmanager
    def open(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
    ) -> Iterator[httpx2.Response]:
        """A response whose body is to be read; a login is sent where one is asked for, and to the registry alone."""
        ours = urlsplit(url)[:2] == urlsplit(self.base)[:2]
        try:
            for first in (True, False):
                sent = self._authorizer.header if ours else None
                given = {**(headers or {}), **({"Authorization": sent} if sent else {})}
                with self._http.stream(method, url, headers=given, content=content) as response:
                    self._reached = True
                    if not (first and ours and response.status_code == 401):
                        yield response
                        return
                    asked = response.headers.get("www-authenticate", "")
                self._authorizer.answer(asked, sent)
        except httpx2.TransportError as error:
            if why := _distrust(error, self._host):
                raise RegistryError(why) from error
            kind = NobodyError if isinstance(error, httpx2.ConnectError) else AgainError
            raise kind(str(error).rstrip(".") or type(error).__name__) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise RegistryError(f"{self._host} sends {method} {url} astray: {error}.") from error

    def expect(self, reply: Reply, status: int, what: str) -> None:
        """RegistryError unless the reply has this status, with what the registry says of its reason."""
        if reply.status == 401:
            raise RegistryError(self._authorizer.refusal(what))
        if reply.status != status:
            raise RegistryError(f"{self._host} does not {what}: {reply.why()}.")


def _authorities() -> str | None:
    """The variable that says which certificates are trusted, with its value; None: none does."""
    names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    return f"{names[0]}={os.environ[names[0]]}" if names else None


def _distrust(error: BaseException, host: str) -> str | None:
    """What to say where TLS is what failed, which no waiting mends."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        given = _authorities()
        trusted = f"{given} has" if given else "this machine trusts"
        return (
            f"{host} shows a certificate that cannot be trusted ({cause.verify_message.rstrip('.')}); nothing was sent. If it is by an "
            f"authority of your own, none that {trusted}: set SSL_CERT_FILE to its certificate (PEM), beside those of the others that you need."
        )
    if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return f"{host} does not speak TLS, and only a registry on this machine itself is spoken to in the clear."
    return None


def whole(response: httpx2.Response) -> Reply:
    """Read a small body.

    Raises:
        AgainError: asking again may help.
        RegistryError: it is larger than a manifest may be.
    """
    body = b""
    for block in response.iter_raw():
        body += block
        if len(body) > _MOST_BODY_BYTES:
            raise RegistryError(f"{response.url} answers with more than {_MOST_BODY_BYTES} bytes.")
    reply = Reply(response.status_code, response.headers, body, str(response.url))
    if reply.status in AGAIN:
        raise AgainError(reply.why())
    return reply
