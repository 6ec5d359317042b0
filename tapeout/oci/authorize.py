"""How a registry is told who asks: https://distribution.github.io/distribution/spec/auth/token/ and HTTP's own ``Basic``."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from urllib.parse import urlencode

import httpx2

from tapeout.errors import RegistryError
from tapeout.oci.credentials import login

_MOST_TOKEN_BYTES = 1 << 20


class Authorizer:
    """The header ``Authorization`` of one registry, fetched when it first asks for it. Threads may share it."""

    def __init__(self, http: httpx2.Client, host: str, base: str, scopes: Sequence[str]) -> None:
        self._http, self._host, self._secure, self._scopes = http, host, base.startswith("https:"), scopes
        self._lock = threading.Lock()
        self.header: str | None = None

    def answer(self, asked: str, sent: str | None) -> None:
        """Fetch what ``WWW-Authenticate: asked`` wants, unless another thread has since ``sent`` was refused.

        Raises:
            RegistryError: there is no login, it is refused, or it would go in the clear.
        """
        with self._lock:
            if self.header != sent:
                return
            kind, _, rest = asked.partition(" ")
            fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            if kind.lower() == "bearer" and "realm" in fields:
                self.header = f"Bearer {self._token(fields)}"
            elif kind.lower() == "basic" and (kept := login(self._host)) and kept.user:
                self.header = kept.basic
            else:
                raise RegistryError(self.refusal("answer"))

    def refusal(self, what: str) -> str:
        """What to say to who is refused: there is no login, or it is not enough."""
        kept = login(self._host)
        if kept is None:
            return (
                f"{self._host} does not {what} without a login: `docker login {self._host}` (or oras, or podman) keeps one "
                "in ~/.docker/config.json, or set DOCKER_CONFIG to the directory of another config.json."
            )
        who = repr(kept.user) if kept.user else "the kept token"
        return f"{self._host} does not {what} for {who}: the login is wrong, too old, or not enough."

    def _token(self, fields: dict[str, str]) -> str:
        """Ask the token server that the registry names."""
        realm, kept = fields["realm"], login(self._host)
        if self._secure and not realm.startswith("https:"):
            raise RegistryError(f"{self._host} would have a login go in the clear to {realm!r}.")
        given = [("service", fields["service"])] if "service" in fields else []
        headers = {}
        try:
            if kept and kept.identity_token:
                form = dict(
                    [*given, ("grant_type", "refresh_token"), ("refresh_token", kept.identity_token)],
                    client_id="tapeout",
                    scope=" ".join(self._scopes),
                )
                reply = self._http.post(realm, data=form)
            else:
                if kept:
                    headers["Authorization"] = kept.basic
                query = urlencode([*given, *(("scope", scope) for scope in self._scopes)])
                mark = "&" if "?" in realm else "?"
                reply = self._http.get(f"{realm}{mark}{query}", headers=headers)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise RegistryError(
                f"the token server {realm!r} of {self._host} cannot be asked: {error}."
            ) from error
        if reply.status_code in (400, 401, 403):
            raise RegistryError(self.refusal("answer"))
        try:
            said = json.loads(reply.content[:_MOST_TOKEN_BYTES])
            token = said.get("token") or said["access_token"]
        except (ValueError, KeyError, AttributeError) as error:
            raise RegistryError(
                f"the token server {realm!r} of {self._host} gave no token (status {reply.status_code})."
            ) from error
        return str(token)
